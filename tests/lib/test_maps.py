import numpy as np
import pytest
import torch
from torch import nn

from drs_lib import maps as localization
from drs_lib.data import normalize, without_masks
from drs_lib.maps import iterate_maps, keep_largest_class, localization_maps, refined_maps
from drs_lib.networks import classifier, refinement_network


class Grid(nn.Module):
    """A network whose output is easily known: 4x4 averages, mixed into C maps, which a reference can redo."""

    def __init__(self, classes=3, scale=1.0):
        super().__init__()
        self.mix = nn.Conv2d(3, classes, 1)
        with torch.no_grad():
            self.mix.weight.copy_(scale * torch.linspace(-1, 1, classes * 3).view(classes, 3, 1, 1))
            self.mix.bias.copy_(scale * torch.linspace(-0.2, 0.4, classes))
        self.dropout = nn.Dropout(0.9)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.shapes = []

    def output(self, x):
        self.shapes.append(tuple(x.shape))
        return self.dropout(self.mix(nn.functional.avg_pool2d(self.frozen(x), 4)))


class GridClassifier(Grid):
    class_maps = Grid.output


class GridRefinement(Grid):
    forward = Grid.output


def grid_output(model, image):
    """`Grid` in NumPy, float64: (3, H, W) -> (C, h, w)."""
    c, h, w = image.shape
    image = image.astype(np.float64)[:, : h // 4 * 4, : w // 4 * 4] / np.sqrt(1 + model.frozen.eps)
    pooled = image.reshape(c, h // 4, 4, w // 4, 4).mean(axis=(2, 4))
    weight, bias = (p.detach().double().numpy() for p in (model.mix.weight[:, :, 0, 0], model.mix.bias))
    return np.einsum("kc,chw->khw", weight, pooled) + bias[:, None, None]


def upsample(maps, size):
    """Bilinear with aligned corners: the first and last samples coincide."""
    for axis, length in ((1, size[0]), (2, size[1])):
        at = np.linspace(0, maps.shape[axis] - 1, length)
        low = np.minimum(np.floor(at).astype(int), maps.shape[axis] - 1)
        high = np.minimum(low + 1, maps.shape[axis] - 1)
        part = (at - low).reshape((-1, 1) if axis == 1 else (1, -1))
        maps = np.take(maps, low, axis) * (1 - part) + np.take(maps, high, axis) * part
    return maps


def equation_1(outputs, size, labels):
    """Upsample, ReLU, divide by the maximum (+ 1e-5), mask; the element-wise maximum over the scales."""
    result = 0
    for output in outputs:
        maps = np.maximum(upsample(output, size), 0)
        result = np.maximum(result, maps / (maps.max(axis=(1, 2), keepdims=True) + 1e-5))
    return result * np.asarray(labels)[:, None, None]


def random_images(n, h, w, seed=0):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("size", [None, (31, 50), 17])
def test_equation_1(size):
    model, images = GridClassifier(), random_images(2, 24, 32)
    maps = localization_maps(model, images, LABELS, size=size)
    side = {None: (24, 32), 17: (17, 17)}.get(size, size)
    for image, labels, got in zip(images.numpy(), LABELS.numpy(), maps, strict=True):
        expected = equation_1([grid_output(model, image)], side, labels)
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
    assert maps.dtype == torch.float32 and not maps.requires_grad


def test_scales_are_square_inputs_and_their_maximum_is_kept():
    model, images = GridClassifier(), random_images(2, 20, 20)
    maps = localization_maps(model, images, LABELS, scales=(12, 20, 28), size=(33, 21))
    assert model.shapes == [(2, 3, 12, 12), (2, 3, 20, 20), (2, 3, 28, 28)]
    for k in range(2):
        outputs = []
        for side in (12, 20, 28):
            resized = nn.functional.interpolate(images[k : k + 1].double(), (side, side), mode="bilinear")
            outputs.append(grid_output(model, resized[0].numpy()))
        np.testing.assert_allclose(maps[k], equation_1(outputs, (33, 21), LABELS[k].numpy()), atol=5e-6)


def test_without_labels_every_class_has_a_map():
    model, images = GridClassifier(), random_images(2, 16, 16)
    maps = localization_maps(model, images)
    peaks = maps.amax(dim=(2, 3))
    assert (peaks > 0.999).all() and (peaks < 1).all()
    assert torch.equal(localization_maps(model, images, torch.ones(2, 3)), maps)
    assert torch.equal(localization_maps(model, images, LABELS), maps * LABELS[:, :, None, None])
    assert localization_maps(model, images, torch.zeros(2, 3)).count_nonzero() == 0


def test_a_class_map_without_positive_values_gives_zeros():
    model = GridClassifier(scale=0.0)
    with torch.no_grad():
        model.mix.bias.copy_(torch.tensor([-1.0, 0.0, 1e-30]))
    maps = localization_maps(model, random_images(1, 8, 8))
    assert torch.isfinite(maps).all() and maps.max() < 1e-20


def test_modes_are_restored_and_no_graph_is_kept():
    model = GridClassifier().train()
    model.frozen.eval()
    images = random_images(1, 8, 8)
    first = localization_maps(model, images)
    assert torch.equal(first, localization_maps(model, images)), "dropout was at work"
    assert model.training and model.dropout.training and not model.frozen.training
    model.class_maps = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        localization_maps(model, images)
    assert model.training and model.dropout.training and not model.frozen.training
    target = (torch.ones_like(first, requires_grad=True) - first).square().sum()
    target.backward()  # maps can be targets of a loss


def test_refined_maps_are_clipped_and_masked_and_renormalised_on_request():
    model, images = GridRefinement(scale=2.0), random_images(2, 24, 32)
    plain = refined_maps(model, images, LABELS, size=(30, 40))
    normal = refined_maps(model, images, LABELS, renormalize=True, size=(30, 40))
    outside = 0
    for k in range(2):
        output = upsample(grid_output(model, images[k].numpy()), (30, 40))
        outside += (output > 1).sum() * (output < 0).sum()
        expected = np.clip(output, 0, 1) * LABELS[k].numpy()[:, None, None]
        np.testing.assert_allclose(plain[k], expected, atol=2e-6)
        expected /= expected.max(axis=(1, 2), keepdims=True) + 1e-5
        np.testing.assert_allclose(normal[k], expected, atol=2e-6)
    assert outside, "the output must leave [0, 1] for this test to mean something"


def test_refined_maps_of_several_scales():
    model, images = GridRefinement(), random_images(2, 16, 16)
    both = refined_maps(model, images, LABELS, scales=(16, 24))
    each = [refined_maps(model, images, LABELS, scales=(side,)) for side in (16, 24)]
    assert torch.equal(both, torch.maximum(*each)) and not torch.equal(*each)


def test_keep_largest_class():
    maps = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    maps[0, :, 0, 0] = torch.tensor([0.1, 0.7, 0.7, 0.2])
    maps[0, :, 0, 1] = 0
    kept = maps.clone()
    out = keep_largest_class(maps)
    for i, y, x in np.ndindex(2, 5, 6):
        winner = maps[i, :, y, x].argmax()
        expected = torch.zeros(4)
        expected[winner] = maps[i, winner, y, x]
        assert torch.equal(out[i, :, y, x], expected)
    assert out[0, 1, 0, 0] == maps[0, 1, 0, 0] and out[0, 2, 0, 0] == 0
    assert torch.equal(keep_largest_class(maps[0]), out[0]) and torch.equal(maps, kept)


class Pictures:
    """A data set of random images of the given sizes, whose masks must not be touched."""

    def __init__(self, sizes, classes=3):
        rng = np.random.default_rng(0)
        self.images = [torch.from_numpy(rng.integers(0, 256, (3, *s), np.uint8)) for s in sizes]
        self.labels = torch.from_numpy(rng.integers(0, 2, (len(sizes), classes)).astype(np.float32))
        self.names = [str(i) for i in range(len(sizes))]
        self.classes, self.num_classes, self.fingerprint = ("a", "b", "c"), classes, "pictures"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def saliency(self, index):
        raise AssertionError("maps need no saliency")

    mask = saliency


SIZES = [(16, 24), (24, 16), (16, 24), (20, 20), (16, 24), (24, 16), (16, 24)]


@pytest.mark.parametrize(
    "network, make", [(GridClassifier, localization_maps), (GridRefinement, refined_maps)]
)
@pytest.mark.parametrize("options", [{}, {"scales": (12, 20)}])
def test_iterate_maps_is_the_batched_same(network, make, options):
    model, pictures = network(), Pictures(SIZES)
    results = list(iterate_maps(model, without_masks(pictures), batch_size=4, **options))
    if not options:  # the first four images are of three sizes, the other three of two
        sizes = [(2, 16, 24), (1, 24, 16), (1, 20, 20), (2, 16, 24), (1, 24, 16)]
        assert model.shapes == [(n, 3, height, width) for n, height, width in sizes]
    assert [index for index, _, _ in results] == list(range(7))
    assert sum(maps.count_nonzero() > 0 for *_, maps in results) > 2
    for index, labels, maps in results:
        image, expected_labels = pictures[index]
        expected = make(model, normalize(image)[None], expected_labels[None], **options)[0]
        assert torch.equal(labels, expected_labels)
        assert maps.shape == (3, *SIZES[index]) and maps.dtype == torch.float32
        torch.testing.assert_close(maps, expected, atol=2e-6, rtol=0)


def test_iterate_maps_with_a_square_network_input():
    model, pictures = GridClassifier(), Pictures(SIZES)
    results = list(iterate_maps(model, pictures, batch_size=5, resize=20))
    assert model.shapes == [(5, 3, 20, 20), (2, 3, 20, 20)]
    for index, labels, maps in results:
        square = nn.functional.interpolate(
            pictures[index][0][None], (20, 20), mode="bilinear", antialias=True
        )
        expected = localization_maps(model, normalize(square), labels[None], size=SIZES[index])[0]
        torch.testing.assert_close(maps, expected, atol=2e-6, rtol=0)


def test_iterate_maps_takes_batches_as_older_torch_pins_them(monkeypatch):
    """For CUDA, torch 2.6 copies a batch to pinned memory and makes its tuples lists, the inner ones too."""

    def pinned(batch):
        return [pinned(part) for part in batch] if isinstance(batch, (list, tuple)) else batch

    model, pictures = GridClassifier(), Pictures(SIZES)
    expected = list(iterate_maps(model, pictures, batch_size=5, resize=20))
    group = localization._group_by_size
    monkeypatch.setattr(localization, "_group_by_size", lambda items: pinned(group(items)))
    for before, now in zip(expected, iterate_maps(model, pictures, batch_size=5, resize=20), strict=True):
        assert before[0] == now[0] and torch.equal(before[2], now[2])


def test_iterate_maps_over_chosen_indices_with_workers_and_renormalised():
    pictures, model = Pictures(SIZES), GridRefinement()
    chosen = list(
        iterate_maps(model, pictures, batch_size=3, indices=[5, 0, 5, 3], workers=1, renormalize=True)
    )
    assert [index for index, _, _ in chosen] == [5, 0, 5, 3]
    assert torch.equal(chosen[0][2], chosen[2][2])
    everything = {i: maps for i, _, maps in iterate_maps(model, pictures, renormalize=True)}
    for index, _, maps in chosen:
        torch.testing.assert_close(maps, everything[index], atol=2e-6, rtol=0)
    assert list(iterate_maps(model, pictures, indices=[])) == []


def test_iterate_maps_leaves_no_trace():
    model, pictures = GridClassifier().train(), Pictures(SIZES)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for _ in iterate_maps(model, pictures, batch_size=2):
        assert model.dropout.training and torch.is_grad_enabled()
        break
    assert torch.equal(torch.rand(4), expected), "the global random stream has moved"


def test_present_only_leaves_out_the_maps_of_zeros():
    model, pictures = GridClassifier(), Pictures(SIZES)
    pictures.labels[1] = 0
    present = list(iterate_maps(model, pictures, batch_size=4, present_only=True))
    for (_, labels, maps), (_, _, everything) in zip(present, iterate_maps(model, pictures), strict=True):
        torch.testing.assert_close(maps, everything[labels > 0] if labels.any() else everything[:1])
    assert present[1][2].shape == (1, 24, 16) and not present[1][2].any()


IMAGES = random_images(2, 16, 16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: localization_maps(m, IMAGES[0]), r"\(N, 3, H, W\).*got torch.float32 \(3, 16, 16\)"),
        (lambda m: localization_maps(m, IMAGES.to(torch.uint8)), "normalised by drs_lib.data.normalize"),
        (lambda m: localization_maps(m, IMAGES.numpy()), "got ndarray"),
        (lambda m: localization_maps(m, IMAGES, LABELS[:1]), r"\(2, 3\); got \(1, 3\)"),
        (lambda m: localization_maps(m, IMAGES, LABELS * 0.5), "multi-hot"),
        (lambda m: localization_maps(m, IMAGES, scales=()), "sides of squares"),
        (lambda m: localization_maps(m, IMAGES, scales=320), "sides of squares"),
        (lambda m: localization_maps(m, IMAGES, scales=(0.5, 1)), "sides of squares"),
        (lambda m: localization_maps(m, IMAGES * float("nan")), "NaN or infinity.*diverged"),
        (lambda m: localization_maps(m, IMAGES * float("inf")), "NaN or infinity"),
        (lambda m: localization_maps(GridRefinement(), IMAGES), "no class_maps.*refined_maps"),
        (lambda m: refined_maps(GridRefinement(), IMAGES * float("nan")), "NaN or infinity"),
        (lambda m: iterate_maps(m, Pictures(SIZES), renormalize=True), "renormalize is for refined maps"),
        (lambda m: iterate_maps(m, Pictures(SIZES), resize=(3, 3)), "side of a square"),
        (lambda m: iterate_maps(m, Pictures(SIZES), scales=(-1,)), "sides of squares"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call(GridClassifier())


def test_a_classifier_given_as_refinement_network_is_noticed():
    model = classifier("mini", 3)
    with pytest.raises(ValueError, match=r"gives shape \(2, 3\), not maps.*localization_maps"):
        refined_maps(model, random_images(2, 64, 64))


def test_the_real_networks():
    torch.manual_seed(0)
    pictures = Pictures([(64, 64)] * 3)
    for model, make in (
        (classifier("mini", 3), localization_maps),
        (refinement_network("mini", 3), refined_maps),
    ):
        images = normalize(torch.stack(pictures.images))
        expected = make(model, images, pictures.labels)
        assert expected.shape == (3, 3, 64, 64) and 0 <= expected.min() and expected.max() <= 1
        for index, _, maps in iterate_maps(model, pictures, batch_size=3):
            torch.testing.assert_close(maps, expected[index], atol=1e-5, rtol=0)
        assert model.training
