"""PASCAL VOC 2012, or any data set laid out like its development kit.

    VOC2012/JPEGImages/<id>.jpg                  images
            ImageSets/Segmentation/<split>.txt   lists of ids: train, val, trainaug, ...
            SegmentationClassAug/<id>.png        masks, values 0 background, 1..C classes, 255 ignored
            SegmentationClass/<id>.png           the masks of VOC's own 2,913 images
            Annotations/<id>.xml                 objects with bounding boxes
            saliency_map/<id>.png                saliency, 8-bit greyscale
            classes.txt                          one class name a line; only in a data set that is not VOC

A tree with a ``classes.txt`` is somebody's own data set, its classes and lists are its own (`export_voc`
writes such trees). A tree without one is VOC, and its lists have to be VOC's.
"""

import codecs
import hashlib
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from drs_lib.files import atomic_path, write_text

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_LIST_SIZES = {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582}
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")
KINDS = {  # folder: what its files are, and how their names end
    "JPEGImages": ("images", ".jpg"),
    "Annotations": ("annotations", ".xml"),
    "saliency_map": ("saliency maps", ".png"),
    **dict.fromkeys(MASK_FOLDERS, ("masks", ".png")),
}
DOWNLOAD = "python -m drs_course download --root {}"
IGNORED = 255  # what a mask or a label map holds where nothing is known


def voc_palette():
    """VOC's colours, uint8 (256, 3). Bits 0, 3, 6 of a label go to red, 1, 4, 7 to green, 2, 5 to blue, each
    from the highest bit of the colour down."""
    labels, channels = np.arange(256)[:, None], np.arange(3)
    return sum(((labels >> (3 * step + channels)) & 1) << (7 - step) for step in range(3)).astype(np.uint8)


