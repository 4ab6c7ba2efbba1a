import warnings

import numpy as np
import pytest
import torch

from drs_lib.labels import CONFLICTS, pseudo_labels


def paper_rule(maps, saliency, alpha, beta, conflict):
    """The paper's rule, pixel by pixel."""
    n, c, h, w = maps.shape
    out = np.empty((n, h, w), np.uint8)
    for i, y, x in np.ndindex(n, h, w):
        values = [float(maps[i, k, y, x]) for k in range(c)]
        is_object, is_background = max(values) > alpha, saliency[i, y, x] < beta
        its_class = values.index(max(values)) + 1
        if is_object and is_background:
            out[i, y, x] = {"background": 0, "object": its_class, "ignore": 255}[conflict]
        else:
            out[i, y, x] = its_class if is_object else 0 if is_background else 255
    return out


def release_rule(maps, saliency_u8, alpha):
    """The released code's rule as its facts are known, pixel by pixel, on C + 1 scores."""
    n, c, h, w = maps.shape
    out = np.empty((n, h, w), np.uint8)
    for i, y, x in np.ndindex(n, h, w):
        salient = saliency_u8[i, y, x] > 50
        scores = [0.0 if salient else 1.0] + [v if v >= alpha else 0.0 for v in map(float, maps[i, :, y, x])]
        winner = scores.index(max(scores))
        ignored = sum(s > 0.9 for s in scores) > 2 or (salient and winner == 0)
        out[i, y, x] = 255 if ignored else winner
    return out


def random_inputs(seed, shape=(3, 4, 9, 7)):
    rng = np.random.default_rng(seed)
    # Coarse values, so that ties and values exactly on a threshold are common.
    maps = (rng.integers(0, 21, shape) / 20).astype(np.float32)
    maps[rng.random(shape) < 0.6] = 0
    saliency = rng.choice(np.array([0, 14, 15, 16, 49, 50, 51, 255], np.uint8), (shape[0], *shape[2:]))
    return maps, saliency


@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("alpha, beta", [(0.2, 0.06), (0.5, 51 / 255), (0.0, 1.0), (1.0, 0.0)])
def test_paper_rule_against_a_loop_over_pixels(alpha, beta, conflict):
    maps, saliency = random_inputs(1)
    out = pseudo_labels(maps, saliency, alpha, beta, conflict=conflict)
    assert out.dtype == torch.uint8 and out.shape == saliency.shape
    expected = paper_rule(maps, saliency / 255, np.float32(alpha), beta, conflict)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.95, 1.0])
def test_release_rule_against_a_loop_over_pixels(alpha):
    maps, saliency = random_inputs(2, (3, 5, 11, 13))
    out = pseudo_labels(maps, saliency, alpha, rule="release")
    expected = release_rule(maps, saliency, np.float32(alpha))
    np.testing.assert_array_equal(out.numpy(), expected)


def one_pixel(*values, saliency, **options):
    maps = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
    return pseudo_labels(maps, torch.tensor(saliency, dtype=torch.float32).view(1, 1, 1), **options).item()


@pytest.mark.parametrize(
    "values, saliency, expected",
    [
        ((0.0, 0.0), 0.5, 255),  # no cue
        ((0.0, 0.0), 0.01, 0),  # background cue only
        ((0.2, 0.1), 0.5, 255),  # a map exactly at alpha is no object cue
        ((0.21, 0.1), 0.5, 1),
        ((0.1, 0.21), 0.5, 2),
        ((0.7, 0.7), 0.5, 1),  # the first of equal classes
        ((0.0, 0.0), 0.06, 255),  # saliency exactly at beta is no background cue
        ((0.9, 0.0), 0.01, 0),  # both cues: background by default
    ],
)
def test_corners_of_the_paper_rule(values, saliency, expected):
    assert one_pixel(*values, saliency=saliency) == expected


