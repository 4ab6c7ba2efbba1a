import colorsys

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import interpolate

from drs_lib.data import IMAGENET_MEAN, IMAGENET_STD, normalize, resize_square, training_transform


def coordinates(height, width):
    """An image, label map and float map that know where they come from: green holds y, blue holds x."""
    y, x = np.mgrid[:height, :width]
    image = torch.from_numpy(np.stack([np.full_like(y, 7), y, x]).astype(np.uint8))
    return image, (y % 200).astype(np.uint8), torch.from_numpy(np.stack([y, x]) / 255.0).float()


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7)])
def test_normalize_is_the_textbook_formula(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    before = images.clone()
    mean, std = (np.array(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    result = normalize(images)
    assert result.dtype == torch.float32 and torch.equal(images, before)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)
    images = images.view(-1, *shape[-3:]).to(memory_format=torch.channels_last)
    assert normalize(images).is_contiguous(memory_format=torch.channels_last)


def test_normalize_refuses_floats_and_other_layouts():
    with pytest.raises(ValueError, match="normalised before"):
        normalize(torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match="shape"):
        normalize(torch.zeros(4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3, 20, 33), (2, 3, 16, 16), (3, 12, 12)])
def test_resize_square_is_antialiased_bilinear(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = resize_square(images, 12)
    exact = interpolate(images.double().view(-1, *shape[-3:]), (12, 12), mode="bilinear", antialias=True)
    assert found.dtype == torch.uint8 and found.shape == (*shape[:-2], 12, 12)
    # Rows and columns are rounded one after the other, by half a grey level each at most.
    assert (found.double() - exact.view_as(found)).abs().max() < 1 + 1e-6
    assert resize_square(images, None) is images and (shape[-1] != 12 or found is images)


def test_everything_off_changes_nothing(recwarn):
    image, mask, maps = coordinates(20, 30)
    mask.flags.writeable = False  # a memory map, for one
    out = training_transform(flip=False)(image, mask, maps)
    assert all(map(torch.equal, out, (image, torch.from_numpy(mask.copy()), maps))) and not recwarn.list


def test_flip_takes_all_targets_along():
    torch.manual_seed(0)
    image, mask, maps = coordinates(8, 12)
    items = image, torch.from_numpy(mask), maps
    transform, seen = training_transform(), set()
    for _ in range(20):
        new = transform(image, mask, maps)
        flipped = bool(new[0][2, 0, 0] == 11)
        seen.add(flipped)
        assert all(torch.equal(a, b.flip(-1) if flipped else b) for a, b in zip(new, items, strict=True))
    assert len(seen) == 2


def test_crop_is_the_same_window_everywhere():
    torch.manual_seed(1)
    image, mask, maps = coordinates(10, 9)
    items = image, torch.from_numpy(mask), maps
    transform = training_transform(crop=8, flip=False)
    for _ in range(20):
        new = transform(image, mask, maps)
        y, x = int(new[0][1, 0, 0]), int(new[0][2, 0, 0])
        window = slice(y, y + 8), slice(x, x + 8)
        assert all(torch.equal(a, b[(..., *window)]) for a, b in zip(new, items, strict=True))


def test_small_images_are_padded_with_mean_255_and_0():
    image, mask, maps = coordinates(6, 20)
    new_image, new_mask, new_maps = training_transform(crop=10, flip=False)(image, mask, maps)
    assert new_image.shape == (3, 10, 10) and new_mask.shape == (10, 10) and new_maps.shape == (2, 10, 10)
    assert new_mask[6:].eq(255).all() and not new_mask[:6].eq(255).any()
    assert new_maps[:, 6:].eq(0).all()
    assert normalize(new_image)[:, 6:].abs().max() < 0.01
    assert torch.equal(new_image[1, :6, 0], torch.arange(6, dtype=torch.uint8))


def test_resize_keeps_labels_whole_and_where_the_image_has_them():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    mask = np.zeros((40, 60), np.uint8)
    image[:, 10:30, 15:45] = 200
    mask[10:30, 15:45] = 7
    mask[:4] = 255
    new_image, new_mask, maps = training_transform(resize=87, flip=False)(image, mask, image.float() / 255)
    assert new_image.shape == (3, 87, 87) and set(new_mask.unique().tolist()) == {0, 7, 255}
    inside = new_image[0] > 100
    assert torch.equal(inside, new_mask == 7)
    assert (maps[0] - new_image[0] / 255).abs().max() < 0.01


def test_scale_takes_a_label_map_along_and_all_of_its_choices():
    torch.manual_seed(2)
    image, mask, _ = coordinates(40, 20)
    scaled = [training_transform(scale=(0.5, 1, 1.5))(image, mask) for _ in range(40)]
    assert {tuple(image.shape[1:]) for image, _ in scaled} == {(20, 10), (40, 20), (60, 30)}
    assert all(image.shape[1:] == mask.shape for image, mask in scaled)


def test_jitter_touches_the_image_only():
    torch.manual_seed(3)
    image, mask, maps = coordinates(16, 16)
    transform = training_transform(flip=False, jitter=(0.3, 0.3, 0.3, 0.1))
    new_image, new_mask, new_maps = transform(image, mask, maps)
    assert new_image.dtype == torch.uint8 and not torch.equal(new_image, image)
    assert torch.equal(new_mask, torch.from_numpy(mask)) and torch.equal(new_maps, maps)


def test_bad_arguments_and_samples_are_refused():
    for name, values in {
        "crop": [0],
        "resize": [3.5],
        "scale": [(1.5, 0.5), (1,), (0, 1)],
        "jitter": [(1, 1)],
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                training_transform(**{name: value})
    image, mask, maps = coordinates(8, 8)
    for sample, message in (
        ((image.float(), mask), "uint8"),
        ((image, mask[:4]), "same size"),
        ((image, (maps * 255).to(torch.uint8)), "label map"),
    ):
        with pytest.raises(ValueError, match=message):
            training_transform()(*sample)


def samples(sizes, seed=0):
    """Images, one of them grey, with a label map and float maps of a different number for each."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    images[-1] = images[-1][:1].repeat(3, 1, 1)
    masks = [torch.randint(0, 5, size, dtype=torch.uint8, generator=generator).numpy() for size in sizes]
    maps = [torch.rand(1 + k % 3, *size, generator=generator) for k, size in enumerate(sizes)]
    return images, masks, maps


@pytest.mark.parametrize("crop", [None, 10])
@pytest.mark.parametrize("resize", [None, 12])
@pytest.mark.parametrize("scale", [None, (0.5, 1.5), (0.5, 1, 1.5)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("jitter", [None, (0.3, 0.3, 0.3, 0.1)])
def test_a_batch_is_its_samples_one_after_the_other(crop, resize, scale, flip, jitter):
    transform = training_transform(crop=crop, resize=resize, scale=scale, flip=flip, jitter=jitter)
    sizes = [(16, 14), (9, 25), (7, 8), (10, 10), (30, 21)]
    if crop is None and (resize is None or scale is not None):
        sizes = [(9, 25)] * (1 if scale else 4)  # nothing would bring others to one size
    images, masks, maps = samples(sizes)
    torch.manual_seed(5)
    singles = [*zip(*map(transform, images, masks, maps), strict=True)]
    after = torch.rand(1)
    torch.manual_seed(5)
    batch = transform.batch(images, masks, maps)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(batch[0], torch.stack(singles[0])) and batch[0].dtype == torch.uint8
    for ours, theirs in zip(batch[1:], singles[1:], strict=True):
        assert type(ours) is list and all(map(torch.equal, ours, theirs))
    torch.manual_seed(5)
    (images,) = transform.batch(images)
    assert torch.equal(images, batch[0])


def test_bad_batches_are_refused():
    transform = training_transform()
    images, masks, _ = samples([(8, 8), (8, 9)])
    with pytest.raises(ValueError, match=r"different sizes \(8x8, 8x9\).*crop or resize"):
        transform.batch(images, masks)
    with pytest.raises(ValueError, match="same size"):
        transform.batch(images, masks[::-1])


def test_jitter_by_the_definitions():
    """One colour, its hue turned by a third and its brightness halved, without torchvision."""
    colour = (200, 120, 40)
    image = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).repeat(1, 4, 4)
    transform = training_transform(jitter=(0.5, 0, 0, 0.5))
    draws = [
        {"fn_idx": torch.tensor(order), "brightness_factor": 0.5, "contrast_factor": None,
         "saturation_factor": None, "hue_factor": hue}
        for order, hue in (([0, 1, 2, 3], 1 / 3), ([3, 2, 1, 0], -1 / 3))
    ]  # fmt: skip
    hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in colour))
    for draw in draws:
        (result,) = transform(image, draw=([0.0] * 4, draw))
        expected = colorsys.hsv_to_rgb((hue + draw["hue_factor"]) % 1, saturation, value / 2)
        assert (result[:, 0, 0] - torch.tensor(expected) * 255).abs().max() <= 1
        assert result.flatten(1).unique(dim=1).shape[1] == 1


def test_geometry_has_the_distribution_it_says():
    """Flips half of the time, crop corners all alike, scale factors uniform."""
    torch.manual_seed(7)
    count, batch = 4000, 200
    image, mask, _ = coordinates(10, 9)
    transform = training_transform(crop=6)
    corners, flips = np.zeros((5, 4)), 0
    for _ in range(count // batch):
        (images,) = transform.batch([image] * batch)
        flipped = images[:, 2, 0, 0] > images[:, 2, 0, -1]
        flips += int(flipped.sum())
        left = torch.where(flipped, images[:, 2, 0, -1], images[:, 2, 0, 0])
        np.add.at(corners, (images[:, 1, 0, 0].numpy(), left.numpy()), 1)
    assert stats.binomtest(flips, count).pvalue > 1e-3
    assert stats.chisquare(corners.ravel()).pvalue > 1e-3

    transform = training_transform(crop=300, scale=(0.5, 1.5), flip=False)
    tall, heights = torch.zeros(3, 200, 2, dtype=torch.uint8), []
    for _ in range(10):
        _, labels = transform.batch([tall] * 100, [tall[0]] * 100)
        heights += [int((label[:, 0] != 255).sum()) for label in labels]
    assert stats.kstest(heights, stats.uniform(100, 200).cdf).pvalue > 1e-3


def test_brightness_is_drawn_uniformly_and_anew_for_each_image():
    torch.manual_seed(8)
    image = torch.randint(90, 150, (3, 6, 6), dtype=torch.uint8)
    (images,) = training_transform(jitter=(0.2, 0, 0, 0), flip=False).batch([image] * 2000)
    factors = images.float().mean((1, 2, 3)) / image.float().mean()
    assert stats.kstest(factors.numpy(), stats.uniform(0.796, 0.404).cdf).pvalue > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_batch_on_a_gpu_waits_for_nothing():
    transform = training_transform(crop=40, scale=(0.5, 1.5), jitter=(0.3, 0.3, 0.3, 0.1))
    images, masks, maps = samples([(50, 44), (30, 60), (41, 41), (20, 20)])
    masks = [torch.from_numpy(mask) for mask in masks]
    there = [[item.cuda() for item in items] for items in (images, masks, maps)]
    torch.manual_seed(9)
    expected = transform.batch(images, masks, maps)
    transform.batch(*there)  # constants go to the device once
    torch.manual_seed(9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = transform.batch(*there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result[0].is_cuda
    difference = (result[0].cpu().int() - expected[0].int()).abs()
    assert difference.float().mean() < 0.5 and difference.max() <= 8  # resizing rounds differently there
    torch.testing.assert_close([labels.cpu() for labels in result[1]], expected[1], atol=0, rtol=0)
    torch.testing.assert_close([maps.cpu() for maps in result[2]], expected[2], atol=1e-4, rtol=0)
