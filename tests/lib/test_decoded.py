import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from conftest import TinyDataset, write_voc_tree
from drs_course.store import StoreError
from drs_lib.data import VOC2012, Critters, MaskAccessError, Packed, pack, without_masks
from drs_lib.data.decoded import decoded
from drs_lib.maps import _Inputs


@pytest.fixture
def tree(tmp_path):
    """A tree of one's own, to spoil."""
    return write_voc_tree(tmp_path)


def arrays():
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 256, shape).astype(np.uint8) for shape in ((3, 5, 7), (4, 6), (2, 0, 3), (9, 2, 2))
    ]


def assert_same(packed, expected):
    assert len(packed) == len(expected)
    assert packed.shapes == [tuple(array.shape) for array in expected]
    assert packed.nbytes == sum(array.size for array in expected)
    for ours, theirs in zip(packed, expected, strict=True):
        assert ours.dtype == torch.uint8
        np.testing.assert_array_equal(ours.cpu().numpy(), theirs)


def files(folder):
    return sorted(path.name for path in folder.glob("*"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_packed_arrays_come_back(tmp_path, on_disk):
    expected = arrays()
    expected[1].flags.writeable = False
    items = iter([torch.from_numpy(expected[0]), expected[1], expected[2], expected[3].transpose(1, 2, 0)])
    expected[3] = expected[3].transpose(1, 2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = pack(items, 4, tmp_path / "some.pack" if on_disk else None, {"of": "arrays"})
        assert_same(packed, expected)
    assert packed.notes == {"of": "arrays"}
    assert torch.equal(packed[-1], packed[3])
    for index in (4, -5):
        with pytest.raises(IndexError):
            packed[index]
    assert packed.to("cpu") is packed
    assert_same(pickle.loads(pickle.dumps(packed)), expected)


def test_items_are_views():
    packed = pack(arrays(), 4)
    packed[1][0, 0] = 77
    assert packed[1][0, 0] == 77 and packed.flat[3 * 5 * 7] == 77
    assert packed[0].data_ptr() == packed.flat.data_ptr()


@pytest.mark.parametrize("on_disk", [False, True])
def test_nothing_can_be_packed(tmp_path, on_disk):
    packed = pack([], 0, tmp_path / "none" if on_disk else None)
    assert len(packed) == packed.nbytes == 0 and list(packed) == []


def test_a_write_does_not_reach_the_file(tmp_path):
    path, expected = tmp_path / "some.pack", arrays()
    packed = pack(expected, 4, path)
    before = path.read_bytes()
    packed[0].zero_()
    assert not packed[0].any()
    del packed
    assert path.read_bytes() == before
    assert_same(Packed.open(path), expected)


def test_a_mapped_file_travels_by_its_name(tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (3, 200, 300)).astype(np.uint8)
    packed = pack([array], 1, tmp_path / "some.pack")
    assert len(pickle.dumps(packed)) < 1000 < len(pickle.dumps(pack([array], 1))) < 1.1 * array.size


def test_another_device_is_a_copy():
    packed = pack(arrays(), 4, notes={"a": 1})
    there = packed.to("meta")
    assert there.flat.is_meta and there.shapes == packed.shapes and there.notes == packed.notes
    assert there[1].shape == (4, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packed_on_a_gpu_and_pinned():
    packed = pack(arrays(), 4)
    assert_same(packed.to("cuda"), arrays())
    assert packed.to("cuda").flat.is_cuda
    pinned = packed.pin_memory()
    assert pinned.flat.is_pinned()
    assert_same(pinned, arrays())


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("items", "count", "message"),
    [
        ([np.zeros(3)], 1, "item 0 is float64"),
        ([np.zeros(3, np.uint8), torch.zeros(2)], 2, "item 1 is float32"),
        ([np.zeros(3, np.uint8)], 2, "1 items to pack, expected 2"),
        ([np.zeros(3, np.uint8)] * 3, 2, "3 items to pack, expected 2"),
    ],
)
def test_bad_items_leave_no_file(tmp_path, on_disk, items, count, message):
    with pytest.raises(ValueError, match=message):
        pack(items, count, tmp_path / "some.pack" if on_disk else None)
    assert files(tmp_path) == []


def test_tensors_and_shapes_have_to_agree():
    with pytest.raises(ValueError, match="12 bytes"):
        Packed(torch.zeros(11, dtype=torch.uint8), [(3, 4)], {})
    with pytest.raises(ValueError, match="float32"):
        Packed(torch.zeros(12), [(3, 4)], {})


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "some.pack"
    pack(arrays(), 4, path)
    whole = path.read_bytes()
    index = whole.index(b'{"shapes"')
    for damaged in (
        b"",
        bytes([whole[0] ^ 255]) + whole[1:],
        whole[:5],
        whole[:-1],
        whole[: len(whole) // 2],
        whole[1:],
        whole[:index] + b"x" + whole[index:],
        whole[:index] + whole[index:].replace(b"[3,5,7]", b"[3,5,8]"),
        whole[:index] + whole[index:].replace(b'"notes"', b'"nodes"'),
        np.random.default_rng(0).bytes(3000),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"some.pack is cut off.*{len(damaged)} bytes.*made again"):
            Packed.open(path)
    with pytest.raises(FileNotFoundError):
        Packed.open(tmp_path / "other.pack")


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield np.zeros((3, 100, 100), np.uint8)

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        StoreError, match=r"100 packed arrays take about 3,000,000 bytes.*1,000,000 are free"
    ) as e:
        pack(items(), 100, tmp_path / "some.pack")
    assert str(tmp_path) in str(e.value) and len(made) < 20 and files(tmp_path) == []
    assert len(pack(itertools.islice(items(), 33), 33, tmp_path / "some.pack")) == 33


def test_a_disk_that_gets_full_is_named(tmp_path):
    def items():
        yield np.zeros(5, np.uint8)
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="5 bytes of packed arrays were written.*free"):
        pack(items(), 2, tmp_path / "some.pack")
    assert files(tmp_path) == []


def assert_decoded(result, dataset, resize=None):
    """That a decoded data set answers as its own does."""
    assert len(result) == len(dataset) == len(result.packed)
    for name in ("names", "classes", "num_classes", "split"):
        assert getattr(result, name) == getattr(dataset, name)
    inputs = _Inputs(dataset, resize)
    for i in range(len(dataset)):
        image, labels = result[i]
        _, expected, expected_labels, own = inputs[i]
        assert torch.equal(image, expected) and image.dtype == torch.uint8
        assert torch.equal(labels, expected_labels) and labels.dtype == torch.float32
        assert tuple(result.sizes[i]) == own and torch.equal(result.packed[i], expected)
        np.testing.assert_array_equal(result.saliency(i), dataset.saliency(i))
    with pytest.raises(IndexError):
        result[len(dataset)]


@pytest.mark.parametrize("resize", [None, 32])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
def test_decoded_is_the_same_data(voc_tree, tmp_path, resize, on_disk, guarded):
    for dataset in (VOC2012(voc_tree, "train"), TinyDataset(forbid_masks=guarded)):
        dataset = without_masks(dataset) if guarded else dataset
        cache = tmp_path / "cache" if on_disk else None
        for _ in range(2 if on_disk else 1):  # made, then found
            result = decoded(dataset, cache, resize)
            assert_decoded(result, dataset, resize)
            assert_decoded(pickle.loads(pickle.dumps(result)), dataset, resize)
            assert (result.fingerprint == dataset.fingerprint) == (resize is None)
            assert (result.packed.path is not None) == on_disk
    assert len(files(tmp_path / "cache")) == (2 if on_disk else 0)


def test_the_rest_is_the_data_sets_own(voc_tree):
    dataset = VOC2012(voc_tree, "train")
    result = decoded(dataset)
    assert torch.equal(result.image_labels(), dataset.image_labels())
    np.testing.assert_array_equal(result.mask(1), dataset.mask(1))
    assert result.root == dataset.root and torch.equal(result.image(2), dataset.image(2))
    with pytest.raises(AttributeError):
        _ = result.no_such_name
    assert decoded(result) is result and repr(dataset) in repr(result)
    assert_decoded(decoded(result, resize=16), dataset, 16)


def test_labels_stay_as_they_are(voc_tree):
    result = decoded(TinyDataset())
    result[0][1].zero_()
    result.image_labels().zero_()
    assert result[0][1].any()
    assert decoded(VOC2012(voc_tree, "train", labels="none"))[0][1].isnan().all()


def test_no_mask_comes_back_by_decoding(voc_tree, tmp_path):
    dataset = VOC2012(voc_tree, "train")
    for weak in (
        decoded(without_masks(dataset)),
        decoded(without_masks(dataset), tmp_path),
        without_masks(decoded(dataset, tmp_path)),
        decoded(without_masks(decoded(dataset))),
    ):
        assert type(weak) is type(without_masks(dataset)) and without_masks(weak) is weak
        with pytest.raises(MaskAccessError):
            weak.mask(0)
        for name in ("_dataset", "root", "image", "label", "resize"):
            with pytest.raises(AttributeError):
                getattr(weak, name)
        assert_decoded(weak, dataset)
        for thing in (weak.packed, weak.sizes):
            values = vars(thing).values() if isinstance(thing, Packed) else thing
            assert not any(hasattr(value, "mask") for value in values)
    assert not hasattr(without_masks(dataset), "packed")


def test_masks_are_not_opened_afterwards(tree, tmp_path):
    weak = without_masks(VOC2012(tree, "train"))
    shutil.rmtree(tree / "SegmentationClassAug")
    assert_decoded(decoded(weak, tmp_path / "cache"), weak)


def test_a_second_call_decodes_next_to_nothing(voc_tree, tmp_path, monkeypatch):
    decoded(VOC2012(voc_tree, "trainval"), tmp_path)
    opened = []
    image = VOC2012.image
    monkeypatch.setattr(VOC2012, "image", lambda self, index: opened.append(index) or image(self, index))
    monkeypatch.setattr(VOC2012, "mask", lambda self, index: pytest.fail("a mask was opened"))
    result = decoded(VOC2012(voc_tree, "trainval"), tmp_path)
    assert sorted(opened) == [0, 4, 8]
    assert all(len(labels) == 20 for _, labels in result) and len(opened) == 3


def test_critters_are_not_written(tmp_path):
    dataset = Critters("train", size=32, length=3)
    result = decoded(dataset, tmp_path / "cache")
    assert result.packed.path is None and not (tmp_path / "cache").exists()
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(result[i], dataset[i], strict=True))
    assert result.heads(1) == dataset.heads(1)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_made_again(voc_tree, tmp_path, damage):
    dataset = VOC2012(voc_tree, "train")
    decoded(dataset, tmp_path)
    (name,) = files(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    if damage == "other":
        path.write_bytes(whole[:256] + bytes([whole[256] ^ 255]) + whole[257:])
    else:
        path.write_bytes(whole[: 2000 if damage == "cut" else 0])
    with pytest.warns(UserWarning, match="decoding the images again") as caught:
        assert_decoded(decoded(dataset, tmp_path), dataset)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert path.read_bytes() == whole and files(tmp_path) == [name]


def test_a_fingerprint_alone_is_not_believed(tmp_path):
    """A data set that paints over another's images and keeps its name gets its own images."""
    dataset, other = TinyDataset(), TinyDataset()
    other.images = 255 - other.images
    decoded(dataset, tmp_path)
    with pytest.warns(UserWarning, match="tiny_0_000 is another one there"):
        assert_decoded(decoded(other, tmp_path), other)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_image_leaves_no_file(tree, tmp_path, workers):
    dataset = VOC2012(tree, "train")
    path = tree / "JPEGImages" / f"{dataset.names[4]}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    threads = threading.active_count()
    with pytest.raises(ValueError, match=f"{dataset.names[4]}.jpg can't be read"):
        decoded(dataset, tmp_path / "cache", workers=workers)
    assert files(tmp_path / "cache") == [] and threading.active_count() == threads


def test_other_images_are_refused(tmp_path):
    dataset = TinyDataset()
    dataset.images = dataset.images[..., :1]
    with pytest.raises(ValueError, match=r"tiny_0_000 is torch.uint8 \(1, 64, 64\)"):
        decoded(dataset, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("arguments", [{"resize": 0}, {"resize": 3.5}, {"workers": 0}, {"resize": True}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        decoded(TinyDataset(), **arguments)


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="can't be kept in .*file.*cache_dir"):
        decoded(TinyDataset(), tmp_path / "file")


def test_no_room_for_the_images(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="20 packed arrays take about 61,440 bytes"):
        decoded(TinyDataset(20, size=32), tmp_path)
    assert files(tmp_path) == []


def test_what_a_killed_process_left_goes(tmp_path):
    decoded(TinyDataset(), tmp_path)
    (name,) = files(tmp_path)
    (tmp_path / name).unlink()
    old, fresh = tmp_path / f".{name}.old", tmp_path / f".{name}.fresh"
    old.touch()
    fresh.touch()
    os.utime(old, (1, 1))
    decoded(TinyDataset(), tmp_path)
    assert files(tmp_path) == sorted([name, fresh.name])


def test_an_unfinished_file_may_be_finished_meanwhile(tmp_path, monkeypatch):
    """Between the look into the folder and the look at the file."""
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda path, pattern: [*glob(path, pattern), path / pattern.replace("*", "gone")]
    )
    assert_decoded(decoded(TinyDataset(), tmp_path), TinyDataset())


def _make(root, folder, start, queue):
    torch.set_num_threads(1)
    dataset = VOC2012(root, "train")
    made, image = [], VOC2012.image
    VOC2012.image = lambda self, index: made.append(index) or image(self, index)
    start.wait()
    result = decoded(dataset, folder, resize=64)
    queue.put((len(made), int(result.packed.flat.sum(dtype=torch.int64))))


def test_two_processes_make_one_file(voc_tree, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, start = context.Queue(), context.Barrier(2)
    workers = [context.Process(target=_make, args=(voc_tree, tmp_path, start, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    made, sums = zip(*(queue.get(timeout=300) for _ in workers), strict=True)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(set(sums)) == 1 and len(files(tmp_path)) == 1
    assert set(made) <= {3, 6}  # 3: the other's file was there already, and three images were compared


def test_a_file_that_another_process_made_meanwhile_is_taken(tmp_path, monkeypatch):
    """On Windows, where a file that is mapped can't be replaced."""

    def replace(source, target):
        shutil.copyfile(source, target)
        raise PermissionError(13, "The file is in use", target)

    monkeypatch.setattr(os, "replace", replace)
    dataset = TinyDataset()
    assert_decoded(decoded(dataset, tmp_path), dataset)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("on_disk", [False, True])
def test_workers_read_the_same(voc_tree, tmp_path, on_disk):
    weak = decoded(without_masks(VOC2012(voc_tree, "train")), tmp_path if on_disk else None)
    loader = DataLoader(weak, batch_size=None, num_workers=1)
    for (image, label), (expected_image, expected_label) in zip(loader, weak, strict=True):
        assert torch.equal(image, expected_image) and torch.equal(label, expected_label)


def test_other_programs_can_read_the_file(voc_tree, tmp_path):
    dataset = VOC2012(voc_tree, "train")
    decoded(dataset, tmp_path, resize=20)
    (name,) = files(tmp_path)
    content = load_file(tmp_path / name)
    index = json.loads(content["index"].numpy().tobytes())
    assert index["shapes"] == [[3, 20, 20]] * 6 and index["notes"]["resize"] == 20
    assert index["notes"]["labels"] == dataset.image_labels().tolist()
    assert torch.equal(content["arrays"], decoded(dataset, resize=20).packed.flat)
