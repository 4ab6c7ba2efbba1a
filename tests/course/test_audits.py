"""The threshold scan against `pseudo_labels`, alpha by alpha; scores epoch by epoch against a run;
adversarial erasing: what is erased, that training sees it, how maps are merged, what is kept."""

import pickle

import numpy as np
import pytest
import torch
from tiny import TinyDataset

from drs_course.audits import (
    ALPHAS,
    AdversarialErasing,
    AlphaScan,
    ErasedImages,
    discriminative_region,
    erase,
    scan_alpha,
    score_every_epoch,
)
from drs_course.paper import Configuration
from drs_course.stages import Pipeline, Splits
from drs_lib.data import MaskAccessError, normalize
from drs_lib.labels import pseudo_labels
from drs_lib.maps import localization_maps
from drs_lib.metrics import SegmentationScore
from drs_lib.recipes import get_budget

CLASSES = 3


def tiny_pipeline(store, **changes):
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


@pytest.mark.parametrize("saliency", [True, False])
def test_the_scan_is_pseudo_labels_at_every_alpha(saliency):
    rng = np.random.default_rng(0)
    images = [random_image(rng) for _ in range(4)]
    scan, floats = AlphaScan(CLASSES), AlphaScan(CLASSES)
    for maps, salient, mask in images:
        assert scan.update(maps, salient, mask) is scan
        floats.update(maps, salient / 255, mask)
    np.testing.assert_array_equal(scan.confusion(saliency), floats.confusion(saliency))
    for number, alpha in enumerate(ALPHAS):
        expected = SegmentationScore(CLASSES + 1)
        for maps, salient, mask in images:
            level = salient if saliency else np.full_like(salient, 255)
            expected.update(pseudo_labels(maps[None], level[None], alpha=alpha)[0], mask)
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


@pytest.mark.parametrize(
    "alphas, match", [((), "at least one"), ((0.3, 0.2), "increasing"), ((0.2, 1.2), r"\[0, 1\]")]
)
def test_alphas_that_are_none(alphas, match):
    with pytest.raises(ValueError, match=match):
        AlphaScan(CLASSES, alphas)


@pytest.mark.parametrize(("classes", "width"), [(CLASSES, 5), (2, 4)])
def test_arrays_that_do_not_belong_together(classes, width):
    arrays = torch.zeros(classes, 4, 4), np.zeros((4, 4), np.uint8), np.zeros((4, width), np.uint8)
    with pytest.raises(ValueError, match="do not belong together"):
        AlphaScan(CLASSES).update(*arrays)


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
    pipeline = tiny_pipeline(tmp_path)
    alpha = pipeline.budget.refined_alpha if configuration.refine else pipeline.budget.alpha
    stored = pipeline.scores(configuration, ("labels",))["labels"]["miou"]
    scan = scan_alpha(pipeline, configuration, (0.01, alpha, 0.9))
    assert scan.miou()[1] == pytest.approx(100 * stored, abs=1e-4)
    assert [index for index, _, _ in pipeline.maps(configuration)] == list(range(8))


def test_a_rule_that_the_scan_does_not_know(tmp_path):
    pipeline = tiny_pipeline(tmp_path, rule="release")
    for function in (scan_alpha, score_every_epoch):
        with pytest.raises(ValueError, match="'release'"):
            function(pipeline, Configuration())


def test_scores_of_every_epoch_end_at_the_stored_one(tmp_path):
    three = get_budget("ci").classify.replace(weights=None, batch=4, epochs=3)
    pipeline, configuration = tiny_pipeline(tmp_path, classify=three), Configuration(delta=0.5)
    scores, history = score_every_epoch(pipeline, configuration), pipeline.history("classify", configuration)
    assert [entry["epoch"] for entry in scores] == [1, 2, 3]
    assert [entry["loss"] for entry in scores] == [entry["loss"] for entry in history]
    stored = pipeline.scores(configuration, ("labels",))["labels"]["miou"]
    assert scores[-1]["miou"] == pytest.approx(100 * stored, abs=1e-4)
    # Kept: a second call trains nothing, unless it is told to.
    (made,) = (tmp_path / "epoch_score").glob("*/meta.json")
    before = made.stat().st_mtime_ns
    assert score_every_epoch(pipeline, configuration) == scores and made.stat().st_mtime_ns == before
    assert score_every_epoch(pipeline, configuration, overwrite=True) == scores
    assert made.stat().st_mtime_ns > before


