"""Figure 3 in six calls: by itself, as a command for a folder of images, and as the course's stages."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from drs_course.paper import Configuration
from drs_course.stages import Pipeline, Splits
from drs_lib import deeplab, method
from drs_lib.__main__ import main
from drs_lib.archives import LabelArchive
from drs_lib.data import VOC2012, Critters
from drs_lib.data.folder import LabelledFolder
from drs_lib.recipes import get_budget
from drs_lib.train import evaluate_segmentation, predict_segmentation


def test_the_store_s_stages_give_the_same_labels_and_weights(tmp_path):
    budget = get_budget("ci", "critters")
    train = Critters("train", size=budget.image_size, length=budget.train_images)
    val = Critters("val", size=budget.image_size, length=budget.val_images)
    network, miou = method.weakly_supervised(
        train, val, budget, tmp_path / "six", seed=3, device="cpu", progress=False
    )
    pipeline = Pipeline(Splits("critters", train, val), budget, seed=3, store=tmp_path / "runs", device="cpu")
    configuration = Configuration(refine=True)
    stored = pipeline.segmentation_network(configuration).state_dict()
    assert stored.keys() == network.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in network.state_dict().items())
    labels = LabelArchive(tmp_path / "six" / "labels.zip")
    assert len(labels) == len(train) and len({label.tobytes() for label in labels}) > 1
    for one, other in zip(labels, pipeline.labels(configuration), strict=True):
        np.testing.assert_array_equal(one, other)
    target = pipeline.get(pipeline.stage("target", configuration)).file("maps.zip")
    assert target.read_bytes() == (tmp_path / "six" / "maps.zip").read_bytes()
    assert miou == pipeline.scores(configuration)["miou"]["miou"]


@pytest.fixture
def photos(voc_tree, tmp_path):
    """The tiny VOC tree's training images as a folder with a label list, one of them a PNG."""
    source, folder = VOC2012(voc_tree, "train"), tmp_path / "photos"
    for name in ("images", "saliency", "masks"):
        (folder / name).mkdir(parents=True)
    present = source.image_labels().numpy().any(0)
    classes, lines = [c for c, there in zip(source.classes, present, strict=True) if there], []
    for i, name in enumerate(source.names):
        image = Image.open(source.root / "JPEGImages" / f"{name}.jpg")
        file = f"{name}.{'png' if i == 2 else 'jpg'}"
        image.save(folder / "images" / file)
        shutil.copy(source.root / "saliency_map" / f"{name}.png", folder / "saliency")
        mask = source.mask(i)
        for value in set(np.unique(mask).tolist()) - {0, 255}:
            mask[mask == value] = 100 + classes.index(source.classes[value - 1])
        mask[(mask >= 100) & (mask < 255)] -= 99
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
        lines.append(" ".join([file, *(source.classes[c] for c in source.label(i).nonzero().flatten())]))
    (folder / "labels.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_folder_is_a_data_set_like_the_others(photos, voc_tree):
    data, source = LabelledFolder(photos), VOC2012(voc_tree, "train")
    places = [source.classes.index(name) for name in data.classes]
    assert places == sorted(places) and len(data) == len(source) == 6
    assert data.names == source.names and data.has_masks
    for i in range(6):
        image, labels = data[i]
        assert image.dtype == torch.uint8 and image.shape == source[i][0].shape
        assert torch.equal(labels, source[i][1][places]) and labels.any()
        np.testing.assert_array_equal(data.saliency(i), source.saliency(i))
        assert (data.mask(i) > 0).sum() == (source.mask(i) > 0).sum()
    before = data.fingerprint
    Image.fromarray(255 - data.saliency(1)).save(photos / "saliency" / f"{data.names[1]}.png")
    assert LabelledFolder(photos).fingerprint != before


def test_the_command_makes_a_network_and_masks_of_a_folder(photos, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main([str(photos), "--out", str(out), "--recipes", "ci", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    data = LabelledFolder(photos)
    network = deeplab("largefov", "vgg16", data.num_classes + 1)
    network.load_state_dict(load_file(out / "deeplab.safetensors"))
    for index, mask in predict_segmentation(network.eval(), data):
        kept = Image.open(out / "masks" / f"{data.names[index]}.png")
        assert kept.mode == "P" and mask.shape == data[index][0].shape[1:]
        np.testing.assert_array_equal(np.array(kept), mask)
    assert f"mean IoU {100 * evaluate_segmentation(network, data)['miou']:.1f} %" in said
    assert len(LabelArchive(out / "labels.zip")) == len(LabelArchive(out / "maps.zip")) == 6


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "labels.txt").unlink(), "no .*labels.txt: expected an image and its classes"),
        (lambda d: (d / "labels.txt").write_text("\n"), "labels.txt names 0 classes, expected 1 to 254"),
        (lambda d: append(d, "2007_000001.jpg dog"), "lists images more than once: 2007_000001"),
        (lambda d: append(d, "here.jpg dog"), "no image for what .*labels.txt lists: .*here.jpg"),
        (lambda d: (d / "saliency" / "2007_000004.png").unlink(), "no saliency map for .*2007_000004.png"),
        (lambda d: save(d, "saliency", "RGB"), "2007_000001.png has mode RGB: expected 8-bit greyscale"),
        (lambda d: save(d, "saliency", "L"), r"2007_000001.png is 5 x 4 pixels, its image 64 x 48"),
        (lambda d: (d / "images" / "2007_000001.jpg").write_bytes(b"GIF?"), "2007_000001.jpg can't be read"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(photos, tmp_path, capsys, damage, message):
    damage(photos)
    assert main([str(photos), "--out", str(tmp_path / "out"), "--recipes", "ci"]) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data = LabelledFolder(photos)
        data[0], data.saliency(0)


def append(folder, line):
    with open(folder / "labels.txt", "a", encoding="utf-8") as file:
        file.write(f"\n{line}")


def save(folder, kind, mode):
    Image.new(mode, (5, 4)).save(folder / kind / "2007_000001.png")


def test_a_mask_of_other_classes_is_refused(photos):
    mask = LabelledFolder(photos).mask(0)
    Image.fromarray(mask + np.uint8(40)).save(photos / "masks" / "2007_000001.png")
    with pytest.raises(ValueError, match=r"has value 39, expected 0 \(background\), 1..9 \(aeroplane, "):
        LabelledFolder(photos).mask(0)


def test_a_folder_without_masks_has_no_score(photos, tmp_path, capsys):
    shutil.rmtree(photos / "masks")
    data = LabelledFolder(photos)
    assert not data.has_masks
    network, miou = method.weakly_supervised(
        data, None, get_budget("ci", "voc"), tmp_path, device="cpu", progress=False
    )
    assert miou is None and not network.training


def test_the_command_says_what_it_takes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["drs_lib"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "labels.txt" in capsys.readouterr().out
