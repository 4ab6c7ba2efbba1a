import os
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TinyDataset

from drs_course.export import _components, export_voc
from drs_lib.data import VOC2012


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    splits = {"train": TinyDataset(6), "val": TinyDataset(4, seed=1)}
    root = tmp_path_factory.mktemp("exported")
    return splits, export_voc(splits, root, progress=False)


def test_voc2012_reads_back_what_was_written(exported):
    splits, tree = exported
    for split, source in splits.items():
        ds = VOC2012(tree.parent, split)
        assert (ds.classes, ds.names, len(ds)) == (source.classes, source.names, len(source))
        for i in range(len(ds)):
            np.testing.assert_array_equal(ds.mask(i), source.mask(i))
            np.testing.assert_array_equal(ds.saliency(i), source.saliency(i))
            assert torch.equal(ds[i][1], source[i][1])
            difference = (ds[i][0].float() - source[i][0].float()).abs()
            assert difference.mean() < 4 and ds[i][0].shape == source[i][0].shape


def test_lists_formats_and_leftovers(exported):
    splits, tree = exported
    assert len(VOC2012(tree, "trainaug")) == 6 and len(VOC2012(tree, "trainval")) == 10
    assert sorted(os.listdir(tree.parent)) == ["VOC2012"]
    name = splits["train"].names[0]
    with Image.open(tree / "JPEGImages" / f"{name}.jpg") as image:
        assert image.mode == "RGB" and all(layer[1:3] == (1, 1) for layer in image.layer)
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        assert Image.open(tree / folder / f"{name}.png").mode == "P"
    assert Image.open(tree / "saliency_map" / f"{name}.png").mode == "L"


def test_parts_touch_at_corners_too_and_may_be_winding():
    picture = """
        #..####
        .#....#
        ....#.#
        #...###
        """.split()
    boxes = [(0, 0, 1, 1), (0, 3, 3, 6), (3, 0, 3, 0)]
    assert _components(np.array([[pixel == "#" for pixel in row] for row in picture])) == boxes
    assert _components(np.zeros((3, 3), bool)) == []


def test_annotation_boxes_count_from_one(exported):
    splits, tree = exported
    for i, name in enumerate(splits["train"].names):
        mask = splits["train"].mask(i)
        root = ElementTree.parse(tree / "Annotations" / f"{name}.xml").getroot()
        assert root.findtext("size/width") == "64" and root.findtext("size/depth") == "3"
        boxes = []
        for item in root.findall("object"):
            x0, y0, x1, y1 = (int(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append((item.findtext("name"), (y0 - 1, x0 - 1, y1 - 1, x1 - 1)))
        found = {v: np.argwhere(mask == v) for v in np.unique(mask[mask > 0])}
        expected = [(TinyDataset.classes[v - 1], (*yx.min(0), *yx.max(0))) for v, yx in found.items()]
        assert boxes == expected and boxes


def test_equal_names_get_the_split_in_front(tmp_path):
    tree = export_voc({"train": TinyDataset(2), "val": TinyDataset(2)}, tmp_path, progress=False)
    assert VOC2012(tree, "val").names == ["val_tiny_0_000", "val_tiny_0_001"]
    assert len(os.listdir(tree / "JPEGImages")) == 4


def test_existing_tree_is_left_alone(exported):
    splits, tree = exported
    before = sorted(os.listdir(tree / "JPEGImages"))
    with pytest.raises(FileExistsError, match="VOC2012 exists"):
        export_voc({"train": TinyDataset(1, seed=5)}, tree.parent, progress=False)
    assert sorted(os.listdir(tree / "JPEGImages")) == before


def test_a_failure_leaves_nothing(tmp_path):
    class Breaks(TinyDataset):
        def saliency(self, index):
            if index == 2:
                raise OSError("no more")
            return super().saliency(index)

    with pytest.raises(OSError, match="no more"):
        export_voc({"train": Breaks()}, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_are_not_the_masks_are_refused(tmp_path):
    class AllClasses(TinyDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], torch.ones(3)

    dataset = AllClasses(2)
    dataset.masks[1][dataset.masks[1] > 0] = 255
    with pytest.raises(ValueError, match=r"labels \[1, 2, 3\], but the mask has"):
        export_voc({"train": dataset}, tmp_path, progress=False)


@pytest.mark.parametrize("name", ["../up", "a b", "a:b", ""])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    ds = TinyDataset(2)
    ds.names = ["fine", name]
    with pytest.raises(ValueError, match="fit for files"):
        export_voc({"train": ds}, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_or_different_classes_are_refused(tmp_path):
    other = TinyDataset(1)
    other.classes = ("a", "b", "c")
    for splits, message in (({}, "nothing to export"), ({"train": TinyDataset(0)}, "nothing to export"),
                            ({"train": TinyDataset(1), "val": other}, "different classes")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            export_voc(splits, tmp_path, progress=False)
