import numpy as np
import pytest
import torch

from drs_lib.data import IMAGENET_MEAN, IMAGENET_STD, normalize, training_transform


def coordinates(height, width):
    """An image, label map and float map that know where they come from: green holds y, blue holds x."""
    y, x = np.mgrid[:height, :width]
    image = torch.from_numpy(np.stack([np.full_like(y, 7), y, x]).astype(np.uint8))
    return image, (y % 200).astype(np.uint8), torch.from_numpy(np.stack([y, x]) / 255.0).float()


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7)])
def test_normalize_is_the_textbook_formula(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean, std = (np.array(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    result = normalize(images)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_normalize_keeps_channels_last_and_its_argument():
    images = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8).to(memory_format=torch.channels_last)
    before = images.clone()
    assert normalize(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_normalize_refuses_floats_and_other_layouts():
    with pytest.raises(ValueError, match="normalised before"):
        normalize(torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match="shape"):
        normalize(torch.zeros(4, 4, 3, dtype=torch.uint8))


def test_everything_off_changes_nothing():
    image, mask, maps = coordinates(20, 30)
    out = training_transform(flip=False)(image, mask, maps)
    assert (
        torch.equal(out[0], image)
        and torch.equal(out[1], torch.from_numpy(mask))
        and torch.equal(out[2], maps)
    )


def test_flip_takes_all_targets_along_half_of_the_time():
    torch.manual_seed(0)
    image, mask, maps = coordinates(8, 12)
    transform = training_transform()
    flips = 0
    for _ in range(200):
        new_image, new_mask, new_maps = transform(image, mask, maps)
        flipped = bool(new_image[2, 0, 0] == 11)
        flips += flipped
        assert torch.equal(new_image, image.flip(-1) if flipped else image)
        assert torch.equal(new_mask, torch.from_numpy(mask).flip(-1) if flipped else torch.from_numpy(mask))
        assert torch.equal(new_maps, maps.flip(-1) if flipped else maps)
    assert 70 < flips < 130


def test_crop_is_the_same_window_everywhere_and_reaches_every_position():
    torch.manual_seed(1)
    image, mask, maps = coordinates(10, 9)
    transform = training_transform(crop=8, flip=False)
    corners = set()
    for _ in range(200):
        new_image, new_mask, new_maps = transform(image, mask, maps)
        y, x = int(new_image[1, 0, 0]), int(new_image[2, 0, 0])
        corners.add((y, x))
        assert torch.equal(new_image, image[:, y : y + 8, x : x + 8])
        assert torch.equal(new_mask, torch.from_numpy(mask)[y : y + 8, x : x + 8])
        assert torch.equal(new_maps, maps[:, y : y + 8, x : x + 8])
    assert corners == {(y, x) for y in range(3) for x in range(2)}


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


def test_scale_covers_its_range_or_its_choices():
    torch.manual_seed(2)
    image, mask, _ = coordinates(40, 20)
    sizes = [training_transform(scale=(0.5, 1.5))(image, mask) for _ in range(60)]
    heights = [new_image.shape[1] for new_image, _ in sizes]
    assert all(new_image.shape[1:] == new_mask.shape for new_image, new_mask in sizes)
    assert min(heights) >= 20 and max(heights) <= 60 and min(heights) < 26 and max(heights) > 54
    choices = {tuple(training_transform(scale=(0.5, 1, 1.5))(image)[0].shape[1:]) for _ in range(40)}
    assert choices == {(20, 10), (40, 20), (60, 30)}


def test_jitter_touches_the_image_only():
    torch.manual_seed(3)
    image, mask, maps = coordinates(16, 16)
    new_image, new_mask, new_maps = training_transform(flip=False, jitter=(0.3, 0.3, 0.3, 0.1))(
        image, mask, maps
    )
    assert new_image.dtype == torch.uint8 and not torch.equal(new_image, image)
    assert torch.equal(new_mask, torch.from_numpy(mask)) and torch.equal(new_maps, maps)


def test_the_seed_decides():
    image, mask, _ = coordinates(50, 50)
    transform = training_transform(crop=20, resize=40, scale=(0.5, 1.5), jitter=(0.3, 0.3, 0.3, 0.1))
    torch.manual_seed(4)
    first = transform(image, mask)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(first, transform(image, mask), strict=True))
    assert not torch.equal(first[0], transform(image, mask)[0])


def test_read_only_arrays_work_without_a_warning(recwarn):
    image, mask, _ = coordinates(8, 8)
    mask.flags.writeable = False
    training_transform(crop=4)(image, mask)
    assert not recwarn.list


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop": 0},
        {"resize": 3.5},
        {"scale": (1.5, 0.5)},
        {"scale": (1,)},
        {"scale": (0, 1)},
        {"jitter": (0.1, 0.1)},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        training_transform(**arguments)


def test_bad_samples_are_refused():
    image, mask, maps = coordinates(8, 8)
    transform = training_transform()
    with pytest.raises(ValueError, match="uint8"):
        transform(image.float(), mask)
    with pytest.raises(ValueError, match="same size"):
        transform(image, mask[:4])
    with pytest.raises(ValueError, match="label map"):
        transform(image, (maps * 255).to(torch.uint8))
