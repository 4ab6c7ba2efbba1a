"""The released networks measured: on files in their layout with random weights, and a tiny tree."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from released import aspp_state, caffe_state, release_state
from tiny import write_voc_tree

from drs_course import verify as module
from drs_course.__main__ import main
from drs_course.download import FILES
from drs_course.verify import MEASURES, no_map, verify
from drs_lib.crf import CRFConfig, available
from drs_lib.data import VOC2012
from drs_lib.data.voc import save_indexed_png
from drs_lib.labels import pseudo_labels
from drs_lib.maps import iterate_maps
from drs_lib.metrics import SegmentationScore
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.train import evaluate_classifier, evaluate_segmentation

ROWS = {row: it for measure in MEASURES.values() for row, it in measure.rows.items()}


@pytest.fixture
def root(tmp_path, monkeypatch, thin_vgg16, thin_resnet101):
    """A tree of 5 training and 3 validation images, and the released files, thin, with random weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(module, "CHUNK", 2)
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    for kind, controllers in (("drs", True), ("refine", False)):
        state = release_state(controllers, classes=20)
        torch.save({"model": state, "miou": np.float64(0.5)}, hub / FILES[kind].name)
    state = {f"base.{k}": v for k, v in (caffe_state() | aspp_state(21)).items()}
    torch.save(state, hub / FILES["deeplab"].name)
    tree = write_voc_tree(tmp_path, train=5, val=3)
    released = tree / "refined_pseudo_segmentation_labels"
    shutil.copytree(tree / "SegmentationClassAug", released)
    first = sorted(released.iterdir())[0]
    labels = np.array(Image.open(first))
    save_indexed_png(first, np.where(labels == 255, 0, labels)[::-1])
    return tmp_path


def scored(data, found):
    score = SegmentationScore(21)
    for index, labels in found:
        score.update(labels, data.mask(index))
    return score.compute()["miou"]


def from_maps(data, model):
    maps_of = iterate_maps(model, data, scales=(256, 320, 384), resize=320)
    labels = (
        (index, pseudo_labels(maps[None], data.saliency(index)[None], alpha=0.2, rule="release")[0])
        for index, _, maps in maps_of
    )
    return scored(data, labels)


def test_every_row_is_what_the_library_makes_of_the_file(root, capsys):
    found = verify(root, store=root / "runs", jobs=1)
    train, val = VOC2012(root, "train"), VOC2012(root, "val")
    hub = root / "hub" / "checkpoints"
    plain = classifier("vgg16", 20, weights=hub / FILES["drs"].name)
    refined = refinement_network("vgg16", 20, weights=hub / FILES["refine"].name)
    model = deeplab("aspp", "resnet101", 21, weights=hub / FILES["deeplab"].name)
    labels = root / "VOC2012" / "refined_pseudo_segmentation_labels"
    released = ((i, np.array(Image.open(labels / f"{name}.png"))) for i, name in enumerate(train.names))
    expected = {
        "released pseudo labels": scored(train, released),
        "DRS_learnable.pth, accuracy": evaluate_classifier(plain, train, resize=320),
        "DRS_learnable.pth, pseudo labels": from_maps(train, plain),
        "Refine_DRS_learnable.pth, pseudo labels": from_maps(train, refined),
        "DeepLab-v2": evaluate_segmentation(model, val)["miou"],
    }
    if available():
        result = evaluate_segmentation(model, val, CRFConfig.ASPP_RESNET101, jobs=1)
        expected["DeepLab-v2 with CRF"] = result["miou_crf"]
    assert list(found) == list(ROWS)
    for row, value in expected.items():
        assert found[row] == pytest.approx(value, abs=1e-6), row
    assert 0.3 < expected["released pseudo labels"] < 1
    assert len({round(value, 4) for value in expected.values()}) >= len(expected) - 1
    out = capsys.readouterr().out
    for row, published in ROWS.items():
        assert any(line.startswith(row) and line.endswith(published) for line in out.splitlines()), row
    assert "69.4 (README)" in out and "70.4 (README; paper, Table 4)" in out


