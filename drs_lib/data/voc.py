"""PASCAL VOC 2012, or any data set laid out like its development kit.

    VOC2012/JPEGImages/<id>.jpg                  images
            ImageSets/Segmentation/<split>.txt   lists of ids: train, val, trainaug, ...
            SegmentationClassAug/<id>.png        masks, values 0 background, 1..C classes, 255 ignored
            SegmentationClass/<id>.png           the masks of VOC's own 2,913 images
            saliency_map/<id>.png                saliency, 8-bit greyscale
            classes.txt                          one class name a line; only in a data set that is not VOC

A tree with a ``classes.txt`` is somebody's own data set, its classes and lists are its own (`export_voc`
writes such trees). A tree without one is VOC, and its lists have to be VOC's.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from drs_lib.files import atomic_path

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_LIST_SIZES = {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582}
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")
DOWNLOAD = "python -m drs_course download --root {}"
IGNORED = 255  # what a mask or a label map holds where nothing is known


def voc_palette():
    """VOC's colours, uint8 (256, 3). Bits 0, 3, 6 of a label go to red, 1, 4, 7 to green, 2, 5 to blue, each
    from the highest bit of the colour down."""
    labels, channels = np.arange(256)[:, None], np.arange(3)
    return sum(((labels >> (3 * step + channels)) & 1) << (7 - step) for step in range(3)).astype(np.uint8)


def indexed_image(labels):
    """Class values uint8 (H, W) as an image in VOC's colours, in Pillow's mode P."""
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette(voc_palette().tobytes())
    return image


def save_indexed_png(path, labels):
    """Write class values (H, W), 0..255, as an indexed PNG with VOC's palette, as VOC's masks and its
    evaluation server have them. The file appears complete or not at all.

    Raises:
        ValueError: not two-dimensional, not integers, or outside 0..255.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or ((labels < 0) | (labels > 255)).any():
        raise ValueError(
            f"{path}: a label map is a two-dimensional integer array with values 0..255, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    with atomic_path(path) as temporary:
        indexed_image(labels.astype(np.uint8)).save(temporary, format="PNG")


def _find_voc(root):
    """The VOC2012 folder at or below ``root``."""
    root, needed = Path(root).expanduser(), ("JPEGImages", "ImageSets/Segmentation")
    places = root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"
    found = {place: [(place / name).is_dir() for name in needed] for place in places}
    for place in places:
        if all(found[place]):
            return place
    half = [f" {place} looks half extracted; that completes it." for place in places if any(found[place])]
    raise FileNotFoundError(
        f"no VOC 2012 at {root}: expected {' and '.join(needed)} there, in {places[1]} or in {places[2]}. "
        f"'{DOWNLOAD.format(root)}' puts it there.{''.join(half)}"
    )


@contextmanager
def opened(path, file=None):
    """An image opened by Pillow, from ``path``, or from ``file`` of which ``path`` says what it is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: what Pillow says of a file that is damaged, cut off or too large, with the path.
    """
    try:
        with Image.open(path if file is None else file) as image:
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {path}: the folder {path.parent.name} is incomplete") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large to be read ({error}): put a smaller copy there") from error
    except Exception as error:  # a damaged header makes Pillow's readers raise errors of almost any kind
        if getattr(error, "errno", None) is not None:  # the system's (permission, too many files)
            raise
        raise ValueError(f"{path} can't be read ({error}): damaged or cut off; extract it again") from error


def read_rgb(path):
    """An image as a uint8 tensor (3, H, W), RGB. Raises as `opened`, and ValueError for more than 8 bits."""
    with opened(path) as image:
        pixels = np.array(image.convert("RGB"))
    if image.mode[0] in "IF":  # Pillow has cut off what is above 255
        raise ValueError(f"{path} has mode {image.mode}, more than 8 bits a colour. Save it with 8 bits.")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _read_aligned(path, image, modes, expected):
    """The values of a PNG that belongs to the image at the path ``image``, and its palette or None. Raises as
    `opened`, and ValueError for a size that is not the image's or a mode that is not ``expected``."""
    with opened(image) as picture:
        width, height = picture.size
    with opened(path) as png:
        values, palette = np.array(png), png.getpalette()
    if png.mode not in modes:
        raise ValueError(f"{path} has mode {png.mode}: expected {expected}")
    if png.size != (width, height):
        raise ValueError(
            f"{path} is {png.size[0]} x {png.size[1]} pixels, its image {width} x {height}: do both come "
            "from the same data set?"
        )
    return values, palette


def read_saliency(path, image):
    """The saliency map of the image at the path ``image``, uint8 (H, W). Raises as `opened`, and ValueError
    for what is not 8-bit greyscale or not of the image's size."""
    return _read_aligned(path, image, ("L",), "8-bit greyscale, 0 = not salient, 255 = salient")[0]