def labels_from_colours(rgb):
    """Class values of a mask that was saved in VOC's colours: uint8 (H, W, 3) to uint8 (H, W).

    Raises:
        ValueError: a colour is not one of VOC's palette (an interpolated or JPEG-compressed mask has such).
    """
    rgb, code = np.asarray(rgb), np.array([1 << 16, 1 << 8, 1])
    known = np.full(1 << 24, -1, np.int16)
    known[voc_palette() @ code] = np.arange(256)
    labels = known[rgb @ code]
    strange = labels < 0
    if strange.any():
        raise ValueError(
            f"{strange.sum()} pixels have colours outside VOC's palette, e.g. {tuple(rgb[strange][0])}: was "
            "the mask resized with interpolation, or saved as JPEG?"
        )
    return labels.astype(np.uint8)


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
    """The VOC2012 folder at or below ``root``, the one that is nearest to complete."""
    root = Path(root).expanduser()
    lacks = {
        folder: [name for name in ("JPEGImages", "ImageSets/Segmentation") if not (folder / name).is_dir()]
        for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    }
    folder, missing = min(lacks.items(), key=lambda item: len(item[1]))
    if not missing:
        return folder
    if len(missing) == 1:
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}: it looks half extracted. Remove it and extract it again, or run "
            f"'{DOWNLOAD.format(root)}', which completes it."
        )
    raise FileNotFoundError(
        f"no VOC 2012 at {root}: expected JPEGImages and ImageSets/Segmentation there, in {root / 'VOC2012'} "
        f"or in {root / 'VOCdevkit' / 'VOC2012'}. '{DOWNLOAD.format(root)}' puts it there."
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
        raise ValueError(
            f"{path} can't be read ({error}): it is damaged or cut off; extract it again"
        ) from error


def _pixels(path):
    """An image as uint8 (H, W, 3), RGB."""
    with opened(path) as image:
        pixels = np.array(image.convert("RGB"))
    if image.mode[0] in "IF":  # Pillow has cut off what is above 255
        raise ValueError(f"{path} has mode {image.mode}, more than 8 bits a colour. Save it with 8 bits.")
    return pixels


def _aligned(root, folder, name, modes, otherwise):
    """A PNG of one of the given modes, as large as its image: its path, values, and palette or None."""
    with opened(root / "JPEGImages" / f"{name}.jpg") as image:
        size = image.size
    path = root / folder / f"{name}.png"
    with opened(path) as png:
        values, palette = np.array(png), png.getpalette()
    if png.mode not in modes:
        raise ValueError(f"{path} has mode {png.mode}: {otherwise}")
    if png.size != size:
        raise ValueError(
            f"{path} is {png.size[0]} x {png.size[1]} pixels, its image {size[0]} x {size[1]}: "
            "do both come from the same data set?"
        )
    return path, values, palette


def _check_palette(path, labels, palette):
    """Raises ValueError if an indexed mask gives its values other colours than VOC. Grey says nothing."""
    colours = np.arange(256)[:, None].repeat(3, axis=1)
    colours[: len(palette) // 3] = np.reshape(palette, (-1, 3))
    colours, expected = colours.tolist(), voc_palette().tolist()
    wrong = [value for value in labels if colours[value] not in ([value] * 3, expected[value])]
    if wrong:
        found = (f"{value} is {tuple(colours[value])} and not {tuple(expected[value])}" for value in wrong)
        raise ValueError(
            f"{path} has another palette than VOC's: {first_few(found)}. If its values are right, write it "
            "again with save_indexed_png(path, np.array(Image.open(path))); if its colours are, with "
            "save_indexed_png(path, labels_from_colours(np.array(Image.open(path).convert('RGB')))). Both "
            "functions are in drs_lib.data.voc"
        )


def _values(mask):
    return np.flatnonzero(np.bincount(mask.ravel())).tolist()


def first_few(names, count=3):
    """The first names and how many there are, for messages."""
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def text_lines(path):
    """The lines of a text file that are not empty. Windows' programs write UTF-16 too, which begins with a
    mark."""
    content = path.read_bytes()
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except ValueError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it again in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_list(path):
    """The ids of an image list: the first word of every line. Lists that go on with labels
    (``2007_000032 0 14``) and lists of paths (``/JPEGImages/2007_000032.jpg ...``) are understood. Raises
    ValueError for what is no text."""
    firsts = [PurePosixPath(line.split()[0]) for line in text_lines(path)]
    return [first.stem if first.suffix in (".jpg", ".png") else first.name for first in firsts]


def _split_ids(root, split, check):
    """The ids of a split's list. check: whether a list of VOC's has to be VOC's."""
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        there = first_few(sorted(other.stem for other in path.parent.glob("*.txt")), 10) or "none"
        hint = f" VOC doesn't come with this list; '{DOWNLOAD.format(root.parent)} --only aug' makes it."
        raise FileNotFoundError(f"no list {path}; lists there: {there}.{hint if split == 'trainaug' else ''}")
    names, val, size = read_list(path), path.with_name("val.txt"), VOC_LIST_SIZES.get(split)
    twice = [name for name, count in Counter(names).items() if count > 1]
    of_val = sorted({*names} & {*read_list(val)}) if check and split == "trainaug" and val.is_file() else []
    how = (
        "Restore VOC's list; for a sample of VOC pass check_lists=False, and give a data set of your own a "
        "classes.txt."
    )
    if not names:
        raise ValueError(f"{path} is empty")
    if twice:
        raise ValueError(f"{path} lists images more than once: {first_few(twice)}")
    if check and size not in (None, len(names)):
        raise ValueError(f"{path} has {len(names)} ids, VOC's {split} list has {size}. {how}")
    if of_val:
        raise ValueError(f"{path} holds images of VOC's val list: {first_few(of_val)}. {how}")
    return names


def _require(root, folder, split, names):
    """Raises FileNotFoundError unless a folder has a file for each of a split's names."""
    path, (what, suffix), download = root / folder, KINDS[folder], DOWNLOAD.format(root.parent)
    files = set(os.listdir(path)) if path.is_dir() else set()
    missing = [name for name in names if name + suffix not in files]
    if not missing:
        return
    if folder == "saliency_map" and not path.is_dir():
        raise FileNotFoundError(
            f"no {path}: DRS takes its background cue from saliency maps. '{download} --only saliency' "
            "fetches those of the authors' release; or put 8-bit greyscale PNGs named by image id there."
        )
    state = f"lacks {len(missing)} of {len(names)} {what}" if path.is_dir() else "is not there"
    other = ""
    if folder == "SegmentationClassAug" and (root / "SegmentationClass").is_dir():
        other = " For VOC's own train and val images masks='SegmentationClass' will do."
    raise FileNotFoundError(
        f"{path} {state} (list {split!r}): {first_few(missing)}. The tree is incomplete; '{download}' "
        f"completes it.{other}"
    )


def _classes(path):
    if not path.is_file():
        return VOC_CLASSES
    classes = tuple(text_lines(path))
    if not 0 < len(classes) < IGNORED or len(set(classes)) < len(classes):
        raise ValueError(f"{path}: expected 1 to 254 different class names, one a line")
    return classes


def _named_objects(path, classes):
    """The places in ``classes`` of the objects that an annotation names."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error}): it is damaged; extract it again") from error
    names = [(item.findtext("name") or "").strip() for item in objects]
    for name in names:
        if name not in classes:
            raise ValueError(f"{path}: object {name!r}, expected one of {', '.join(classes)}")
    return [classes.index(name) for name in names]


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _contents(path, wanted, cache_dir):
    """A hash of what is in the wanted files of a folder. ``cache_dir`` keeps it under their sizes and times:
    they are read when one of these has changed."""
    if not path.is_dir():
        return ""
    with os.scandir(path) as entries:
        found = sorted((entry.name, entry.stat()) for entry in entries if entry.name in wanted)
    known = None
    if cache_dir is not None:
        # A copy may have its original's mtime, but not its ctime.
        state = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
        digest = _sha256(repr((str(path.resolve()), state)).encode())
        known = cache_dir / f"voc-contents-{digest[:32]}.txt"
        if known.is_file():
            return known.read_text(encoding="utf-8")
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda item: (item[0], _sha256((path / item[0]).read_bytes())), found)
        contents = _sha256(repr([*hashes]).encode())
    if known is not None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_text(known, contents)
    return contents


class VOC2012(Dataset):
    """VOC 2012 segmentation images with image-level labels, saliency maps, and masks for scoring.

    Args:
        root: the VOC2012 folder, or a folder that holds VOC2012 or VOCdevkit/VOC2012.
        split: a list in ImageSets/Segmentation: "train", "val", "trainaug" (the paper trains on these 10,582
            images), or any other that is there.
        labels: where the image-level labels come from. "mask": the classes that occur in the mask, which is
            what the label lists of the authors' release hold. "xml": the objects named in Annotations.
            "none": unknown (a test split); they are NaN, so that nothing can be trained on them by mistake.
        masks: the folder of the masks, "SegmentationClassAug" or "SegmentationClass".
        check_lists: whether VOC's own lists have to be complete; False admits samples of VOC.
        cache_dir: a folder for the labels read off the masks and for hashes of the files, so that a second
            run needn't read them all. The data folder itself is never written to.

    ``ds[i]`` is (image uint8 (3, H, W), labels float32 (C,)). Greyscale images become RGB by repetition, CMYK
    ones by Pillow, which knows that CMYK JPEGs are stored inverted. EXIF orientation is ignored, as VOC's
    masks and boxes ignore it.

    Raises:
        FileNotFoundError: no such tree or list, or listed images or masks that are not there.
        ValueError: a list that is empty, names an image twice or, in a tree without ``classes.txt``, is not
            VOC's though named so; later, a file that is damaged, not of its image's size, or holds values or
            colours that it shouldn't.
    """

    def __init__(
        self, root, split, *, labels="mask", masks="SegmentationClassAug", check_lists=True, cache_dir=None
    ):
        folders = {"mask": [masks], "xml": ["Annotations"], "none": []}
        if labels not in folders:
            raise ValueError(f"labels is 'mask', 'xml' or 'none', got {labels!r}")
        if masks not in MASK_FOLDERS:
            raise ValueError(f"masks is one of {MASK_FOLDERS}, got {masks!r}")
        self.root = _find_voc(root)
        self.split, self.label_source, self.mask_folder = split, labels, masks
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        own_classes = self.root / "classes.txt"
        self.classes = _classes(own_classes)
        self.num_classes = len(self.classes)
        self.names = _split_ids(self.root, split, check_lists and not own_classes.is_file())
        for folder in ("JPEGImages", *folders[labels]):
            _require(self.root, folder, split, self.names)
        # NaN: unknown, or not read yet. One array travels to worker processes in one piece.
        self._labels = np.full((len(self.names), self.num_classes), np.nan, np.float32)

    def __len__(self):
        return len(self.names)

    def __repr__(self):
        return (
            f"VOC2012({str(self.root)!r}, {self.split!r}, labels={self.label_source!r}): {len(self)} images"
        )

    def __getitem__(self, index):
        return self.image(index), self.label(index)

    def image(self, index):
        """Image ``index`` as a uint8 tensor (3, H, W), RGB."""
        path = self.root / "JPEGImages" / f"{self.names[index]}.jpg"
        return torch.from_numpy(_pixels(path)).permute(2, 0, 1).contiguous()

    def mask(self, index):
        """Mask ``index``, uint8 (H, W): 0 background, 1..C classes, 255 ignored. For scoring only."""
        path, mask, palette = _aligned(
            self.root,
            self.mask_folder,
            self.names[index],
            ("L", "P"),
            "a mask holds class values (greyscale or indexed PNG). If this one has VOC's colours, convert "
            "it with save_indexed_png(path, labels_from_colours(rgb)), both in drs_lib.data.voc",
        )
        labels = _values(mask)
        strange = set(labels) - {*range(self.num_classes + 1), IGNORED}
        if strange:
            raise ValueError(
                f"{path} has value {min(strange)}, expected 0 (background), 1..{self.num_classes} (classes) "
                "or 255 (ignored)"
            )
        if palette is not None and self.classes == VOC_CLASSES:
            _check_palette(path, labels, palette)
        return mask

    def saliency(self, index):
        """Saliency ``index``, uint8 (H, W), 0..255 for 0..1."""
        if not (self.root / "saliency_map").is_dir():
            self.require_saliency()
        _, saliency = self._saliency(index)
        if saliency.max() == 1:
            self._check_saliency()
        return saliency

    def _saliency(self, index):
        expected = "expected 8-bit greyscale, 0 = not salient, 255 = salient"
        return _aligned(self.root, "saliency_map", self.names[index], ("L",), expected)[:2]

    def _check_saliency(self):
        """Raises ValueError if no map of a sample goes beyond 1. One such map alone says nothing: a detector
        may find nothing in an image."""
        sample = [self._saliency(index) for index in range(0, len(self), -(-len(self) // 16))]
        path, saliency = max(sample, key=lambda item: item[1].max())
        if saliency.max() == 1:
            raise ValueError(
                f"{path} goes from 0 to 1 of 255, as the other saliency maps do, so that all would be "
                "background: multiply them by 255"
            )

    def require_saliency(self):
        """Raises FileNotFoundError if not every image has a saliency map, and says where they come from; and
        ValueError if some of a sample of them can't be used."""
        _require(self.root, "saliency_map", self.split, self.names)
        self._check_saliency()

    def label(self, index):
        """Image-level labels of image ``index``, float32 (C,), multi-hot."""
        if self.label_source != "none" and np.isnan(self._labels[index, 0]):
            if self.label_source == "mask":
                present = [value - 1 for value in _values(self.mask(index)) if 0 < value < IGNORED]
            else:
                path = self.root / "Annotations" / f"{self.names[index]}.xml"
                present = _named_objects(path, self.classes)
            self._labels[index] = np.isin(np.arange(self.num_classes), present)
        return torch.from_numpy(self._labels[index].copy())

    def image_labels(self):
        """The image-level labels of all images, float32 (N, C), read in threads; kept in ``cache_dir``, if
        given."""
        cached = self.label_source == "mask" and self.cache_dir is not None
        cache = self.cache_dir / f"voc-labels-{self.fingerprint}.npy" if cached else None
        if cached and cache.is_file():
            try:
                self._labels[:] = np.load(cache, allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                warnings.warn(f"{cache} can't be used ({error}); reading the masks again", stacklevel=2)
        missing = np.flatnonzero(np.isnan(self._labels[:, 0])).tolist()
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.label, missing))
        if cached and missing:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with atomic_path(cache) as temporary, open(temporary, "wb") as file:
                np.save(file, self._labels.astype(np.uint8))
        return torch.from_numpy(self._labels.copy())

    @cached_property
    def fingerprint(self):
        """A short string that identifies the content: list, classes, label source, and what is in the files
        of the list, wherever the tree lies. Other saliency maps or masks under the same names change it."""
        return self._identity(self._content + self._contents("saliency_map"))

    @cached_property
    def fingerprint_without_saliency(self):
        """The same for who looks at no saliency map: with others, no classifier need be trained again."""
        return self._identity(self._content)

    @cached_property
    def _content(self):
        """All but saliency."""
        # True was an option once; without it every fingerprint would change.
        choices = (self.classes, self.label_source, self.mask_folder, True, self.names)
        folders = ["JPEGImages", self.mask_folder] + ["Annotations"] * (self.label_source == "xml")
        return repr(choices) + "".join(map(self._contents, folders))

    def _contents(self, folder):
        wanted = {name + KINDS[folder][1] for name in self.names}
        return _contents(self.root / folder, wanted, self.cache_dir)

    def _identity(self, content):
        return f"voc-{self.split}-{len(self)}-{_sha256(content.encode())[:16]}"