def test_the_control_gives_salient_pixels_a_class_of_the_image_at_random():
    saliency = np.full((200, 200), 50, np.uint8)
    saliency[:100] = 51
    labels = torch.zeros(20)
    labels[[3, 7]] = 1
    drawn = no_map(labels, saliency, np.random.default_rng(0))
    assert (drawn[100:] == 0).all() and set(np.unique(drawn[:100])) == {4, 8}
    assert abs((drawn[:100] == 4).mean() - 0.5) < 0.02
    assert (no_map(torch.zeros(20), saliency, np.random.default_rng(0)) == 0).all()


def test_a_killed_run_goes_on_and_a_finished_one_is_read(root, monkeypatch, capsys):
    real, calls = MEASURES["drs"].count, []

    def stops(model, dataset, chunk, jobs):
        calls.append(list(chunk))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, dataset, chunk, jobs)

    monkeypatch.setitem(MEASURES, "drs", MEASURES["drs"]._replace(count=stops))
    arguments = ["verify", "--voc-root", str(root), "--store", str(root / "runs"), "--jobs", "1"]
    assert main(arguments) == 130 and "goes on from there" in capsys.readouterr().err
    assert main(arguments) == int(not available())
    assert calls == [[0, 1], [2, 3], [2, 3], [4]]
    first = capsys.readouterr().out
    assert main(arguments) == int(not available()) and len(calls) == 4
    assert capsys.readouterr().out == first
    # Another file of the same name is another measurement.
    path = root / "hub" / "checkpoints" / FILES["drs"].name
    torch.save({"model": release_state(True, classes=20), "epoch": 2}, path)
    verify(root, store=root / "runs", jobs=1)
    assert len(calls) == 7


def test_what_is_missing_is_named_with_its_command(root, capsys):
    for kind in ("refine", "deeplab"):
        (root / "hub" / "checkpoints" / FILES[kind].name).unlink()
    shutil.rmtree(root / "VOC2012" / "saliency_map")
    next((root / "VOC2012" / "refined_pseudo_segmentation_labels").iterdir()).unlink()
    assert main(["verify", "--voc-root", str(root), "--store", str(root / "runs"), "--limit", "5"]) == 1
    out = capsys.readouterr().out
    command = f"'python -m drs_course download --root {root} --only"
    for line in (
        f"control: no map: needs saliency_map.zip: {command} saliency'",
        "Refine_DRS_learnable.pth, pseudo labels: needs Refine_DRS_learnable.pth and saliency_map.zip: "
        f"{command} refine saliency'",
        f"DeepLab-v2 with CRF: needs {FILES['deeplab'].name}: {command} deeplab'",
        f"released pseudo labels: needs {FILES['labels'].name}: {command} labels'",
    ):
        assert line in out.splitlines()
    assert "The first 5 images only" in out
    assert main(["verify", "--voc-root", str(root / "nowhere"), "--store", str(root / "runs")]) == 1
    assert "python -m drs_course download --root" in capsys.readouterr().err


def test_without_pydensecrf_the_rest_is_measured(root, monkeypatch, capsys):
    monkeypatch.setattr(module, "available", lambda: False)
    found = verify(root, limit=1, store=root / "runs")
    # Rectangles of one class, salient with their border, which is not scored.
    assert found["control: no map"] == 1
    assert found["DeepLab-v2 with CRF"] is None and found["DeepLab-v2"] is not None
    assert "DeepLab-v2 with CRF: The CRF needs pydensecrf" in capsys.readouterr().out


def test_files_that_are_not_the_released_ones_are_refused_by_name(root, capsys):
    Image.new("L", (8, 8)).save(root / "VOC2012/refined_pseudo_segmentation_labels/2007_000001.png")
    with pytest.raises(ValueError, match="2007_000001: prediction .8, 8. and mask"):
        verify(root, store=root / "runs", limit=2)
    (root / "VOC2012" / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="classes of its own"):
        verify(root, store=root / "runs")
