"""What one stage of Figure 3 hands to the next: label maps and localization maps, in zip files of PNGs.

Each image of the data set has one PNG, which any viewer opens. All entries bear the same date: equal labels
make equal files.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from drs_lib.data.voc import indexed_image
from drs_lib.files import atomic_path
from drs_lib.labels import of_classes, pseudo_labels
from drs_lib.maps import keep_largest_class

PNGS_AHEAD = 32  # pictures that are compressed together


class LabelArchive(Sequence):
    """Label maps uint8 (H, W) by index, from a zip file of indexed PNGs in VOC's colours, one per image."""

    def __init__(self, path):
        self.path, self._archive, self._process = Path(path), None, None
        with zipfile.ZipFile(self.path) as archive:
            self.names = archive.namelist()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if self._process != os.getpid():  # a forked process would share the parent's file position
            self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
        name = self.names[range(len(self))[index]]
        return np.array(Image.open(io.BytesIO(self._archive.read(name))))

    def __getstate__(self):
        return self.__dict__ | {"_archive": None, "_process": None}


class MapArchive(LabelArchive):
    """Localization maps by index, float32 (C, H, W) in [0, 1], from what `write_targets` wrote.

    classes: those of each image, as `write_targets` returned them.
    """

    def __init__(self, path, classes, num_classes):
        super().__init__(path)
        self.classes, self.num_classes = classes, num_classes

    def __getitem__(self, index):
        present, stack = self.stack(index)
        maps = np.zeros((self.num_classes, *stack.shape[1:]), np.float32)
        maps[present] = stack * np.float32(1 / 255)
        return maps

    def stack(self, index):
        """(classes, their maps as uint8 (n, H, W)). An image without classes has an empty map of class 0."""
        classes, stack = self.classes[index] or [0], super().__getitem__(index)
        return classes, stack.reshape(len(classes), -1, stack.shape[1])


def write_targets(path, found, names, largest=False):
    """Targets of the refinement network as a zip file of greyscale PNGs, for `MapArchive`.

    A PNG holds the maps of the image's classes in 8 bits, one above the other. An image of no class has one
    map of zeros, of the image's size.

    found: what `drs_lib.maps.iterate_maps` yields with ``present_only``. names: the images'. largest: each
    pixel keeps its largest class only. Returns the classes of each image.
    """
    classes = []

    def pictures():
        for index, labels, maps in found:
            classes.append(labels.nonzero().flatten().tolist())
            maps = keep_largest_class(maps) if largest else maps
            yield names[index], (maps * 255).round().byte().flatten(0, 1).cpu().numpy()

    write_pngs(path, pictures())
    return classes


def write_labels(path, found, dataset, **rule):
    """Pseudo labels as a zip file of PNGs, for `LabelArchive`.

    found: what `drs_lib.maps.iterate_maps` yields with ``present_only``. dataset: for saliency and names.
    rule: of `drs_lib.labels.pseudo_labels`.
    """

    def pictures():
        for index, present, maps in found:
            labels = pseudo_labels(maps[None], dataset.saliency(index)[None], **rule)
            classes = present.nonzero().flatten().tolist()
            yield dataset.names[index], of_classes(labels, classes)[0].cpu().numpy()

    write_pngs(path, pictures(), indexed=True)


def write_pngs(path, pictures, indexed=False):
    """A zip file of PNGs, from (name, uint8 (H, W)) in order; indexed: in VOC's colours."""

    def png(picture):
        name, pixels = picture
        image, buffer = indexed_image(pixels) if indexed else Image.fromarray(pixels), io.BytesIO()
        # The fastest setting: it costs a few per cent in size, and training waits for these files.
        image.save(buffer, format="PNG", compress_level=1)
        return name, buffer.getvalue()

    pictures = iter(pictures)
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        ThreadPoolExecutor() as pool,
    ):
        while block := list(pool.map(png, islice(pictures, PNGS_AHEAD))):
            for name, content in block:
                archive.writestr(zipfile.ZipInfo(f"{name}.png", (1980, 1, 1, 0, 0, 0)), content)
