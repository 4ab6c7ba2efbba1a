"""NumPy's whole numbers, and arrays of them, are as good as Python's wherever numbers are passed."""

import json

import numpy as np
import pytest
import torch
from tiny import TinyDataset

from drs_course import tables as experiments
from drs_lib.arguments import whole
from drs_lib.crf import CRFConfig, iterate_crf
from drs_lib.data.transforms import training_transform
from drs_lib.maps import iterate_maps, localization_maps
from drs_lib.networks import classifier
from drs_lib.recipes import ClassifyRecipe
from drs_lib.runtime import seeded, threads
from drs_lib.train import evaluate_classifier


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.array, torch.tensor])
def test_whole_numbers(kind):
    number = whole("n", kind(5), least=5, most=5)
    assert number == 5 and type(number) is int


@pytest.mark.parametrize(
    "value", [0, 8, -3, 1.0, np.float64(2), True, np.True_, "3", None, (3,), np.array([3])]
)
def test_what_is_no_whole_number_in_range(value):
    with pytest.raises(ValueError, match="n holds .*: expected a whole number from 1 to 7"):
        whole("n", value, most=7)


def drawn(seed):
    with seeded(seed):
        return torch.rand(2)


def in_threads(n):
    with threads(n):
        return torch.tensor(torch.get_num_threads())


NETWORK = classifier("mini", 3).eval()
IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = TinyDataset(3, 32)


@pytest.mark.parametrize(
    "call, plain",
    [
        (lambda n: localization_maps(NETWORK, IMAGES, scales=n), (24, 32)),
        (lambda n: localization_maps(NETWORK, IMAGES, size=n), (16, 24)),
        (lambda n: localization_maps(NETWORK, IMAGES, size=n), 16),
        (lambda n: next(iterate_maps(NETWORK, DATA, resize=n))[2], 16),
        (lambda n: next(iterate_maps(NETWORK, DATA, batch_size=n))[2], 2),
        (lambda n: next(iterate_maps(NETWORK, DATA, workers=n))[2], 1),
        (lambda n: torch.tensor(evaluate_classifier(NETWORK, DATA, resize=n)), 16),
        (lambda n: training_transform(crop=n, flip=False)(DATA[0][0][:, :8, :8])[0], 8),
        (lambda n: training_transform(resize=n, flip=False)(DATA[0][0])[0], 8),
        (lambda n: training_transform(scale=n, flip=False)(DATA[0][0])[0], (2, 2)),
        (drawn, 3),
        (in_threads, 2),
    ],
)
def test_numpy_numbers_do_what_pythons_do(call, plain):
    assert torch.equal(call(np.array(plain) if isinstance(plain, tuple) else np.int64(plain)), call(plain))


def test_numpy_numbers_in_what_is_stored_are_pythons():
    assert CRFConfig(iterations=np.int64(5)) == CRFConfig(iterations=5)
    assert list(iterate_crf([], jobs=np.int64(1))) == []
    recipe = ClassifyRecipe(batch=np.int64(4), milestones=np.array([3, 4]), crop=np.int64(9))
    plain = ClassifyRecipe(batch=4, milestones=(3, 4), crop=9)
    assert json.loads(json.dumps(recipe.to_dict())) == plain.to_dict()


def test_numpy_seeds_are_the_rows_seeds():
    _, seeds = experiments._checked(np.array([3]), np.arange(2), jobs=np.int64(1))
    assert seeds == (0, 1) and all(type(seed) is int for seed in seeds)
