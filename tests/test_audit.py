"""The threshold scan against `pseudo_labels`, alpha by alpha; scores epoch by epoch against a run."""

import numpy as np
import pytest
import torch

from conftest import TinyDataset
from drs_course.audit import ALPHAS, AlphaScan, scan_alpha, score_every_epoch
from drs_course.paper import Configuration
from drs_course.stages import Pipeline, Splits
from drs_lib.labels import pseudo_labels
from drs_lib.metrics import SegmentationScore
from drs_lib.recipes import get_budget

CLASSES = 3


def tiny_line(store, **changes):
    """A pipeline over eight tiny images, from random weights: the shipped ones belong to Critters."""
    ci = get_budget("ci")
    recipes = {name: getattr(ci, name).replace(weights=None, batch=4) for name in ("classify", "refine")}
    splits = Splits("tiny", TinyDataset(8, 32), TinyDataset(4, 32, seed=1))
    return Pipeline(splits, ci.replace(**recipes | changes), store=store)


def random_image(rng, size=(13, 17)):
    maps = rng.random((CLASSES, *size)).astype(np.float32)
    maps[rng.integers(CLASSES)] = 0
    maps[:, :2] = 0
    # Values that are an alpha, and equal classes, are where a mistake would hide.
    maps[0, 3], maps[1, 3] = 0.2, 0.2
    mask = rng.choice([0, 1, 2, 3, 255], size).astype(np.uint8)
    return torch.from_numpy(maps), rng.integers(0, 40, size).astype(np.uint8), mask


def one_by_one(images, alpha, saliency):
    score = SegmentationScore(CLASSES + 1)
    for maps, salient, mask in images:
        level = salient if saliency else np.full_like(salient, 255)
        labels = pseudo_labels(maps[None], level[None], alpha=alpha)[0]
        score.update(labels, mask)
    return score


@pytest.mark.parametrize("saliency", [True, False])
def test_the_scan_is_pseudo_labels_at_every_alpha(saliency):
    rng = np.random.default_rng(0)
    images = [random_image(rng) for _ in range(4)]
    scan = AlphaScan(CLASSES)
    for image in images:
        assert scan.update(*image) is scan
    for number, alpha in enumerate(ALPHAS):
        expected = one_by_one(images, alpha, saliency)
        np.testing.assert_array_equal(scan.confusion(saliency)[number], expected.confusion)
        assert scan.miou(saliency)[number] == pytest.approx(100 * expected.compute()["miou"])


def test_best_and_spread():
    scan = AlphaScan(1, (0.1, 0.3, 0.5))
    maps = torch.tensor([[[0.2, 0.4, 0.6, 0.9]]])
    scan.update(maps, np.full((1, 4), 255, np.uint8), np.array([[0, 1, 1, 1]], np.uint8))
    assert scan.best() == (0.3, 100.0)
    assert scan.spread(0.3, 0.3) == 0 and scan.spread(0.1, 0.5) == pytest.approx(100 - scan.miou().min())
    with pytest.raises(ValueError, match="no alpha of the scan"):
        scan.spread(0.6, 0.9)


def test_saliency_may_be_floats():
    rng = np.random.default_rng(1)
    maps, saliency, mask = random_image(rng)
    bytes_, floats = (AlphaScan(CLASSES).update(maps, s, mask) for s in (saliency, saliency / 255))
    np.testing.assert_array_equal(bytes_.confusion(), floats.confusion())


@pytest.mark.parametrize(
    "alphas, match", [((), "at least one"), ((0.3, 0.2), "increasing"), ((0.2, 1.2), r"\[0, 1\]")]
)
def test_alphas_that_are_none(alphas, match):
    with pytest.raises(ValueError, match=match):
        AlphaScan(CLASSES, alphas)


def test_arrays_that_do_not_belong_together():
    scan = AlphaScan(CLASSES)
    with pytest.raises(ValueError, match="do not belong together"):
        scan.update(torch.zeros(CLASSES, 4, 4), np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        scan.update(torch.zeros(2, 4, 4), np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
@pytest.mark.parametrize("spoilt", ["maps", "saliency"])
def test_values_out_of_range_are_refused_and_not_counted(spoilt, value):
    arrays = {"maps": np.zeros((CLASSES, 2, 2), np.float32), "saliency": np.zeros((2, 2))}
    arrays[spoilt][..., 0, 1] = value
    scan = AlphaScan(CLASSES)
    with pytest.raises(ValueError, match=rf"{spoilt} must lie in \[0, 1\]"):
        scan.update(**arrays, mask=np.zeros((2, 2), np.uint8))
    assert not scan.confusion().any()


@pytest.mark.parametrize("configuration", [Configuration(drs_layers=()), Configuration(refine=True)])
def test_scanning_a_configuration_finds_the_score_that_the_pipeline_stores(tmp_path, configuration):
    line = tiny_line(tmp_path)
    alpha = line.budget.refined_alpha if configuration.refine else line.budget.alpha
    stored = line.scores(configuration, ("labels",))["labels"]["miou"]
    scan = scan_alpha(line, configuration, (0.01, alpha, 0.9))
    assert scan.miou()[1] == pytest.approx(100 * stored, abs=1e-4)
    assert [index for index, _, _ in line.maps(configuration)] == list(range(8))


def test_a_rule_that_the_scan_does_not_know(tmp_path):
    line = tiny_line(tmp_path, rule="release")
    for function in (scan_alpha, score_every_epoch):
        with pytest.raises(ValueError, match="'release'"):
            function(line, Configuration())


def test_scores_of_every_epoch_end_at_the_stored_one(tmp_path):
    three = get_budget("ci").classify.replace(weights=None, batch=4, epochs=3)
    line, configuration = tiny_line(tmp_path, classify=three), Configuration(delta=0.5)
    scores = score_every_epoch(line, configuration)
    assert [entry["epoch"] for entry in scores] == [1, 2, 3]
    assert [entry["loss"] for entry in scores] == [e["loss"] for e in line.history("classify", configuration)]
    stored = line.scores(configuration, ("labels",))["labels"]["miou"]
    assert scores[-1]["miou"] == pytest.approx(100 * stored, abs=1e-4)
    # Kept: a second call trains nothing, unless it is told to.
    (made,) = (tmp_path / "epoch_score").glob("*/meta.json")
    before = made.stat().st_mtime_ns
    assert score_every_epoch(line, configuration) == scores and made.stat().st_mtime_ns == before
    assert score_every_epoch(line, configuration, overwrite=True) == scores
    assert made.stat().st_mtime_ns > before
