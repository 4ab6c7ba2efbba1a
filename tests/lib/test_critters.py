"""Critters: the same bytes everywhere, and the properties that the course's effect rests on."""

import hashlib
import pickle

import numpy as np
import pytest

from drs_lib.data import Critters, MaskAccessError, without_masks
from drs_lib.data import critters as module
from drs_lib.data.critters import OTHER_SPECIES, SPECIES, SPLITS, draw


def digest(split, indices, size, seed=0):
    found = hashlib.sha256()
    for i in indices:
        scene = draw(split, i, size, seed)
        found.update(scene.image.tobytes() + scene.mask.tobytes() + scene.salient.tobytes())
    return found.hexdigest()[:16]


def test_the_same_seed_gives_the_same_bytes():
    """On every platform. Another digest means that stored runs no longer hold: then raise DRAWING."""
    assert digest("train", range(40), 128) == "531f337010df4063"
    assert digest("val", range(40), 64) == "d5b6197347d37310"
    assert digest("pretrain", range(40), 128) == "b435f6358757b918"


def test_another_seed_split_or_index_gives_another_scene():
    scenes = ("train", [0], 64), ("train", [1], 64), ("val", [0], 64), ("train", [0], 64, 1)
    assert len({digest(*arguments) for arguments in scenes}) == 4


def test_no_species_of_the_course_is_pretrained_on_and_no_part_identifies_one():
    assert len(SPECIES) == 6 and len(OTHER_SPECIES) == 12
    assert not set(SPECIES.values()) & set(OTHER_SPECIES.values())
    for part in (0, 1):
        parts = [species[part] for species in SPECIES.values()]
        assert min(parts.count(p) for p in parts) >= 2


def test_labels_are_the_classes_of_the_mask_and_every_class_occurs():
    data = Critters("train", size=64, length=60)
    seen = np.zeros(6)
    for i in range(len(data)):
        image, labels = data[i]
        assert image.dtype.is_floating_point is False and image.shape == (3, 64, 64)
        assert set(np.flatnonzero(labels.numpy()) + 1) == set(np.unique(data.mask(i))) - {0}
        assert 1 <= labels.sum() <= 2
        seen += labels.numpy()
    assert seen.min() > 0


def test_the_body_is_large_and_the_head_small_and_inside_the_image():
    for i in range(60):
        scene = draw("train", i, 128)
        for x, y, radius, label in scene.heads:
            assert 0 <= x < 128 and 0 <= y < 128
            assert scene.mask[int(y), int(x)] == label, "a head is hidden behind another animal"
            animal = (scene.mask == label).sum()
            assert np.pi * radius**2 < 0.45 * animal
        assert not (scene.mask > 0)[~scene.salient].any()


def test_a_scene_is_the_same_picture_at_another_size():
    for i in range(5):
        small, large = draw("train", i, 64), draw("train", i, 128)
        agree = small.mask == large.mask[::2, ::2]
        assert agree.mean() > 0.97
        assert [h[3] for h in small.heads] == [h[3] for h in large.heads]


def test_a_longer_split_begins_with_the_shorter_one_in_any_order_of_access():
    short, long = Critters("val", size=32, length=3), Critters("val", size=32, length=9)
    late = [long[i][0].numpy().copy() for i in (8, 2, 0, 1)]
    assert all(np.array_equal(short[i][0].numpy(), late[k]) for k, i in ((1, 2), (2, 0), (3, 1)))
    assert np.array_equal(long[-1][0].numpy(), late[0])
    with pytest.raises(IndexError):
        long[9]
    copy = pickle.loads(pickle.dumps(long))
    assert np.array_equal(copy[1][0].numpy(), long[1][0].numpy())


def test_saliency_is_a_detector_s_and_not_the_truth():
    data = Critters("val", size=128, length=60)
    hits = misses = false = 0
    for i in range(len(data)):
        salient, truth = data.saliency(i) >= 0.06 * 255, draw("val", i).salient
        hits, misses = hits + (salient & truth).sum(), misses + (~salient & truth).sum()
        false += (salient & ~truth).sum()
    assert hits / (hits + misses) > 0.95
    assert 0.02 < false / (hits + misses) < 0.5
    assert data.saliency(0).dtype == np.uint8 and data.saliency(0).shape == (128, 128)


def test_saliency_does_not_depend_on_what_was_asked_for_first():
    one, two = (Critters("val", size=32, length=53) for _ in range(2))
    last = one.saliency(52)
    for i in range(53):
        two.saliency(i)
    assert np.array_equal(last, two.saliency(52))


def test_masks_and_heads_are_out_of_reach_of_the_weak_pipeline():
    data = without_masks(Critters("train", size=32, length=2))
    assert data.saliency(0).shape == (32, 32)
    with pytest.raises(MaskAccessError):
        data.mask(0)
    for name in ("heads", "_masks", "_heads", "_draw"):
        with pytest.raises(AttributeError):
            getattr(data, name)


def test_fingerprint_needs_no_drawing_and_tells_data_sets_apart(monkeypatch):
    monkeypatch.setattr(module, "draw", lambda *a: pytest.fail("something was drawn"))
    arguments = [("train",), ("val",), ("train", 64), ("train", 128, 1), ("train", 128, 0, 9)]
    assert len({Critters(*a).fingerprint for a in arguments}) == len(arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "test"}, "no Critters split 'test'"),
        ({"size": 100}, "multiple of 8"),
        ({"size": 16}, "size holds 16: expected a whole number of 32 or more"),
        ({"size": 64.5}, "whole number"),
        ({"length": 0}, "1 or more"),
        ({"seed": -1}, "from 0 to"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Critters(**{"split": "train"} | arguments)


def test_defaults_are_the_course_s_sizes():
    assert SPLITS["train"][1] >= 1000 and SPLITS["val"][1] >= 300
    assert len(Critters("train")) == SPLITS["train"][1]
