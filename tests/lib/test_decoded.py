import json
import multiprocessing
import os
import pickle
import shutil
import threading
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyDataset, write_voc_tree
from torch.utils.data import DataLoader

from drs_course.store import StoreError
from drs_lib.data import VOC2012, Critters, MaskAccessError, Packed, pack, without_masks
from drs_lib.data.decoded import decoded
from drs_lib.maps import _Inputs

on_disk_or_not = pytest.mark.parametrize("on_disk", [False, True])


def arrays():
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 256, shape).astype(np.uint8) for shape in ((3, 5, 7), (4, 6), (2, 0, 3), (9, 2, 2))
    ]


def assert_same(packed, expected):
    assert packed.shapes == [tuple(array.shape) for array in expected]
    assert packed.nbytes == sum(array.size for array in expected)
    for ours, theirs in zip(packed, expected, strict=True):
        assert ours.dtype == torch.uint8
        np.testing.assert_array_equal(ours.cpu().numpy(), theirs)


def files(folder):
    return sorted(path.name for path in folder.glob("*"))


@on_disk_or_not
def test_packed_arrays_come_back(tmp_path, on_disk):
    expected = arrays()
    expected[1].flags.writeable = False
    expected[3] = expected[3].transpose(1, 2, 0)
    items = iter([torch.from_numpy(expected[0]), *expected[1:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = pack(items, 4, tmp_path / "some.pack" if on_disk else None, {"of": "arrays"})
        assert_same(packed, expected)
    assert packed.notes == {"of": "arrays"} and torch.equal(packed[-1], packed[3])
    for index in (4, -5):
        with pytest.raises(IndexError):
            packed[index]
    assert_same(pickle.loads(pickle.dumps(packed)), expected)
    none = pack([], 0, tmp_path / "none" if on_disk else None)
    assert len(none) == none.nbytes == 0 and list(none) == []


def test_items_are_views_and_a_write_does_not_reach_the_file(tmp_path):
    path, expected = tmp_path / "some.pack", arrays()
    packed = pack(expected, 4, path)
    before = path.read_bytes()
    packed[0].zero_()
    packed[1][0, 0] = 77
    assert not packed[0].any() and packed[1][0, 0] == 77 and packed.flat[3 * 5 * 7] == 77
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
    there, pinned = packed.to("cuda"), packed.pin_memory()
    assert there.flat.is_cuda and pinned.flat.is_pinned()
    assert_same(there, arrays())
    assert_same(pinned, arrays())


@on_disk_or_not
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
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    items = (np.zeros((3, 100, 100), np.uint8) for _ in range(100))
    with pytest.raises(StoreError, match=r"100 packed arrays take about 3,000,000.*1,000,000 are free") as e:
        pack(items, 100, tmp_path / "some.pack")
    assert str(tmp_path) in str(e.value) and len([*items]) > 80 and files(tmp_path) == []
    assert len(pack([np.zeros((3, 100, 100), np.uint8)] * 33, 33, tmp_path / "some.pack")) == 33
    with pytest.raises(StoreError, match="100 packed arrays take about 1,228,800 bytes"):
        decoded(TinyDataset(100), tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_disk_that_gets_full_is_named(tmp_path):
    def items():
        yield np.zeros(5, np.uint8)
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="5 bytes of packed arrays were written.*free"):
        pack(items(), 2, tmp_path / "some.pack")
    assert files(tmp_path) == []


def assert_decoded(result, dataset, resize=None):
    """That a decoded data set answers as its own does, without masks."""
    assert len(result) == len(dataset) == len(result.packed)
    for name in ("names", "classes", "num_classes", "split"):
        assert getattr(result, name) == getattr(dataset, name)
    assert (result.fingerprint == dataset.fingerprint) == (resize is None)
    inputs = _Inputs(dataset, resize)
    for i in range(len(dataset)):
        image, labels = result[i]
        _, expected, expected_labels, _ = inputs[i]
        assert torch.equal(image, expected) and torch.equal(result.packed[i], expected)
        assert torch.equal(labels, expected_labels) and labels.dtype == torch.float32
        np.testing.assert_array_equal(result.saliency(i), dataset.saliency(i))
    with pytest.raises(IndexError):
        result[len(dataset)]
    with pytest.raises(MaskAccessError):
        result.mask(0)
    assert without_masks(result) is decoded(result) is result and "packed" in dir(result)


@pytest.mark.parametrize("resize", [None, 32])
@on_disk_or_not
@pytest.mark.parametrize("guarded", [False, True])
def test_decoded_is_the_same_data_without_masks(voc_tree, tmp_path, resize, on_disk, guarded):
    for dataset in (VOC2012(voc_tree, "train"), TinyDataset(forbid_masks=True)):
        dataset = without_masks(dataset) if guarded else dataset
        cache = tmp_path / "cache" if on_disk else None
        for _ in range(2 if on_disk else 1):  # made, then found
            result = decoded(dataset, cache, resize)
            assert_decoded(result, dataset, resize)
            assert_decoded(pickle.loads(pickle.dumps(result)), dataset, resize)
            assert (result.packed.path is not None) == on_disk
        for name in ("_dataset", "root", "image", "label", "resize"):
            with pytest.raises(AttributeError):
                getattr(result, name)
        assert not any(hasattr(value, "mask") for value in vars(result.packed).values())
    assert len(files(tmp_path / "cache")) == (2 if on_disk else 0)
    assert not hasattr(without_masks(dataset), "packed")


def test_labels_stay_as_they_are(voc_tree):
    result = decoded(TinyDataset())
    result[0][1].zero_()
    assert result[0][1].any()
    assert decoded(VOC2012(voc_tree, "train", labels="none"))[0][1].isnan().all()


def test_a_second_call_decodes_next_to_nothing_and_opens_no_mask(tmp_path, monkeypatch):
    tree = write_voc_tree(tmp_path)
    weak = without_masks(VOC2012(tree, "trainval"))
    shutil.rmtree(tree / "SegmentationClassAug")
    decoded(weak, tmp_path / "cache")
    opened, image = [], VOC2012.image
    monkeypatch.setattr(VOC2012, "image", lambda self, index: opened.append(index) or image(self, index))
    result = decoded(weak, tmp_path / "cache")
    assert sorted(opened) == [0, 4, 8]
    assert all(len(labels) == 20 for _, labels in result) and len(opened) == 3


def test_critters_are_not_written(tmp_path):
    dataset = Critters("train", size=32, length=3)
    result = decoded(dataset, tmp_path / "cache")
    assert result.packed.path is None and not (tmp_path / "cache").exists()
    assert_decoded(result, dataset)


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
    with pytest.warns(UserWarning, match="tiny_0_.* is another one there"):
        assert_decoded(decoded(other, tmp_path), other)


def test_a_damaged_image_leaves_no_file(tmp_path):
    dataset = VOC2012(write_voc_tree(tmp_path), "train")
    path = dataset.root / "JPEGImages" / f"{dataset.names[4]}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    threads = threading.active_count()
    with pytest.raises(ValueError, match=f"{dataset.names[4]}.jpg can't be read"):
        decoded(dataset, tmp_path / "cache")
    assert files(tmp_path / "cache") == [] and threading.active_count() == threads


def test_other_images_are_refused(tmp_path):
    dataset = TinyDataset()
    dataset.images = dataset.images[..., :1]
    with pytest.raises(ValueError, match=r"tiny_0_000 is torch.uint8 \(1, 64, 64\)"):
        decoded(dataset, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("resize", [0, 3.5, True])
def test_bad_sizes_are_refused(resize):
    with pytest.raises(ValueError, match="resize"):
        decoded(TinyDataset(), resize=resize)


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="can't be kept in .*file.*cache_dir"):
        decoded(TinyDataset(), tmp_path / "file")


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


@on_disk_or_not
def test_workers_read_the_same(voc_tree, tmp_path, on_disk):
    weak = decoded(VOC2012(voc_tree, "train"), tmp_path if on_disk else None)
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
