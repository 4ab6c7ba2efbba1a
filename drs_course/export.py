"""Write any data set as a VOC development kit, so that the path for real VOC data can be run on it.

    export_voc({"train": Critters("train"), "val": Critters("val")}, "DIR")

`VOC2012("DIR", "train")` reads it back.
"""

import os
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import max_pool2d
from torchvision.ops import masks_to_boxes
from tqdm.auto import tqdm

from drs_lib.data.voc import MASK_FOLDERS, save_indexed_png
from drs_lib.labels import IGNORED


def _components(region):
    """Boxes (top, left, bottom, right), ends included, of the 8-connected parts of a boolean (H, W)."""
    region = torch.from_numpy(np.asarray(region))
    # Every pixel takes the largest number among its neighbours', until all of a part have the same.
    parts = (torch.arange(1.0, region.numel() + 1).view(region.shape) * region)[None]
    while not torch.equal(parts, spread := max_pool2d(parts, 3, 1, 1) * region):
        parts = spread
    numbers = parts.unique()
    boxes = masks_to_boxes(parts == numbers[numbers > 0][:, None, None]).int().tolist()
    return sorted((top, left, bottom, right) for left, top, right, bottom in boxes)


def _annotation(name, mask, classes):
    """VOC's annotation of one image. Pixels count from 1, as they do in VOC."""
    height, width = mask.shape
    size = [("width", width), ("height", height), ("depth", 3)]
    found = [("folder", "VOC2012"), ("filename", f"{name}.jpg"), ("size", size), ("segmented", 1)]
    for value, class_name in enumerate(classes, 1):
        for top, left, bottom, right in _components(mask == value):
            cut = top == 0 or left == 0 or bottom == height - 1 or right == width - 1
            box = [("xmin", left + 1), ("ymin", top + 1), ("xmax", right + 1), ("ymax", bottom + 1)]
            thing = [("name", class_name), ("pose", "Unspecified"), ("truncated", int(cut)), ("difficult", 0)]
            found.append(("object", [*thing, ("bndbox", box)]))
    root = _element("annotation", found)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _element(tag, content):
    element = ElementTree.Element(tag)
    if isinstance(content, list):
        element.extend(_element(*pair) for pair in content)
    else:
        element.text = str(content)
    return element


def _ids(splits):
    """File names: the data sets' own, with the split in front if two splits share some."""
    names = {split: list(dataset.names) for split, dataset in splits.items()}
    everything = sum(names.values(), [])
    if len(set(everything)) < len(everything):
        names = {split: [f"{split}_{name}" for name in group] for split, group in names.items()}
        everything = sum(names.values(), [])
    strange = [n for n in everything if n != Path(n).name or n.split() != [n] or set(n) & set('\\:*?"<>|')]
    if strange or len(set(everything)) < len(everything):
        found = (strange or everything)[0]
        raise ValueError(f"names must be different and fit for files; found e.g. {found!r}")
    return names


def export_voc(splits, root, *, progress=True):
    """Write data sets as ``root``/VOC2012 in VOC's layout, with a ``classes.txt`` that `VOC2012` reads.

    Images become JPEG at quality 95 without colour subsampling, masks indexed PNG (under SegmentationClass
    and SegmentationClassAug alike), saliency maps 8-bit greyscale PNG; annotations carry a bounding box for
    every connected part of a class. Next to the given lists there are ``trainval`` (all of them) and, if
    there is a split "train" and no "trainaug", ``trainaug`` (the same images as train). The tree appears when
    it is complete.

    Args:
        splits: dict of split name to data set, e.g. ``{"train": Critters("train"), "val": Critters("val")}``.
        root: the folder that will hold VOC2012.

    Returns:
        The path of the VOC2012 folder.

    Raises:
        FileExistsError: there is a VOC2012 folder already.
        ValueError: no data, data sets of different classes, names that can't be file names, or an image whose
            labels are not the classes of its mask (a reader would get other labels than the data set gave).
    """
    splits = dict(splits)
    if not splits or any(len(dataset) == 0 for dataset in splits.values()):
        raise ValueError("nothing to export: pass {split name: data set}, none of them empty")
    classes = {tuple(dataset.classes) for dataset in splits.values()}
    if len(classes) > 1:
        raise ValueError(f"the data sets have different classes: {', '.join(map(str, classes))}")
    (classes,) = classes
    names = _ids(splits)
    target = Path(root).expanduser() / "VOC2012"
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or choose another root")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".VOC2012-", dir=target.parent) as work:
        tree = Path(work) / "VOC2012"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", *MASK_FOLDERS, "saliency_map"):
            (tree / folder).mkdir(parents=True)
        for split, dataset in splits.items():
            written = tqdm(names[split], desc=f"export {split}", unit="image", disable=not progress)
            for index, name in enumerate(written):
                _write(tree, dataset, index, name, classes)
        lists = {"trainval": sum(names.values(), []), **names}
        if "train" in names:
            lists.setdefault("trainaug", names["train"])
        for split, group in lists.items():
            path = tree / "ImageSets" / "Segmentation" / f"{split}.txt"
            path.write_text("\n".join(group) + "\n", encoding="utf-8")
        (tree / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        os.replace(tree, target)
    return target


def _write(tree, dataset, index, name, classes):
    image, labels = dataset[index]
    mask = np.asarray(dataset.mask(index))
    in_mask = sorted(set(np.unique(mask).tolist()) - {0, IGNORED})
    in_labels = [value + 1 for value in np.flatnonzero(np.asarray(labels)).tolist()]
    if in_mask != in_labels:
        raise ValueError(
            f"image {dataset.names[index]}: labels {in_labels}, but the mask has classes {in_mask}"
        )
    pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    pixels.save(tree / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
    _annotation(name, mask, classes).write(tree / "Annotations" / f"{name}.xml", encoding="utf-8")
    for folder in MASK_FOLDERS:
        save_indexed_png(tree / folder / f"{name}.png", mask)
    saliency = np.ascontiguousarray(dataset.saliency(index), dtype=np.uint8)
    Image.fromarray(saliency).save(tree / "saliency_map" / f"{name}.png")
