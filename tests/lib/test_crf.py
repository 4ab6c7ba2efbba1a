import sys
import threading

import numpy as np
import pytest

from drs_lib import crf
from drs_lib.crf import CRFConfig, crf_over, dense_crf, iterate_crf

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


@needs_pydensecrf
@pytest.mark.parametrize(
    "config",
    [
        CRFConfig(iterations=1, bilateral_weight=0),
        CRFConfig(iterations=5, bilateral_weight=0),
        CRFConfig(iterations=1, gaussian_weight=0, bilateral_sxy=10, bilateral_srgb=40, bilateral_weight=1),
        CRFConfig(
            5, gaussian_sxy=2, gaussian_weight=1, bilateral_sxy=10, bilateral_srgb=40, bilateral_weight=2
        ),
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
def test_no_iterations_change_nothing():
    probabilities, image = scene()
    np.testing.assert_allclose(
        dense_crf(probabilities, image, CRFConfig(iterations=0)), probabilities, atol=1e-6
    )


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
def test_certain_pixels_and_views_are_fine_and_inputs_left_alone():
    probabilities, image = scene()
    hard = np.eye(3, dtype=np.float32)[probabilities.argmax(axis=0)].transpose(2, 0, 1)
    assert np.isfinite(dense_crf(hard, image, SMALL)).all()
    kept = probabilities.copy(), image.copy()
    expected = dense_crf(probabilities, image, SMALL)
    view = dense_crf(probabilities[:, ::-1], image[::-1], SMALL)
    np.testing.assert_array_equal(view, dense_crf(probabilities[:, ::-1].copy(), image[::-1].copy(), SMALL))
    np.testing.assert_array_equal(dense_crf(probabilities.astype(np.float64), image, SMALL), expected)
    np.testing.assert_array_equal(probabilities, kept[0])
    np.testing.assert_array_equal(image, kept[1])


@needs_pydensecrf
def test_many_images_give_the_same_on_one_and_two_processes():
    items = [scene(seed, height=10 + seed, width=20 - seed) for seed in range(9)]
    one = crf_over(items, SMALL, jobs=1, progress=False)
    two = crf_over(iter(items), SMALL, jobs=2, progress=False)
    for (probabilities, image), a, b in zip(items, one, two, strict=True):
        np.testing.assert_array_equal(a, dense_crf(probabilities, image, SMALL).argmax(axis=0))
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.uint8 and a.max() < 3


@needs_pydensecrf
@pytest.mark.parametrize("jobs", [1, 2])
def test_input_is_read_a_few_images_ahead_and_in_the_calling_thread(jobs):
    taken, threads = [], set()

    def items():
        for seed in range(20):
            taken.append(seed)
            threads.add(threading.get_ident())
            yield scene(seed)

    ahead = [len(taken) - done for done, _ in enumerate(iterate_crf(items(), SMALL, jobs, progress=False))]
    assert len(ahead) == 20 and max(ahead) <= 2 * jobs + 1
    assert threads == {threading.get_ident()}


@needs_pydensecrf
def test_workers_do_not_load_torch():
    from joblib.externals.loky import ProcessPoolExecutor

    loaded = "[name in __import__('sys').modules for name in ('drs_lib.crf', 'pydensecrf', 'torch')]"
    with ProcessPoolExecutor(max_workers=1) as executor:
        executor.submit(crf._label_map, *scene(0), SMALL, "lattice", None).result()
        found = tuple(executor.submit(eval, loaded).result())
    assert found == (True, True, False)


@needs_pydensecrf
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_item_is_named_and_the_next_call_works(jobs):
    items = [scene(0), scene(1), (scene(2)[0], scene(2)[1].astype(float))]
    with pytest.raises(ValueError, match="CRF item 2: .*uint8"):
        crf_over(items, SMALL, jobs, progress=False)
    assert len(crf_over(items[:2], SMALL, jobs, progress=False)) == 2
    assert crf_over([], SMALL, jobs, progress=False) == []


@needs_pydensecrf
def test_progress_counts_images(capsys):
    crf_over([scene(seed) for seed in range(3)], SMALL, jobs=1)
    assert "3/3" in capsys.readouterr().err


PROBABILITIES, IMAGE = scene()


@needs_pydensecrf
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


def test_presets_are_the_three_networks_of_table_4():
    def values(c):
        return c.gaussian_sxy, c.gaussian_weight, c.bilateral_sxy, c.bilateral_srgb, c.bilateral_weight

    assert values(CRFConfig.LARGEFOV_VGG16) == (3, 3, 140, 5, 5)
    assert values(CRFConfig.LARGEFOV_RESNET101) == (3, 3, 121, 5, 4)
    assert values(CRFConfig.ASPP_RESNET101) == (1, 3, 67, 3, 4)
    assert {c.iterations for c in (CRFConfig(), CRFConfig.LARGEFOV_RESNET101, CRFConfig.ASPP_RESNET101)} == {
        10
    }


def test_jobs_must_be_a_number_of_processes():
    for jobs in (0, -1, 1.5):
        with pytest.raises(ValueError if crf.available() else RuntimeError):
            crf_over([], jobs=jobs)


def test_without_pydensecrf_one_error_says_how_to_get_it(monkeypatch):
    for name in ("pydensecrf", "pydensecrf.densecrf"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not crf.available()
    for call in (lambda: dense_crf(PROBABILITIES, IMAGE), lambda: crf_over([(PROBABILITIES, IMAGE)], jobs=2)):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == crf.INSTALL_HINT
    assert all(
        word in crf.INSTALL_HINT for word in ("pip install pydensecrf2", "C++ compiler", "Apple Silicon")
    )


@needs_pydensecrf
def test_a_read_only_image_will_do():
    probabilities, image = scene()
    expected = dense_crf(probabilities, image, SMALL)
    image.flags.writeable = False  # as np.asarray(Image.open(path)) is
    assert np.array_equal(dense_crf(probabilities, image, SMALL), expected)


@needs_pydensecrf
def test_the_crf_and_joblib_do_not_take_each_other_s_processes():
    from joblib import Parallel, delayed

    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), (8, 9)).transpose(2, 0, 1)
    items = [(probabilities, rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))] * 3
    for _ in range(2):
        found = crf.crf_over(items, jobs=2, progress=False)
        assert all(np.array_equal(labels, found[0]) for labels in found)
        assert Parallel(n_jobs=2)(delayed(abs)(i) for i in (-1, 2)) == [1, 2]


