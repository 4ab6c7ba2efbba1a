"""A tiny data set in memory, and a tiny tree in VOC's layout."""

import numpy as np
import torch
from PIL import Image

from drs_lib.data.voc import VOC_CLASSES, save_indexed_png


class TinyDataset:
    """Coloured shapes on noise, with the interface of the library's data sets: 1 or 2 of the classes "disc",
    "square" and "triangle" in every image. The same arguments give the same images.

    ``forbid_masks=True`` makes ``.mask()`` fail the test that calls it.
    """

    classes = ("disc", "square", "triangle")
    num_classes = 3

    def __init__(self, length=8, size=64, seed=0, forbid_masks=False):
        self.forbid_masks = forbid_masks
        self.split = "train"
        self.names = [f"tiny_{seed}_{i:03d}" for i in range(length)]
        self.fingerprint = f"tiny-{length}-{size}-{seed}"
        rng = np.random.default_rng(seed)
        self.images = rng.integers(90, 150, (length, size, size, 3)).astype(np.uint8)
        self.masks = np.zeros((length, size, size), np.uint8)
        y, x = np.mgrid[:size, :size].astype(np.float64)
        colours = np.array([(220, 40, 40), (40, 200, 60), (50, 70, 230)])
        for i in range(length):
            for k, label in enumerate(sorted({i % 3, int(rng.integers(3))})):
                cx, cy = size * (0.27 + 0.46 * k), size * rng.uniform(0.3, 0.7)
                r = size * rng.uniform(0.14, 0.2)
                inside = (
                    np.hypot(x - cx, y - cy) < r,
                    np.maximum(np.abs(x - cx), np.abs(y - cy)) < r,
                    (np.abs(x - cx) < (y - cy + r) / 2) & (y - cy < r),
                )[label]
                self.masks[i][inside] = label + 1
                self.images[i][inside] = colours[label] + rng.integers(-20, 20, (int(inside.sum()), 3))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        labels = torch.zeros(3)
        for value in np.unique(self.masks[index]).tolist():
            if value:
                labels[value - 1] = 1
        return torch.from_numpy(self.images[index]).permute(2, 0, 1).contiguous(), labels

    def saliency(self, index):
        return (self.masks[index] > 0).astype(np.uint8) * 230 + 10

    def mask(self, index):
        assert not self.forbid_masks, "a mask was read where none may be"
        return self.masks[index].copy()


def write_voc_tree(root, train=6, val=3, own_classes=True):
    """A tree in VOC's layout with images of different sizes, one of them greyscale, and 255 around every
    object.

    Every image has a large rectangle of one class, every second one a smaller rectangle of another. With
    ``own_classes`` the tree has a classes.txt (VOC's twenty), so that its short lists are its own affair.
    """
    tree = root / "VOC2012"
    folders = ("SegmentationClass", "SegmentationClassAug")
    for folder in ("JPEGImages", "ImageSets/Segmentation", *folders, "saliency_map"):
        (tree / folder).mkdir(parents=True)
    rng = np.random.default_rng(7)
    names = [f"2007_{i:06d}" for i in range(1, train + val + 1)]
    for i, name in enumerate(names):
        height, width = 48 + 7 * (i % 3), 64 - 5 * (i % 4)
        mask = np.zeros((height, width), np.uint8)
        boxes = [(i % 20 + 1, 6, 4, 34, 30)] + ([((i + 7) % 20 + 1, 28, 36, 42, 46)] if i % 2 else [])
        for value, top, left, bottom, right in boxes:
            mask[top - 2 : bottom + 2, left - 2 : right + 2] = 255
            mask[top:bottom, left:right] = value
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        pixels[mask > 0] = (pixels[mask > 0] // 4 + 120).astype(np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if i == 1 else image).save(tree / "JPEGImages" / f"{name}.jpg", quality=95)
        for folder in folders:
            save_indexed_png(tree / folder / f"{name}.png", mask)
        saliency = np.where(mask > 0, 220, 12).astype(np.uint8)
        Image.fromarray(saliency).save(tree / "saliency_map" / f"{name}.png")
    lists = {"train": names[:train], "val": names[train:], "trainaug": names[:train], "trainval": names}
    for split, group in lists.items():
        path = tree / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.write_text("\n".join(group) + "\n", encoding="utf-8")
    if own_classes:
        (tree / "classes.txt").write_text("\n".join(VOC_CLASSES) + "\n", encoding="utf-8")
    return tree