@pytest.fixture
def erasing(tmp_path):
    """Two networks over eight tiny images, whose masks are out of reach."""
    pipeline = tiny_pipeline(tmp_path)
    pipeline.data.train.forbid_masks = True
    erasing = AdversarialErasing(pipeline)
    erasing.step()
    return erasing


def test_erased_pixels_are_nothing_to_the_network_and_the_rest_is_untouched():
    maps = torch.tensor([[[0.6, 0.5, 0.0]], [[0.0, 0.2, 0.9]]])
    region = discriminative_region(maps, 0.5)
    assert region.tolist() == [[True, False, True]]
    image = torch.randint(0, 256, (3, 1, 3), dtype=torch.uint8)
    before, erased = image.clone(), erase(image, region)
    assert torch.equal(image, before) and erased.dtype == torch.uint8
    assert torch.equal(erased[:, ~region], image[:, ~region])
    # Half a grey level of rounding.
    assert normalize(erased)[:, region].abs().max() < 0.5 / 255 / 0.224 + 1e-6


def test_erased_images_are_a_data_set_without_masks():
    inner = TinyDataset(3, 32, forbid_masks=True)
    regions = [np.random.default_rng(i).random((32, 32)) > 0.5 for i in range(3)]
    images = pickle.loads(pickle.dumps(ErasedImages(inner, regions)))
    assert (len(images), images.names, images.num_classes) == (3, inner.names, 3)
    for i in range(3):
        assert torch.equal(images.region(i), torch.from_numpy(regions[i]))
        image, labels = images[i]
        assert torch.equal(image, erase(inner[i][0], regions[i])) and torch.equal(labels, inner[i][1])
        np.testing.assert_array_equal(images.saliency(i), inner.saliency(i))
    with pytest.raises(MaskAccessError):
        images.mask(0)
    with pytest.raises(ValueError, match="2 regions for 3 images"):
        ErasedImages(inner, regions[:2])
    whole = ErasedImages(inner)
    assert torch.equal(whole[1][0], inner[1][0]) and not whole.region(1).any()


def test_a_step_erases_what_the_network_before_it_found_and_trains_another(erasing):
    first, second = erasing.images
    for i in range(len(first)):
        image, labels = first[i]
        maps = localization_maps(erasing.networks[0], normalize(image)[None], labels[None])[0]
        assert torch.equal(second.region(i), discriminative_region(maps, erasing.threshold))
    one, two = (network.state_dict() for network in erasing.networks)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert not any(module.training for network in erasing.networks for module in network.modules())
    assert [len(history) for history in erasing.histories] == [1, 1]
    erasing.step()
    for i in range(len(first)):
        assert (erasing.images[2].region(i) | ~second.region(i)).all(), "what is erased stays erased"


def test_merged_maps_are_the_maximum_over_the_networks(erasing):
    threads = torch.get_num_threads()
    for index, labels, merged in erasing.maps(indices=[5, 2]):
        own = [
            localization_maps(network, normalize(images[index][0])[None], labels[None])[0]
            for network, images in zip(erasing.networks, erasing.images, strict=True)
        ]
        assert merged.shape == (2, 3, 32, 32)
        torch.testing.assert_close(merged[0], own[0])
        torch.testing.assert_close(merged[1], torch.maximum(*own))
        assert (merged[:, labels == 0] == 0).all()
    assert torch.get_num_threads() == threads


def test_steps_are_kept_and_made_again_only_when_told(erasing, tmp_path):
    again = AdversarialErasing(tiny_pipeline(tmp_path))
    (made,) = (tmp_path / "erase").glob("*/meta.json")
    before = made.stat().st_mtime_ns
    assert again.step() == erasing.histories[1] and made.stat().st_mtime_ns == before
    weights = [e.networks[1].state_dict() for e in (erasing, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    again = AdversarialErasing(tiny_pipeline(tmp_path))
    again.step(overwrite=True)  # the same seed trains the same network
    assert made.stat().st_mtime_ns > before
    assert all(torch.equal(again.networks[1].state_dict()[name], weights[0][name]) for name in weights[0])
    other = AdversarialErasing(tiny_pipeline(tmp_path), threshold=0.7)
    other.step()
    assert len(list((tmp_path / "erase").glob("*/meta.json"))) == 2


@pytest.mark.parametrize("threshold", [0, 1, -0.5])
def test_thresholds_that_are_none(tmp_path, threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        AdversarialErasing(tiny_pipeline(tmp_path), threshold)