@pytest.mark.parametrize(
    "config",
    [
        CRFConfig(iterations=1, bilateral_weight=0),
        CRFConfig(iterations=1, gaussian_weight=0, bilateral_sxy=10, bilateral_srgb=20),
        SMALL,
        CRFConfig.LARGEFOV_VGG16,
        CRFConfig(iterations=0),
    ],
    ids=["smoothness", "appearance", "both", "largefov", "no_iteration"],
)
def test_attention_is_the_exact_mean_field(config):
    probabilities, image = scene(labels=5)
    found = dense_crf(probabilities, image, config, engine="attention")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact_mean_field(probabilities, image, config), atol=2e-4)


def test_attention_in_chunks_is_the_same(monkeypatch):
    probabilities, image = scene(labels=9)
    whole = dense_crf(probabilities, image, SMALL, engine="attention")
    monkeypatch.setattr("drs_lib.crf_attention.MOST_PAIRS", 50 * image.shape[0] * image.shape[1])
    np.testing.assert_allclose(dense_crf(probabilities, image, SMALL, engine="attention"), whole, atol=1e-5)


def test_attention_on_a_gpu_is_that_on_the_processor():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    probabilities, image = scene(labels=21, height=96, width=128)
    on_gpu = dense_crf(probabilities, image, engine="attention", device="cuda")
    np.testing.assert_allclose(on_gpu, dense_crf(probabilities, image, engine="attention"), atol=2e-3)


def test_tiled_attention_takes_all_queries_at_once(monkeypatch):
    import torch

    from drs_lib import crf_attention

    probabilities, image = scene(labels=9)
    whole = dense_crf(probabilities, image, SMALL, engine="attention")
    calls = []

    def attention(queries, *args, **options):
        calls.append(queries.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(queries, *args, **options)

    monkeypatch.setattr(crf_attention, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(crf_attention, "_tiled", lambda queries, keys, values: True)
    monkeypatch.setattr(crf_attention, "MOST_PAIRS", 50 * image.shape[0] * image.shape[1])
    found = dense_crf(probabilities, image, SMALL, engine="attention")
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert calls == [image.shape[0] * image.shape[1]] * SMALL.iterations


@needs_pydensecrf
def test_the_engines_agree_on_nearly_all_pixels():
    same = []
    for seed in range(4):
        probabilities, image = scene(seed, labels=7, height=48, width=64)
        lattice, attention = (dense_crf(probabilities, image, engine=engine) for engine in crf.ENGINES)
        same.append((lattice.argmax(0) == attention.argmax(0)).mean())
        assert np.abs(lattice - attention).mean() < 0.005
    assert min(same) > 0.98 and np.mean(same) > 0.99


def test_attention_needs_no_pydensecrf_and_no_processes(monkeypatch):
    monkeypatch.setattr(crf, "available", lambda: False)
    monkeypatch.setattr(crf, "_parallel", None)
    items = [scene(seed) for seed in range(3)]
    labels = crf_over(items, SMALL, jobs=4, progress=False, engine="attention")
    for label, (probabilities, image) in zip(labels, items, strict=True):
        expected = dense_crf(probabilities, image, SMALL, engine="attention").argmax(0)
        np.testing.assert_array_equal(label, expected)
    with pytest.raises(RuntimeError, match="engine='attention'"):
        dense_crf(*items[0], SMALL)


@pytest.mark.parametrize("device", [None, "cpu", "cuda:1", "mps"])
def test_no_device_picks_another_engine(monkeypatch, device):
    """Not even where pydensecrf is missing: the two need not score the same."""
    probabilities, image = scene()
    monkeypatch.setattr(crf, "available", lambda: True)
    monkeypatch.setattr(crf, "_infer", lambda *arguments: "pydensecrf's")
    assert dense_crf(probabilities, image, SMALL, device=device) == "pydensecrf's"
    monkeypatch.setattr(crf, "available", lambda: False)
    with pytest.raises(RuntimeError, match="pip install pydensecrf2"):
        dense_crf(probabilities, image, SMALL, device=device)
    for engine in ("permutohedral", None):
        with pytest.raises(ValueError, match="'lattice', 'attention'"):
            dense_crf(probabilities, image, SMALL, engine, device)
