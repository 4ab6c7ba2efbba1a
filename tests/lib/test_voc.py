import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import TinyDataset, write_voc_tree
from torch.utils.data import DataLoader

from drs_course.paper import Configuration
from drs_course.stages import Pipeline, open_data
from drs_lib.data import VOC2012, VOC_CLASSES, MaskAccessError, save_indexed_png, voc_palette, without_masks
from drs_lib.data.voc import VOC_LIST_SIZES, read_list


@pytest.fixture
def tree(tmp_path):
    """A tree of one's own, to spoil."""
    return write_voc_tree(tmp_path)


# What VOC's devkit prints for its first labels, the last one, and the border.
COLOURS = {0: (0, 0, 0), 1: (128, 0, 0), 5: (128, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128),
           20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip


def test_palette_and_classes_are_vocs():
    assert {label: tuple(voc_palette()[label].tolist()) for label in COLOURS} == COLOURS
    assert len(np.unique(voc_palette(), axis=0)) == 256
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert VOC_CLASSES[14] == "person"


def test_reads_images_labels_masks_and_saliency(voc_tree):
    ds = VOC2012(voc_tree.parent, "train")
    assert len(ds) == 6 and ds.num_classes == 20 and ds.classes == VOC_CLASSES
    for i, name in enumerate(ds.names):
        image, labels = ds[i]
        mask, saliency = ds.mask(i), ds.saliency(i)
        pixels = Image.open(voc_tree / "JPEGImages" / f"{name}.jpg")
        assert pixels.mode == ("L" if i == 1 else "RGB")
        assert image.dtype == torch.uint8 and image.is_contiguous()
        np.testing.assert_array_equal(image.permute(1, 2, 0), pixels.convert("RGB"))
        expected = np.array(Image.open(voc_tree / "SegmentationClassAug" / f"{name}.png"))
        np.testing.assert_array_equal(mask, expected)
        assert 255 in mask and labels.dtype == torch.float32
        present = sorted(set(np.unique(expected)) - {0, 255})
        assert labels.nonzero().ravel().tolist() == [value - 1 for value in present]
        assert saliency.dtype == np.uint8 and saliency.shape == mask.shape
        assert (saliency[mask > 0] == 220).all() and (saliency[mask == 0] == 12).all()


@pytest.mark.parametrize("marker", [True, False])
def test_cmyk_image_keeps_its_colours(tree, marker):
    ds = VOC2012(tree, "train")
    path = tree / "JPEGImages" / f"{ds.names[0]}.jpg"
    Image.new("RGB", (16, 8), (230, 30, 30)).convert("CMYK").save(path, quality=100)
    content = path.read_bytes()
    at = content.index(b"\xff\xee")
    assert content[at + 4 : at + 9] == b"Adobe"
    if not marker:
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        path.write_bytes(content[:at] + content[at + 2 + length :])
    assert (ds.image(0).int() - torch.tensor([230, 30, 30]).view(3, 1, 1)).abs().max() < 20


def test_exif_orientation_is_ignored(tree):
    ds = VOC2012(tree, "train")
    path = tree / "JPEGImages" / f"{ds.names[0]}.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, exif=exif)
    stored = Image.open(path)
    assert stored.getexif()[274] == 6
    np.testing.assert_array_equal(ds.image(0).permute(1, 2, 0), stored.convert("RGB"))


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_root_may_be_the_folder_or_above(voc_tree, tmp_path, below):
    target = tmp_path / below if below else tmp_path / "anything"
    shutil.copytree(voc_tree, target)
    assert len(VOC2012(tmp_path if below else target, "val")) == 3


def test_without_masks_labels_are_unknown(tree):
    shutil.rmtree(tree / "SegmentationClassAug")
    ds = VOC2012(tree, "val", labels="none")
    assert ds[0][1].isnan().all() and ds.image_labels().isnan().all() and ds[0][0].dtype == torch.uint8
    with pytest.raises(FileNotFoundError, match="SegmentationClassAug"):
        ds.mask(0)
    with pytest.raises(ValueError, match="labels is 'mask' or 'none'"):
        VOC2012(tree, "val", labels="masks")
    with pytest.raises(ValueError, match="masks is one of"):
        VOC2012(tree, "val", masks="Masks")


def test_lists_of_a_tree_that_claims_to_be_voc(tmp_path, monkeypatch):
    tree = write_voc_tree(tmp_path, own_classes=False)
    lists = tree / "ImageSets/Segmentation"
    for split, number in (("train", "1464"), ("val", "1449"), ("trainaug", "10582")):
        with pytest.raises(ValueError, match=number):
            VOC2012(tree, split)
    (lists / "few.txt").write_text("2007_000001\n", encoding="utf-8")
    assert len(VOC2012(tree, "few")) == 1
    monkeypatch.setitem(VOC_LIST_SIZES, "trainaug", 6)
    assert len(VOC2012(tree, "trainaug")) == 6
    names, val = read_list(lists / "trainaug.txt"), read_list(lists / "val.txt")
    (lists / "trainaug.txt").write_text("\n".join([*names[1:], val[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"trainaug.txt holds images of VOC's val list: {val[0]}"):
        VOC2012(tree, "trainaug")


@pytest.mark.parametrize(
    "line",
    ["2007_000001", "2007_000001 0 14 ", "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_other_peoples_lists_and_classes_also_as_windows_writes_them(tree, line, encoding):
    (tree / "ImageSets/Segmentation/mine.txt").write_bytes(f"{line}\r\n\r\n".encode(encoding))
    (tree / "classes.txt").write_bytes("\r\n".join(f"kind {i}" for i in range(16)).encode(encoding))
    ds = VOC2012(tree, "mine")
    assert ds.names == ["2007_000001"]
    assert ds.num_classes == 16 and ds.classes[3] == "kind 3" and ds[0][1].shape == (16,)


@pytest.mark.parametrize(
    "name, of_twice, of_none",
    [
        ("ImageSets/Segmentation/train.txt", "more than once", "empty"),
        ("classes.txt", *["1 to 254 different class names"] * 2),
    ],
)
def test_bad_lists(tree, name, of_twice, of_none):
    contents = {b"a\na\n": of_twice, b"": of_none}
    contents |= dict.fromkeys(
        ("caf\xe9".encode(other) for other in ("utf-16", "latin-1")), "no text in UTF-8"
    )
    for content, message in contents.items():
        (tree / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            VOC2012(tree, "train")


def test_missing_things_are_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="drs_course download"):
        VOC2012(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="lists there: train, trainaug, trainval, val"):
        VOC2012(tree, "test")
    for name in ("2007_000001", "2007_000003", "2007_000004", "2007_000005"):
        (tree / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 4 of 6 .*0001, 2007_000003, 2007_000004, \.\.\."):
        VOC2012(tree, "train")
    shutil.rmtree(tree / "SegmentationClassAug")
    with pytest.raises(FileNotFoundError, match="ClassAug is not there.*masks='SegmentationClass'"):
        VOC2012(tree, "val")
    assert len(VOC2012(tree, "val", masks="SegmentationClass")) == 3
    shutil.rmtree(tree / "JPEGImages")
    with pytest.raises(FileNotFoundError, match="half extracted"):
        VOC2012(tree, "val")


def test_missing_saliency_says_what_to_get(tree):
    ds = VOC2012(tree, "train")
    (tree / "saliency_map" / f"{ds.names[2]}.png").unlink()
    with pytest.raises(FileNotFoundError, match=ds.names[2]):
        ds.saliency(2)
    shutil.rmtree(tree / "saliency_map")
    with pytest.raises(FileNotFoundError, match="--only saliency"):
        ds.saliency(0)


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationClassAug", "saliency_map"])
@pytest.mark.parametrize("spoil", ["cut", "text", "pixels", "notes"])
def test_damaged_files_are_named(tree, folder, spoil, monkeypatch):
    ds = VOC2012(tree, "train")
    read = {"JPEGImages": ds.image, "SegmentationClassAug": ds.mask, "saliency_map": ds.saliency}[folder]
    read(2)
    (path,) = (tree / folder).glob(f"{ds.names[3]}.*")
    content, message = path.read_bytes(), "can't be read"
    if spoil == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif spoil == "text":
        path.write_bytes(b"<html>not found</html>")
    elif spoil == "pixels":  # a DecompressionBombError
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
        message = "is too large to be read"
    else:  # a ValueError of Pillow's
        notes = PngInfo()
        notes.add_text("note", "x" * 2_000_000, zip=True)
        Image.new("L", (8, 8)).save(path, "PNG", pnginfo=notes)
    with pytest.raises(ValueError, match=rf"{ds.names[3]}\.\w+ {message}"):
        read(3)


@pytest.mark.parametrize("values", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_refused(tree, values):
    ds = VOC2012(tree, "train")
    path = tree / "JPEGImages" / f"{ds.names[0]}.jpg"
    Image.fromarray(np.eye(8).astype(values)).save(path, "TIFF")
    with pytest.raises(ValueError, match=f"{path.name} has mode [IF].*Save it with 8 bits"):
        ds.image(0)


def write_indexed(path, values, palette):
    image = Image.fromarray(values)
    image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path)


@pytest.fixture
def first(tree):
    """A data set to spoil, the path of its first mask, and what is in it."""
    ds = VOC2012(tree, "train")
    return ds, tree / "SegmentationClassAug" / f"{ds.names[0]}.png", ds.mask(0)


def test_masks_and_saliency_of_other_kinds(first):
    ds, path, mask = first
    for values, message in (
        (voc_palette()[mask], "has mode RGB: expected 8-bit greyscale"),
        (mask[1:], "same data set"),
    ):
        Image.fromarray(values).save(ds.root / "saliency_map" / path.name)
        with pytest.raises(ValueError, match=message):
            ds.saliency(0)
    Image.fromarray(mask).save(path)
    assert Image.open(path).mode == "L"
    np.testing.assert_array_equal(ds.mask(0), mask)
    Image.fromarray(voc_palette()[mask]).save(path)
    with pytest.raises(ValueError, match=f"{path.name} has mode RGB: expected class numbers"):
        ds.mask(0)
    save_indexed_png(path, np.where(mask == 1, 21, mask))
    with pytest.raises(ValueError, match=f"{path.name}.*value 21"):
        ds.mask(0)
    save_indexed_png(path, mask[:-1])
    with pytest.raises(ValueError, match="same data set"):
        ds.mask(0)


def test_a_mask_with_a_palette_of_another_order_is_refused(first):
    ds, path, mask = first
    order = np.arange(256)
    order[[1, 15]] = 15, 1  # person's colour for value 1, which is aeroplane's in VOC
    write_indexed(path, mask, voc_palette()[order])
    with pytest.raises(ValueError, match=rf"{path.name} .*1 is \(192, 128, 128\) and not \(128, 0, 0\)"):
        ds.mask(0)
    # What the message advises.
    save_indexed_png(path, np.array(Image.open(path)))
    np.testing.assert_array_equal(ds.mask(0), mask)


def test_palettes_that_say_nothing_are_read_by_their_values(first):
    ds, path, mask = first
    colours = np.random.default_rng(0).integers(0, 256, (256, 3))
    unused = voc_palette()
    unused[2:255] = colours[2:255]  # the mask has 0, 1 and 255
    for palette in (np.arange(256).repeat(3), unused, voc_palette()):
        write_indexed(path, mask, palette)
        np.testing.assert_array_equal(ds.mask(0), mask)
    write_indexed(path, mask, colours)
    with pytest.raises(ValueError, match="another palette"):
        ds.mask(0)
    # VOC's colours are for VOC's classes.
    (ds.root / "classes.txt").write_text("\n".join(f"kind {i}" for i in range(20)), encoding="utf-8")
    np.testing.assert_array_equal(VOC2012(ds.root, "train").mask(0), mask)


def test_saliency_stored_as_0_and_1_is_refused(tree):
    ds = VOC2012(tree, "train")
    paths = [tree / "saliency_map" / f"{name}.png" for name in ds.names]
    kept = np.array(Image.open(paths[0]))

    def save(most):
        for path in paths:
            Image.fromarray((np.array(Image.open(path)) > 0) * np.uint8(most)).save(path)

    save(1)
    for read in (ds.require_saliency, lambda: ds.saliency(2)):
        with pytest.raises(ValueError, match=r"\d\.png goes from 0 to 1 of 255.*multiply them by 255"):
            read()
    # One such map among others is a detector that found next to nothing; so is a black one.
    Image.fromarray(kept).save(paths[0])
    ds.require_saliency()
    assert ds.saliency(2).max() == 1
    save(0)
    ds.require_saliency()
    assert ds.saliency(2).max() == 0


def test_indexed_png_is_what_the_evaluation_server_takes(tmp_path):
    labels = np.array([[0, 1, 20], [255, 15, 7]], np.int64)
    save_indexed_png(tmp_path / "a.png", labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), labels)
        np.testing.assert_array_equal(np.array(image.convert("RGB")), voc_palette()[labels])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    for bad in (labels.astype(np.float32), labels[None], labels - 1, labels + 1):
        with pytest.raises(ValueError, match="label map"):
            save_indexed_png(tmp_path / "b.png", bad)
    assert not (tmp_path / "b.png").exists()


def test_fingerprint_follows_the_content(tree, tmp_path):
    first = VOC2012(tree, "train").fingerprint
    shutil.copytree(tree, tmp_path / "copy" / "VOC2012", copy_function=shutil.copyfile)
    for same in (without_masks(VOC2012(tree, "train")), VOC2012(tmp_path / "copy", "train")):
        assert same.fingerprint == first
    others = [VOC2012(tree, "val").fingerprint, VOC2012(tree, "train", labels="none").fingerprint]
    without = VOC2012(tree, "train").fingerprint_without_saliency
    (tree / "saliency_map" / "2007_000007.png").unlink()  # of val
    assert VOC2012(tree, "train").fingerprint == first
    for path, saliency in ((tree / "saliency_map" / "2007_000002.png", True),
                           (tree / "SegmentationClassAug" / "2007_000002.png", False)):  # fmt: skip
        Image.fromarray(np.roll(np.array(Image.open(path)), 1)).save(path)
        after = VOC2012(tree, "train")
        others.append(after.fingerprint)
        assert (after.fingerprint_without_saliency == without) == saliency
    path = tree / "ImageSets/Segmentation/train.txt"
    path.write_text("\n".join(read_list(path)[::-1]), encoding="utf-8")
    others.append(VOC2012(tree, "train").fingerprint)
    assert len({first, *others}) == 6


def test_without_masks_gives_no_way_to_a_mask(voc_tree):
    for ds in (VOC2012(voc_tree, "train"), TinyDataset(forbid_masks=True)):
        weak = without_masks(ds)
        with pytest.raises(MaskAccessError, match="scoring only"):
            weak.mask(0)
        for name in {*dir(type(weak)), *dir(ds), "_dataset", "_labels", "__dict__", "dataset"} - {"mask"}:
            value = getattr(weak, name, None)
            for found in (value, getattr(value, "__self__", None)):
                assert not isinstance(found, (VOC2012, TinyDataset))
        with pytest.raises(AttributeError):
            weak._dataset = None
        assert without_masks(weak) is weak


def test_without_masks_is_the_same_otherwise(voc_tree):
    for ds in (VOC2012(voc_tree, "train"), TinyDataset()):
        weak = without_masks(ds)
        assert (len(weak), weak.names, weak.classes) == (len(ds), ds.names, ds.classes)
        assert (weak.num_classes, weak.fingerprint, weak.split) == (ds.num_classes, ds.fingerprint, "train")
        worker = DataLoader(weak, batch_size=None, num_workers=1)
        for i, items in enumerate(zip(ds, weak, worker, strict=True)):
            for image, labels in items[1:]:
                assert torch.equal(image, items[0][0]) and torch.equal(labels, items[0][1])
            np.testing.assert_array_equal(ds.saliency(i), weak.saliency(i))
        with pytest.raises(IndexError):
            weak[len(ds)]


def test_without_masks_opens_no_mask_file_afterwards(tree):
    weak = without_masks(VOC2012(tree, "train"))
    labels = [label for _, label in weak]
    shutil.rmtree(tree / "SegmentationClassAug")
    shutil.rmtree(tree / "SegmentationClass")
    assert all(torch.equal(a, b) for a, (_, b) in zip(labels, weak, strict=True))


def test_the_data_folder_is_only_read(tree):
    before = sorted((str(p), p.stat().st_mtime_ns) for p in Path(tree).rglob("*"))
    ds = VOC2012(tree, "train")
    without_masks(ds)
    ds[0], ds.mask(0), ds.saliency(0), ds.fingerprint
    assert sorted((str(p), p.stat().st_mtime_ns) for p in Path(tree).rglob("*")) == before


def test_other_saliency_maps_are_other_data_for_labels_alone(tmp_path):
    tree = write_voc_tree(tmp_path)

    def keys():
        open_data.cache_clear()
        line = Pipeline("voc", "ci", voc_root=tmp_path, store=tmp_path / "runs")
        stages = line.stages(Configuration(refine=True), ("miou", "accuracy"))
        return {stage.name: stage.key for stage in stages}

    before = keys()
    for path in (tree / "saliency_map").glob("*.png"):
        Image.fromarray(255 - np.array(Image.open(path))[:, ::-1] // 2).save(path)
    after = keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"labels", "segment", "evaluate"} and {"classify", "target", "refine"} <= set(before)
    shutil.rmtree(tree / "saliency_map")
    open_data.cache_clear()
    with pytest.raises(FileNotFoundError, match="--only saliency"):  # before anything is trained
        Pipeline("voc", "ci", voc_root=tmp_path, store=tmp_path / "runs")