def read_mask(path, image, classes):
    """A mask, uint8 (H, W): 0 background, 1..C classes, 255 ignored; and its palette or None. Raises as
    `read_saliency`, and ValueError for other values."""
    expected = "class numbers, in greyscale or as an indexed PNG; colours say nothing"
    mask, palette = _read_aligned(path, image, ("L", "P"), expected)
    strange = {*_values(mask)} - {*range(len(classes) + 1), IGNORED}
    if strange:
        raise ValueError(
            f"{path} has value {min(strange)}, expected 0 (background), 1..{len(classes)} "
            f"({first_few(classes)}) or 255 (ignored)"
        )
    return mask, palette


def _check_palette(path, mask, palette):
    """Raises ValueError if an indexed mask gives its values other colours than VOC. Grey says nothing."""
    colours, expected = np.reshape(palette, (-1, 3)).tolist(), voc_palette().tolist()
    values = [value for value in _values(mask) if value < len(colours)]
    wrong = [value for value in values if colours[value] not in ([value] * 3, expected[value])]
    if wrong:
        found = (f"{value} is {tuple(colours[value])} and not {tuple(expected[value])}" for value in wrong)
        raise ValueError(
            f"{path} has another palette than VOC's: {first_few(found)}. If its values are right, write it "
            "again with drs_lib.data.save_indexed_png(path, np.array(Image.open(path))); if its colours are, "
            f"remove the folder, and '{DOWNLOAD.format(path.parents[2])}' fetches the right masks."
        )


def _values(mask):
    return np.flatnonzero(np.bincount(mask.ravel())).tolist()


