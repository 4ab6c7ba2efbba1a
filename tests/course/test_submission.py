"""The archive for VOC's evaluation server: what is in it, read back by its own reader and by plain tools."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from drs_course.submission import read_submission, write_submission
from drs_lib.data.voc import voc_palette


def segmentations(count=3):
    rng = np.random.default_rng(0)
    return {f"2008_{k:06d}": rng.integers(0, 21, (20 + k, 31)).astype(np.uint8) for k in range(count)}


@pytest.mark.parametrize("split", ["test", "val"])
def test_what_is_written_is_read_back_and_the_server_finds_indexed_pngs_in_voc_s_colours(tmp_path, split):
    path, labels = tmp_path / "results.tgz", segmentations()
    pairs = ((name, values.astype(np.int64)) for name, values in labels.items())
    assert write_submission(path, pairs, split) == 3
    found = read_submission(path)
    assert found.keys() == labels.keys()
    for name, expected in labels.items():
        assert found[name].dtype == np.uint8
        np.testing.assert_array_equal(found[name], expected)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "results" / "VOC2012" / "Segmentation" / f"comp6_{split}_cls"
    assert sorted(file.stem for file in folder.iterdir()) == sorted(labels)
    with Image.open(folder / "2008_000001.png") as image:
        assert image.mode == "P" and image.size == (31, 21)
        palette = np.array(image.getpalette()).reshape(-1, 3)
        np.testing.assert_array_equal(palette[:21], voc_palette()[:21])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((4, 4), 255, np.uint8), "holds 255 to 255.*network's prediction"),
        (np.full((4, 4), -1), "holds -1 to -1"),
        (np.zeros((4, 4)), "float64"),
        (np.zeros((1, 4, 4), np.uint8), r"\(1, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
    ],
)
def test_what_the_server_would_not_take_is_refused_and_nothing_is_left(bad, message, tmp_path):
    good = segmentations(1)
    with pytest.raises(ValueError, match=f"2009_000001.*{message}"):
        write_submission(tmp_path / "results.tgz", [*good.items(), ("2009_000001", bad)])
    assert list(tmp_path.iterdir()) == []


def test_nothing_and_twice_the_same_are_refused(tmp_path):
    one = ("2008_000000", np.zeros((4, 4), np.uint8))
    for pairs, message in (([], "no segmentation"), ([one, one], "2008_000000 comes twice")):
        with pytest.raises(ValueError, match=message):
            write_submission(tmp_path / "results.tgz", pairs)
    assert list(tmp_path.iterdir()) == []


def test_another_archive_is_not_taken_for_one(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    name = "results/VOC2012/Segmentation/comp6_test_cls/a.png"
    for file, as_, message in (
        ("note.txt", "results/note.txt", "results/note.txt"),
        ("rgb.png", name, "mode RGB"),
        ("note.txt", name, "some.tgz: .*/a.png can't be read"),
    ):
        with tarfile.open(tmp_path / "some.tgz", "w:gz") as archive:
            archive.add(tmp_path / file, as_)
        with pytest.raises(ValueError, match=message):
            read_submission(tmp_path / "some.tgz")