@pytest.mark.parametrize(
    "values, saliency, expected",
    [
        ((1.0, 0.0, 0.0), 0.1, 0),  # not salient: background, and it wins the tie at 1
        ((0.0, 0.0, 0.0), 0.9, 255),  # salient without an object
        ((0.2, 0.0, 0.0), 0.9, 1),  # a map exactly at alpha counts, unlike in the paper's words
        ((0.0, 0.3, 0.6), 0.9, 3),
        ((0.95, 0.92, 0.0), 0.9, 1),  # two confident scores are fine ...
        ((0.95, 0.92, 0.91), 0.9, 255),  # ... three are not
        ((0.95, 0.92, 0.0), 0.1, 255),  # ... and background, where it scores 1, is one of them
        ((0.95, 0.0, 0.0), 50 / 255, 0),  # exactly 50/255 is not salient
        ((0.95, 0.0, 0.0), 51 / 255, 1),
    ],
)
def test_corners_of_the_release_rule(values, saliency, expected):
    assert one_pixel(*values, saliency=saliency, rule="release") == expected


def test_8_bit_and_float_saliency_agree_at_every_threshold():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    maps = np.zeros((1, 1, 16, 16), np.float32)
    for beta in [k / 255 for k in range(256)] + [0.06]:
        out = pseudo_labels(maps, levels, beta=beta).numpy()
        np.testing.assert_array_equal(out == 0, levels / 255 < beta)
        np.testing.assert_array_equal(
            out, pseudo_labels(maps, (levels / 255).astype(np.float32), beta=beta).numpy()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_kinds_of_input(dtype):
    maps, saliency = random_inputs(3)
    expected = pseudo_labels(maps, saliency)
    kept = maps.copy()
    assert torch.equal(pseudo_labels(torch.tensor(maps), torch.tensor(saliency)), expected)
    assert torch.equal(
        pseudo_labels(torch.tensor(maps, dtype=dtype), saliency, alpha=0.21),
        pseudo_labels(maps, saliency, 0.21),
    )
    flipped = pseudo_labels(maps[:, :, ::-1], saliency[:, ::-1])
    assert torch.equal(flipped, expected.flip(1))
    saliency.flags.writeable = maps.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pseudo_labels(maps, saliency), expected)
    np.testing.assert_array_equal(maps, kept)


def test_no_images_give_no_labels():
    assert pseudo_labels(torch.zeros(0, 3, 4, 5), torch.zeros(0, 4, 5)).shape == (0, 4, 5)


MAPS, SALIENCY = torch.full((2, 3, 4, 5), 0.5), torch.full((2, 4, 5), 0.5)


@pytest.mark.parametrize(
    "maps, saliency, options, message",
    [
        (MAPS * float("nan"), SALIENCY, {}, r"maps must lie in \[0, 1\]; got nan"),
        (MAPS * 3, SALIENCY, {}, r"maps must lie in \[0, 1\]; got 1.5 to 1.5"),
        (MAPS - 1, SALIENCY, {}, r"maps must lie in \[0, 1\]"),
        ((MAPS * 255).to(torch.uint8), SALIENCY, {}, "Divide 8-bit maps by 255"),
        (MAPS[0], SALIENCY[0], {}, r"maps must be \(N, C, H, W\)"),
        (MAPS[:, :0], SALIENCY, {}, "at least one class"),
        (torch.zeros(1, 255, 1, 1), torch.zeros(1, 1, 1), {}, "at most 254 classes"),
        (MAPS, SALIENCY[:, :3], {}, r"expected shape \(2, 4, 5\).*got \(2, 3, 5\)"),
        (MAPS, SALIENCY[:1], {}, "saliency must match the maps"),
        (MAPS, SALIENCY * 255, {}, r"saliency must lie in \[0, 1\]; got 127.5"),
        (MAPS, SALIENCY * float("nan"), {}, r"saliency must lie in \[0, 1\]"),
        (MAPS, SALIENCY.long(), {}, "saliency must be floats .* Pass 0..255 as uint8"),
        (MAPS, SALIENCY, {"alpha": 1.2}, "alpha is a threshold"),
        (MAPS, SALIENCY, {"beta": -0.1}, "beta is a threshold"),
        (MAPS, SALIENCY, {"alpha": float("nan")}, "alpha is a threshold"),
        (MAPS, SALIENCY, {"rule": "mine"}, "unknown rule 'mine'; the rules are 'paper', 'release'"),
        (MAPS, SALIENCY, {"conflict": "none"}, "unknown conflict"),
        (MAPS, SALIENCY, {"rule": "release", "beta": 0.2}, "takes no beta"),
        (MAPS, SALIENCY, {"rule": "release", "conflict": "object"}, "no conflict"),
    ],
)
def test_bad_input_is_refused_in_words(maps, saliency, options, message):
    with pytest.raises(ValueError, match=message):
        pseudo_labels(maps, saliency, **options)
