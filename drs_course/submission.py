"""Segmentations as the archive that VOC's evaluation server takes, and that archive read back.

    results/VOC2012/Segmentation/comp6_test_cls/<image id>.png       one indexed PNG for each image

"comp6" is the competition in which any training data are allowed, "cls" means semantic segmentation.
"""

import io
import tarfile

import numpy as np

from drs_lib.data.voc import VOC_CLASSES, indexed_image, opened
from drs_lib.files import atomic_path

FOLDER = "results/VOC2012/Segmentation/comp6_{split}_cls"


def write_submission(path, segmentations, split="test"):
    """Writes ``results.tgz`` from (image id, label map) pairs; it appears complete or not at all.

    segmentations: an iterable of (id, integers (H, W), 0 background, 1 to 20 the classes), at the images' own
    sizes, each id once; a generator is read as it goes. split: "test", or "val" to try it out.

    Returns the number of images. Raises ValueError for a label map of another kind, an id twice, or none.
    """
    names = set()
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w:gz") as archive:
            for name, labels in segmentations:
                if name in names:
                    raise ValueError(f"image {name} comes twice; the server takes one segmentation of each.")
                names.add(name)
                data = _indexed(name, np.asarray(labels))
                entry = tarfile.TarInfo(f"{FOLDER.format(split=split)}/{name}.png")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        if not names:
            raise ValueError("there is no segmentation to submit.")
    return len(names)


def read_submission(path):
    """The label maps of such an archive: {image id: uint8 (H, W)}. Raises ValueError for other content."""
    found = {}
    with tarfile.open(path, "r:gz") as archive:
        for entry in archive:
            folder, _, file = entry.name.rpartition("/")
            if not entry.isfile() or folder not in (FOLDER.format(split=s) for s in ("test", "val")):
                raise ValueError(f"{path} holds {entry.name}, which the server does not expect.")
            with opened(f"{path}: {entry.name}", archive.extractfile(entry)) as image:
                labels = np.array(image)
            if image.mode != "P" or image.format != "PNG":
                raise ValueError(f"{entry.name} is {image.format} in mode {image.mode}, no indexed PNG.")
            found[file.removesuffix(".png")] = labels
    return found


def _indexed(name, labels):
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or not labels.size:
        raise ValueError(
            f"the segmentation of {name} is {labels.dtype} {labels.shape}; expected integers (H, W)."
        )
    if labels.min() < 0 or labels.max() > len(VOC_CLASSES):
        raise ValueError(
            f"the segmentation of {name} holds {labels.min()} to {labels.max()}; expected 0 (background) to "
            f"{len(VOC_CLASSES)}. Pseudo labels with 255 can't be submitted: take a network's prediction."
        )
    buffer = io.BytesIO()
    indexed_image(labels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