def first_few(names, count=3):
    """The first names and how many there are, for messages."""
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def text_lines(path):
    """The lines of a text file that are not empty. Raises ValueError for what is not in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it again in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_list(path):
    """The ids of an image list: the first word of every line, of a path its stem (``2007_000032 0 14``,
    ``/JPEGImages/2007_000032.jpg ...``). Raises ValueError for what is no text."""
    firsts = [PurePosixPath(line.split()[0]) for line in text_lines(path)]
    return [first.stem if first.suffix in (".jpg", ".png") else first.name for first in firsts]


def _split_ids(root, split, own):
    """The ids of a split's list. own: whether the data set is somebody's own, else VOC's lists are VOC's."""
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        there = first_few(sorted(other.stem for other in path.parent.glob("*.txt")), 10) or "none"
        hint = f" VOC doesn't come with this list; '{DOWNLOAD.format(root.parent)} --only aug' makes it."
        raise FileNotFoundError(f"no list {path}; lists there: {there}.{hint if split == 'trainaug' else ''}")
    names, val, size = read_list(path), path.with_name("val.txt"), VOC_LIST_SIZES.get(split)
    how = "Restore VOC's list; give a sample another name, and a data set of your own a classes.txt."
    if not names:
        raise ValueError(f"{path} is empty")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{path} lists images more than once: {first_few(twice)}")
    if own:
        return names
    if size not in (None, len(names)):
        raise ValueError(f"{path} has {len(names)} ids, VOC's {split} list has {size}. {how}")
    if split == "trainaug" and val.is_file() and (of_val := sorted({*names} & {*read_list(val)})):
        raise ValueError(f"{path} holds images of VOC's val list: {first_few(of_val)}. {how}")
    return names


def _classes(path):
    classes = tuple(text_lines(path))
    if not 0 < len(classes) < IGNORED or len(set(classes)) < len(classes):
        raise ValueError(f"{path}: expected 1 to 254 different class names, one a line")
    return classes


def _file(folder, name):
    return f"{name}.{'jpg' if folder == 'JPEGImages' else 'png'}"


class VOC2012(Dataset):
    """VOC 2012 segmentation images with image-level labels, saliency maps, and masks for scoring.

    Args:
        root: the VOC2012 folder, or a folder that holds VOC2012 or VOCdevkit/VOC2012. It is only read.
        split: a list in ImageSets/Segmentation: "train", "val", "trainaug" (the paper trains on these 10,582
            images), or any other that is there.
        labels: where the image-level labels come from. "mask": the classes that occur in the mask, which is
            what the label lists of the authors' release hold. "none": unknown (a test split); they are NaN,
            so that nothing can be trained on them by mistake.
        masks: the folder of the masks, "SegmentationClassAug" or "SegmentationClass".

    ``ds[i]`` is (image uint8 (3, H, W), labels float32 (C,)). Greyscale images become RGB by repetition, CMYK
    ones by Pillow, which knows that CMYK JPEGs are stored inverted. EXIF orientation is ignored, as VOC's
    masks ignore it.

    Raises:
        FileNotFoundError: no such tree or list, or listed images or masks that are not there.
        ValueError: a list that is empty, names an image twice or, in a tree without ``classes.txt``, is not
            VOC's though named so; later, a file that is damaged, not of its image's size, or holds values or
            colours that it shouldn't.
    """

    def __init__(self, root, split, *, labels="mask", masks="SegmentationClassAug"):
        if labels not in ("mask", "none"):
            raise ValueError(f"labels is 'mask' or 'none', got {labels!r}")
        if masks not in MASK_FOLDERS:
            raise ValueError(f"masks is one of {MASK_FOLDERS}, got {masks!r}")
        self.root = _find_voc(root)
        self.split, self.label_source, self.mask_folder = split, labels, masks
        own = (self.root / "classes.txt").is_file()
        self.classes = _classes(self.root / "classes.txt") if own else VOC_CLASSES
        self.num_classes = len(self.classes)
        self.names = _split_ids(self.root, split, own)
        self._require("JPEGImages")
        if labels == "mask":
            self._require(masks)
        # NaN: unknown, or not read yet. One array travels to worker processes in one piece.
        self._labels = np.full((len(self.names), self.num_classes), np.nan, np.float32)

    def __len__(self):
        return len(self.names)

    def __repr__(self):
        return f"VOC2012({str(self.root)!r}, {self.split!r}): {len(self)} images"

    def __getitem__(self, index):
        return self.image(index), self.label(index)

    def _path(self, folder, index):
        return self.root / folder / _file(folder, self.names[index])

    def _require(self, folder):
        """Raises FileNotFoundError unless a folder has a file for each image."""
        path, download = self.root / folder, DOWNLOAD.format(self.root.parent)
        there = set(os.listdir(path)) if path.is_dir() else set()
        missing = [name for name in self.names if _file(folder, name) not in there]
        if not missing:
            return
        if folder == "saliency_map" and not there:
            raise FileNotFoundError(
                f"no {path}: DRS takes its background cue from saliency maps. '{download} --only saliency' "
                "fetches those of the authors' release; or put 8-bit greyscale PNGs named by image id there."
            )
        state = f"lacks {len(missing)} of {len(self)} files" if there else "is not there, or is empty"
        other = " For VOC's own train and val images masks='SegmentationClass' will do."
        raise FileNotFoundError(
            f"{path} {state} (list {self.split!r}): {first_few(missing)}. The tree is incomplete; "
            f"'{download}' completes it.{other if folder == 'SegmentationClassAug' else ''}"
        )

    def image(self, index):
        """Image ``index`` as a uint8 tensor (3, H, W), RGB."""
        return read_rgb(self._path("JPEGImages", index))

    def mask(self, index):
        """Mask ``index``, uint8 (H, W): 0 background, 1..C classes, 255 ignored. For scoring only."""
        path = self._path(self.mask_folder, index)
        mask, palette = read_mask(path, self._path("JPEGImages", index), self.classes)
        if palette is not None and self.classes == VOC_CLASSES:
            _check_palette(path, mask, palette)
        return mask

    def saliency(self, index):
        """Saliency ``index``, uint8 (H, W), 0..255 for 0..1."""
        if not (self.root / "saliency_map").is_dir():
            self.require_saliency()
        saliency = self._saliency(index)
        if saliency.max() == 1:
            self.require_saliency()
        return saliency

    def _saliency(self, index):
        return read_saliency(self._path("saliency_map", index), self._path("JPEGImages", index))

    def require_saliency(self):
        """Raises FileNotFoundError if not every image has a saliency map, and says where they come from; and
        ValueError if no map of a sample goes beyond 1 (one alone may: a detector may find nothing)."""
        self._require("saliency_map")
        sample = {index: self._saliency(index).max() for index in range(0, len(self), -(-len(self) // 16))}
        brightest = max(sample, key=sample.get)
        if sample[brightest] == 1:
            raise ValueError(
                f"{self._path('saliency_map', brightest)} goes from 0 to 1 of 255, as the other saliency "
                "maps do, so that all would be background: multiply them by 255"
            )

    def label(self, index):
        """Image-level labels of image ``index``, float32 (C,), multi-hot."""
        if self.label_source == "mask" and np.isnan(self._labels[index, 0]):
            self._labels[index] = np.isin(np.arange(1, self.num_classes + 1), _values(self.mask(index)))
        return torch.from_numpy(self._labels[index].copy())

    def image_labels(self):
        """The image-level labels of all images, float32 (N, C), read in threads."""
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self.label, range(len(self)))))

    @cached_property
    def fingerprint(self):
        """A short string that is the same for the same content, wherever the tree lies: list, classes, label
        source, and the bytes of the images, masks and saliency maps of the list."""
        return self._identity(self._content + self._contents("saliency_map"))

    @cached_property
    def fingerprint_without_saliency(self):
        """A `fingerprint` that saliency maps don't enter: other maps need no other classifier."""
        return self._identity(self._content)

    @cached_property
    def _content(self):
        # True was an option once; without it every fingerprint would change.
        choices = (self.classes, self.label_source, self.mask_folder, True, self.names)
        return repr(choices) + self._contents("JPEGImages") + self._contents(self.mask_folder)

    def _contents(self, folder):
        """A hash of the files of the list in a folder; "" without the folder."""
        path = self.root / folder
        if not path.is_dir():
            return ""
        files = sorted({*os.listdir(path)} & {_file(folder, name) for name in self.names})
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda file: (file, sha256((path / file).read_bytes()).hexdigest()), files)
            return sha256(repr([*hashes]).encode()).hexdigest()

    def _identity(self, content):
        return f"voc-{self.split}-{len(self)}-{sha256(content.encode()).hexdigest()[:16]}"
