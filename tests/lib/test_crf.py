import sys
import threading

import numpy as np
import pytest

from drs_lib import crf
from drs_lib.crf import CRFConfig, dense_crf, iterate_crf

needs_pydensecrf = pytest.mark.skipif(not crf.available(), reason="pydensecrf is not installed")
SMALL = CRFConfig(iterations=3, gaussian_sxy=2, bilateral_sxy=10, bilateral_srgb=20)


def scene(seed=0, labels=3, height=14, width=18, contrast=1.0):
    """A two-colour image with noisy probabilities that follow it."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((height, width), int)
    truth[:, width // 2 :] = 1
    truth[height // 2 :, : width // 3] = 2
    image = 120 + contrast * np.array([[-80, -60, 80], [100, 60, -90], [-30, 80, -30]], float)[truth]
    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    logits = 1.2 * np.eye(3)[truth] + rng.normal(0, 1, (height, width, 3))
    logits = np.concatenate([logits, rng.normal(-1, 1, (height, width, labels - 3))], axis=2)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    return probabilities.transpose(2, 0, 1).astype(np.float32), image


def exact_mean_field(probabilities, image, config):
    """Mean field with exact Gaussian sums over all pairs of pixels, kernels normalised symmetrically."""
    c, h, w = probabilities.shape
    y, x = np.mgrid[:h, :w].reshape(2, -1).astype(float)
    colour = image.reshape(-1, 3).astype(float)

    def kernel(features, weight):
        distance = ((features[:, None] - features[None]) ** 2).sum(axis=2)
        k = np.exp(-distance / 2)
        norm = 1 / np.sqrt(k.sum(axis=1))
        return weight * norm[:, None] * k * norm[None]

    position = np.stack([x, y], axis=1)
    pairwise = kernel(position / config.gaussian_sxy, config.gaussian_weight)
    appearance = np.concatenate([position / config.bilateral_sxy, colour / config.bilateral_srgb], axis=1)
    pairwise += kernel(appearance, config.bilateral_weight)
    log_p = np.log(np.clip(probabilities.astype(float), 1e-5, 1)).reshape(c, -1)
    q = np.exp(log_p) / np.exp(log_p).sum(axis=0)
    for _ in range(config.iterations):
        energy = log_p + q @ pairwise.T
        q = np.exp(energy - energy.max(axis=0))
        q /= q.sum(axis=0)
    return q.reshape(c, h, w)


NARROW = {"bilateral_sxy": 10, "bilateral_srgb": 40}


@needs_pydensecrf
@pytest.mark.parametrize(
    "config",
    [
        CRFConfig(iterations=1, bilateral_weight=0),
        CRFConfig(iterations=5, bilateral_weight=0),
        CRFConfig(iterations=1, gaussian_weight=0, bilateral_weight=1, **NARROW),
        CRFConfig(iterations=5, gaussian_sxy=2, gaussian_weight=1, bilateral_weight=2, **NARROW),
    ],
)
def test_dense_crf_against_exact_mean_field(config):
    # pydensecrf filters on a lattice, an approximation: 0.031 off at worst here, 0.004 on average.
    # Little contrast, so that the width in colour matters.
    probabilities, image = scene(labels=4, contrast=0.15)
    got, exact = dense_crf(probabilities, image, config), exact_mean_field(probabilities, image, config)
    error = np.abs(got - exact)
    assert error.max() < 0.05 and error.mean() < 0.006
    assert np.abs(exact - probabilities).mean() > 10 * error.mean(), "the CRF changes too little to be tested"
    assert got.shape == probabilities.shape and got.dtype == np.float32
    np.testing.assert_allclose(got.sum(axis=0), 1, atol=1e-5)


@needs_pydensecrf
def test_it_cleans_noisy_labels_along_colour_edges():
    probabilities, image = scene(height=30, width=40)
    truth = np.zeros((30, 40), int)
    truth[:, 20:] = 1
    truth[15:, :13] = 2
    before = (probabilities.argmax(axis=0) == truth).mean()
    after = (dense_crf(probabilities, image, CRFConfig.LARGEFOV_VGG16).argmax(axis=0) == truth).mean()
    assert before < 0.8 and after > 0.98


@needs_pydensecrf
def test_certain_pixels_views_and_read_only_images_are_fine_and_inputs_left_alone():
    probabilities, image = scene()
    hard = np.eye(3, dtype=np.float32)[probabilities.argmax(axis=0)].transpose(2, 0, 1)
    assert np.isfinite(dense_crf(hard, image, SMALL)).all()
    kept = probabilities.copy(), image.copy()
    expected = dense_crf(probabilities, image, SMALL)
    view = dense_crf(probabilities[:, ::-1], image[::-1], SMALL)
    assert np.array_equal(view, dense_crf(probabilities[:, ::-1].copy(), image[::-1].copy(), SMALL))
    image.flags.writeable = False  # as np.asarray(Image.open(path)) is
    assert np.array_equal(dense_crf(probabilities.astype(np.float64), image, SMALL), expected)
    assert np.array_equal(probabilities, kept[0]) and np.array_equal(image, kept[1])


@needs_pydensecrf
def test_many_images_give_the_same_on_one_and_two_processes():
    items = [scene(seed, height=10 + seed, width=20 - seed) for seed in range(9)]
    one = iterate_crf(items, SMALL, jobs=1)
    two = iterate_crf(iter(items), SMALL, jobs=2)
    for (probabilities, image), a, b in zip(items, one, two, strict=True):
        assert np.array_equal(a, dense_crf(probabilities, image, SMALL).argmax(axis=0))
        assert np.array_equal(a, b) and a.dtype == np.uint8 and a.max() < 3


@needs_pydensecrf
@pytest.mark.parametrize("jobs", [1, 2])
def test_input_is_read_a_few_images_ahead_and_in_the_calling_thread(jobs):
    taken, threads = [], set()

    def items():
        for seed in range(20):
            taken.append(seed)
            threads.add(threading.get_ident())
            yield scene(seed)

    ahead = [len(taken) - done for done, _ in enumerate(iterate_crf(items(), SMALL, jobs))]
    assert len(ahead) == 20 and max(ahead) <= 2 * jobs + 1
    assert threads == {threading.get_ident()}


@needs_pydensecrf
def test_workers_do_not_load_torch():
    from joblib.externals.loky import ProcessPoolExecutor

    loaded = "[name in __import__('sys').modules for name in ('pydensecrf', 'drs_lib', 'torch')]"
    with ProcessPoolExecutor(max_workers=1) as executor:
        executor.submit(crf._mean_field(SMALL), *scene(0)).result()
        assert executor.submit(eval, loaded).result() == [True, False, False]


@needs_pydensecrf
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_item_is_named_and_the_next_call_works(jobs):
    items = [scene(0), scene(1), (scene(2)[0], scene(2)[1].astype(float))]
    with pytest.raises(ValueError, match="CRF item 2: .*uint8"):
        list(iterate_crf(items, SMALL, jobs))
    assert len(list(iterate_crf(items[:2], SMALL, jobs))) == 2
    assert list(iterate_crf([], SMALL, jobs)) == []


PROBABILITIES, IMAGE = scene()


@pytest.mark.parametrize(
    "probabilities, image, message",
    [
        (PROBABILITIES, IMAGE.astype(np.float32) - 110, "0..255 scale.*got float32.*mean-subtracted"),
        (PROBABILITIES, IMAGE.transpose(2, 0, 1), r"\(H, W, 3\).*permute"),
        (PROBABILITIES[:, :5], IMAGE, r"expected \(C, 14, 18\), got \(3, 5, 18\)"),
        (PROBABILITIES.transpose(1, 2, 0), IMAGE, r"expected \(C, 14, 18\)"),
        (np.log(PROBABILITIES), IMAGE, "softmax of the logits"),
        (PROBABILITIES * 2, IMAGE, "sum to 1"),
        (PROBABILITIES * np.nan, IMAGE, "sum to 1"),
        (np.ones((1, 14, 18), np.float32), IMAGE, "2 to 255 labels"),
    ],
)
def test_bad_input_is_refused_in_words(probabilities, image, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(probabilities, image)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iterations": -1}, "iterations"),
        ({"iterations": 2.5}, "iterations"),
        ({"gaussian_sxy": 0}, "gaussian_sxy is the width"),
        ({"bilateral_srgb": float("nan")}, "bilateral_srgb is the width"),
        ({"bilateral_weight": -1}, "bilateral_weight must be"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CRFConfig(**options)


@pytest.mark.parametrize("jobs", [0, -1, 1.5])
def test_jobs_must_be_a_number_of_processes(jobs):
    with pytest.raises(ValueError, match="jobs holds"):
        iterate_crf([], jobs=jobs)


def test_without_pydensecrf_one_error_says_how_to_get_it(monkeypatch):
    for name in ("pydensecrf", "pydensecrf.densecrf"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not crf.available()
    for call in (lambda: dense_crf(PROBABILITIES, IMAGE), lambda: iterate_crf([], jobs=2)):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == crf.INSTALL_HINT
    words = ("pip install pydensecrf2", "C++ compiler", "Apple Silicon")
    assert all(word in crf.INSTALL_HINT for word in words)


@needs_pydensecrf
def test_the_crf_and_joblib_do_not_take_each_other_s_processes():
    from joblib import Parallel, delayed

    for _ in range(2):
        found = list(iterate_crf([scene()] * 3, SMALL, jobs=2))
        assert all(np.array_equal(labels, found[0]) for labels in found)
        assert Parallel(n_jobs=2)(delayed(abs)(i) for i in (-1, 2)) == [1, 2]
