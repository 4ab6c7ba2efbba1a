"""Adversarial erasing: what is erased, that training sees it, how maps are merged, what is kept."""

import pickle

import numpy as np
import pytest
import torch

from conftest import TinyDataset
from drs_course.erasing import AdversarialErasing, ErasedImages, discriminative_region, erase
from drs_course.stages import Pipeline, Splits
from drs_lib.data import MaskAccessError, normalize
from drs_lib.maps import localization_maps
from drs_lib.recipes import get_budget


def tiny_line(store):
    """A pipeline over eight tiny images, from random weights: the shipped ones belong to Critters."""
    ci = get_budget("ci")
    splits = Splits("tiny", TinyDataset(8, 32), TinyDataset(4, 32, seed=1))
    return Pipeline(splits, ci.replace(classify=ci.classify.replace(weights=None, batch=4)), store=store)


@pytest.fixture
def erasing(tmp_path):
    """Two networks over eight tiny images."""
    erasing = AdversarialErasing(tiny_line(tmp_path))
    erasing.step()
    return erasing


def test_the_region_is_where_any_class_is_above_the_threshold():
    maps = torch.tensor([[[0.6, 0.5, 0.0]], [[0.0, 0.2, 0.9]]])
    assert discriminative_region(maps, 0.5).tolist() == [[True, False, True]]


def test_erased_pixels_are_nothing_to_the_network_and_the_rest_is_untouched():
    image = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    region = torch.zeros(6, 5, dtype=torch.bool)
    region[1:3, 2:] = True
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


def test_nothing_to_erase_is_the_data_set_itself():
    inner = TinyDataset(2, 32)
    images = ErasedImages(inner)
    assert torch.equal(images[1][0], inner[1][0]) and not images.region(1).any()


def test_a_step_erases_what_the_network_before_it_found(erasing):
    first, second = erasing.images
    for i in range(len(first)):
        image, labels = first[i]
        maps = localization_maps(erasing.networks[0], normalize(image)[None], labels[None])[0]
        assert torch.equal(second.region(i), discriminative_region(maps, erasing.threshold))
    erasing.step()
    for i in range(len(first)):
        assert (erasing.images[2].region(i) | ~second.region(i)).all(), "what is erased stays erased"


def test_the_networks_are_trained_on_different_images_from_the_same_weights(erasing):
    one, two = (network.state_dict() for network in erasing.networks)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert not any(module.training for network in erasing.networks for module in network.modules())
    assert [len(history) for history in erasing.histories] == [1, 1]


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
    again = AdversarialErasing(tiny_line(tmp_path))
    (made,) = (tmp_path / "erase").glob("*/meta.json")
    before = made.stat().st_mtime_ns
    assert again.step() == erasing.histories[1] and made.stat().st_mtime_ns == before
    weights = [e.networks[1].state_dict() for e in (erasing, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    again = AdversarialErasing(tiny_line(tmp_path))
    again.step(overwrite=True)
    assert made.stat().st_mtime_ns > before
    # The same seed trains the same network.
    assert all(torch.equal(again.networks[1].state_dict()[name], weights[0][name]) for name in weights[0])
    other = AdversarialErasing(tiny_line(tmp_path), threshold=0.7)
    other.step()
    assert len(list((tmp_path / "erase").glob("*/meta.json"))) == 2


def test_masks_are_out_of_reach_of_the_trainings(tmp_path):
    line = tiny_line(tmp_path)
    line.data.train.forbid_masks = True
    erasing = AdversarialErasing(line)
    erasing.step()
    assert len(list(erasing.maps())) == 8


@pytest.mark.parametrize("threshold", [0, 1, -0.5])
def test_thresholds_that_are_none(tmp_path, threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        AdversarialErasing(tiny_line(tmp_path), threshold)
