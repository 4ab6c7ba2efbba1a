"""A folder of somebody's own images, with a list of their labels and their saliency maps.

photos/labels.txt              an image and the classes in it on each line: cat_01.jpg cat sofa
       images/cat_01.jpg       what Pillow reads
       saliency/cat_01.png     8-bit greyscale, 0 = not salient, 255 = salient
       masks/cat_01.png        for the score alone: 0 background, 1..C the classes in order, 255 ignored
"""

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import Dataset

from drs_lib.data.voc import IGNORED, first_few, read_mask, read_rgb, read_saliency, text_lines


class LabelledFolder(Dataset):
    """Images with image-level labels and saliency maps, from a folder as above.

    ``ds[i]`` is (image uint8 (3, H, W), labels float32 (C,)), in the order of ``labels.txt``; classes are in
    alphabetical order. For the other names see `drs_lib.data`.

    Raises:
        FileNotFoundError: no ``labels.txt``, or images or saliency maps that are not there.
        ValueError: an empty list, an image listed twice, no class at all or more than 254.
    """

    def __init__(self, folder):
        self.folder = Path(folder).expanduser()
        path = self.folder / "labels.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: expected an image and its classes on each line, such as 'cat_01.jpg cat sofa', "
                "and beside it the folders images and saliency"
            )
        lines = [line.split() for line in text_lines(path)]
        self.files = [words[0] for words in lines]
        self.names = [Path(file).stem for file in self.files]
        self.classes = tuple(sorted({name for words in lines for name in words[1:]}))
        self.num_classes = len(self.classes)
        if not 0 < self.num_classes < IGNORED:
            raise ValueError(
                f"{path} names {self.num_classes} classes, expected 1 to 254: they stand after the image, "
                "such as 'cat_01.jpg cat sofa'"
            )
        twice = [name for name in dict.fromkeys(self.names) if self.names.count(name) > 1]
        if twice:
            raise ValueError(f"{path} lists images more than once: {first_few(twice)}")
        self._labels = torch.tensor([[float(name in words[1:]) for name in self.classes] for words in lines])
        for what, place in (("image", self._image), ("saliency map", self._saliency)):
            missing = [str(place(i)) for i in range(len(self)) if not place(i).is_file()]
            if missing:
                raise FileNotFoundError(f"no {what} for what {path} lists: {first_few(missing)}")

    def _image(self, index):
        return self.folder / "images" / self.files[index]

    def _saliency(self, index):
        return self.folder / "saliency" / f"{self.names[index]}.png"

    def _mask(self, index):
        return self.folder / "masks" / f"{self.names[index]}.png"

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return read_rgb(self._image(index)), self._labels[index].clone()

    def saliency(self, index):
        """Saliency ``index``, uint8 (H, W). Raises ValueError: not 8-bit greyscale, or not of its image's
        size."""
        return read_saliency(self._saliency(index), self._image(index))

    @property
    def has_masks(self):
        """Whether every image has a mask."""
        return all(self._mask(i).is_file() for i in range(len(self)))

    def mask(self, index):
        """Mask ``index``, uint8 (H, W): 0 background, 1..C classes, 255 ignored. For scoring only. Raises
        FileNotFoundError, ValueError."""
        return read_mask(self._mask(index), self._image(index), self.classes)[0]

    @cached_property
    def fingerprint(self):
        """A short string that identifies the content of list, images and saliency maps."""
        digest = hashlib.sha256(repr((self.files, self.classes, self._labels.tolist())).encode())
        for index in range(len(self)):
            for path in (self._image(index), self._saliency(index)):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return f"folder-{len(self)}-{digest.hexdigest()[:16]}"
