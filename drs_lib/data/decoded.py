"""Images decoded once: kept in memory, or in one file that is mapped into memory, instead of JPEGs that are
decoded again in every epoch.

`Packed` holds the bytes of arrays of any shapes, one after the other, on any device; `pack` makes one;
`decoded` puts one in the place of a data set's images.
"""

import errno
import hashlib
import io
import json
import math
import operator
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from drs_lib.arguments import whole
from drs_lib.data.transforms import resize_square
from drs_lib.data.weak import WithoutMasks, without_masks
from drs_lib.files import StoreError, atomic_path

_HEADER = 256  # bytes of a file's beginning, with the lengths, which are known last
_SAMPLE = 16  # arrays from which the size of all is estimated
_AHEAD = 256  # images that are decoded together
_CHANGES = 1  # raised when decoding or resizing changes its results
_STALE = 600  # seconds after which an unfinished file is a killed process's


class Packed(Sequence):
    """uint8 arrays of any shapes, one after the other in one flat tensor.

    ``packed[i]`` is array i as a tensor that shares the memory. An in-place change of it changes the packed
    one, but never a file behind it.

    Args:
        flat: uint8 tensor (B,) on any device.
        shapes: the arrays' shapes, as many bytes in all as ``flat`` has.
        notes: JSON values that belong to them.
        path: the file whose contents ``flat`` maps into memory, see `open`. A copy in another process then
            maps the file too, instead of receiving its bytes.
    """

    def __init__(self, flat, shapes, notes, path=None):
        self.flat, self.notes, self.path = flat, notes, path
        self.shapes = [tuple(shape) for shape in shapes]
        self._starts = list(accumulate(map(math.prod, self.shapes), initial=0))
        if flat.dtype != torch.uint8 or tuple(flat.shape) != (self._starts[-1],):
            raise ValueError(
                f"arrays of {self._starts[-1]} bytes in all can't be packed in {flat.dtype} of shape "
                f"{tuple(flat.shape)}: expected torch.uint8 of shape ({self._starts[-1]},)"
            )

    @classmethod
    def open(cls, path):
        """The arrays of a file that `pack` wrote, mapped into memory: they are read when they are used.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was cut off, or is another kind of file.
        """
        path = Path(path).absolute()
        size = path.stat().st_size
        try:
            with safe_open(path, "pt") as file:
                index = json.loads(file.get_tensor("index").numpy().tobytes())
                return cls(file.get_tensor("arrays"), index["shapes"], index["notes"], path)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is cut off, altered, or no file of packed arrays ({error}; it has {size} bytes): "
                "delete it and have it made again"
            ) from error

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        index = range(len(self))[operator.index(index)]
        return self.flat[self._starts[index] : self._starts[index + 1]].view(self.shapes[index])

    def __reduce__(self):
        if self.path is not None:
            return Packed.open, (self.path,)
        return Packed, (self.flat, self.shapes, self.notes)

    @property
    def nbytes(self):
        return self.flat.numel()

    def to(self, device):
        """The arrays on a device, self if they are there already."""
        flat = self.flat.to(device)
        return self if flat is self.flat else Packed(flat, self.shapes, self.notes)

    def pin_memory(self):
        """The arrays in page-locked memory, from which a GPU copies while it computes; needs CUDA."""
        return Packed(self.flat.pin_memory(), self.shapes, self.notes)


def pack(items, count, path=None, notes=None):
    """uint8 arrays or tensors of any shapes as a `Packed`, taken one at a time.

    Args:
        items: an iterable of ``count`` of them.
        path: a safetensors file to write, of which one array at a time is in memory; it is there completely
            or not at all, and the result maps it. None: in memory.
        notes: JSON values to keep along, a dict that may be filled while ``items`` is read.

    Raises:
        ValueError: an item is not uint8, or there are not ``count`` of them.
        StoreError: the disk is full, or will be.
    """
    notes = {} if notes is None else notes
    shapes = []
    if path is None:
        memory = io.BytesIO()
        _write(memory, items, count, shapes)
        return Packed(torch.from_numpy(np.frombuffer(memory.getbuffer(), np.uint8)), shapes, notes)
    path = Path(path)
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            file.seek(_HEADER)
            _write(file, items, count, shapes, path.parent)
            body = file.tell() - _HEADER
            index = json.dumps({"shapes": shapes, "notes": notes}, separators=(",", ":")).encode()
            file.write(index)
            # safetensors' own writer wants all arrays in memory. Its header may end in spaces.
            header = {
                name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
                for name, start, end in (("arrays", 0, body), ("index", body, body + len(index)))
            }
            file.seek(0)
            file.write((_HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(_HEADER - 8))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            written = sum(map(math.prod, shapes))
            raise _no_room(path.parent, f"{written:,} bytes of packed arrays were written") from error
        raise
    return Packed.open(path)


def _write(file, items, count, shapes, folder=None):
    """Writes the items' bytes and lists their shapes. folder: the file's, whose room is checked."""
    start = file.tell()
    for item in items:
        array = np.asarray(item.cpu() if torch.is_tensor(item) else item)
        if array.dtype != np.uint8:
            raise ValueError(f"item {len(shapes)} is {array.dtype} {array.shape}: packed arrays are uint8")
        file.write(array.tobytes())
        shapes.append(array.shape)
        if folder is not None and len(shapes) == min(count, _SAMPLE):
            written = file.tell() - start
            needed = written * count // len(shapes)
            if needed - written > shutil.disk_usage(folder).free:
                raise _no_room(folder, f"{count} packed arrays take about {needed:,} bytes")
    if len(shapes) != count:
        raise ValueError(f"{len(shapes)} items to pack, expected {count}")


def _no_room(folder, needed):
    return StoreError(
        f"{needed}, and {shutil.disk_usage(folder).free:,} are free in {folder}: free some room, or choose a "
        "folder on a larger disk"
    )


class Decoded:
    """What `decoded` returns: a data set whose images lie in ``packed``. Everything that is not about images
    is the wrapped data set's."""

    def __init__(self, dataset, packed, resize):
        self._dataset, self.packed, self.resize = dataset, packed, resize
        self.sizes = [tuple(size) for size in packed.notes["sizes"]]
        self._labels = torch.tensor(packed.notes["labels"], dtype=torch.float32)

    def __len__(self):
        return len(self.packed)

    def __getitem__(self, index):
        return self.image(index), self.label(index)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._dataset, name)

    def __repr__(self):
        return f"decoded({self._dataset!r}, resize={self.resize})"

    @property
    def fingerprint(self):
        """The wrapped data set's; images of another size are other data."""
        own = self._dataset.fingerprint
        return own if self.resize is None else f"{own} resize {self.resize}"

    def image(self, index):
        """Image ``index``, uint8 (3, H, W), a view of ``packed``."""
        return self.packed[index]

    def label(self, index):
        """Image-level labels of image ``index``, float32 (C,)."""
        return self._labels[index].clone()

    def image_labels(self):
        """The image-level labels of all images, float32 (N, C)."""
        return self._labels.clone()


def decoded(dataset, cache_dir=None, resize=None, workers=None, progress=False):
    """The same data set with its images decoded, once and now.

    The result answers to the same names, and has ``packed``, the `Packed` of the images, ``sizes``, the
    (H, W) that they had, and ``image_labels()``. Of a data set without masks comes one without masks;
    ``without_masks(decoded(ds))`` is the same, ``packed`` and ``sizes`` included.

    Args:
        dataset: see `drs_lib.data`; its images and labels are read here, from several threads.
        cache_dir: a folder for one file, named by the data set's fingerprint and ``resize``, which is mapped
            into memory; the next call, in any process, finds it there. Processes that come while it is being
            made make it too, and one of their files stays. Critters, which are in memory anyway, are not
            written. None: kept in memory.
        resize: side of the square to which the images are resized (bilinear, antialiased), None for none.
            Masks and saliency stay as they are, and the fingerprint tells.
        workers: threads that decode; None: a few more than there are processor cores.
        progress: True for a bar.

    Raises:
        ValueError: ``resize`` or ``workers`` is no positive int, or an image is not uint8 (3, H, W); what the
            data set raises for a damaged image. No file is left then.
        StoreError: ``cache_dir`` can't be written, or has no room for the images.

    Warns:
        UserWarning: the file in ``cache_dir`` is damaged, or holds other images than this data set; it is
        made again.
    """
    resize, workers = (
        value if value is None else whole(name, value)
        for name, value in (("resize", resize), ("workers", workers))
    )
    if hasattr(dataset, "packed") and resize in (None, getattr(dataset, "resize", None)):
        return dataset
    if isinstance(dataset, Decoded):
        dataset = dataset._dataset
    if cache_dir is None or dataset.fingerprint.startswith("critters-"):
        packed = _decode(dataset, resize, workers, progress)
    else:
        packed = _from_folder(Path(cache_dir), dataset, resize, workers, progress)
    result = Decoded(dataset, packed, resize)
    return without_masks(result) if type(dataset) is WithoutMasks else result


def _from_folder(folder, dataset, resize, workers, progress):
    words = re.sub(r"[^A-Za-z0-9]+", "-", dataset.fingerprint)[:60]
    digest = hashlib.sha256(f"{_CHANGES} {dataset.fingerprint} {resize}".encode()).hexdigest()[:12]
    path = folder.expanduser().absolute() / f"{words}-{resize or 'own'}-{digest}.safetensors"
    packed, damage = _found(path, dataset, resize)
    if packed is not None:
        return packed
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # tells now, and not after the first image
        if damage:
            warnings.warn(f"{path} can't be used ({damage}); decoding the images again", stacklevel=3)
            path.unlink(missing_ok=True)
        for left in path.parent.glob(f".{path.name}.*"):  # by killed processes
            with suppress(FileNotFoundError):  # another process is done with it
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
    except OSError as error:
        raise StoreError(
            f"decoded images can't be kept in {path.parent} ({error.strerror or error}): choose a folder "
            "that can be written as cache_dir, or None to keep them in memory"
        ) from error
    try:
        return _decode(dataset, resize, workers, progress, path)
    except PermissionError:  # Windows: another process has made the file meanwhile, and maps it
        if not path.is_file():
            raise
        return Packed.open(path)


def _found(path, dataset, resize):
    """The file's contents or None, and what is wrong with it or None.

    A data set of somebody's own may keep its fingerprint though its images change: three are compared.
    """
    if not path.is_file():
        return None, None
    try:
        packed = Packed.open(path)
        if not len(packed) == len(packed.notes["labels"]) == len(dataset):
            raise ValueError(f"{len(packed)} images instead of {len(dataset)}")
    except (ValueError, KeyError) as error:
        return None, error.__cause__ or error
    read = _reader(dataset)
    for i in sorted({0, len(packed) // 2, len(packed) - 1})[: len(packed)]:
        if not torch.equal(resize_square(read(i)[0], resize), packed[i]):
            return None, f"image {dataset.names[i]} is another one there"
    return packed, None


def _decode(dataset, resize, workers, progress, path=None):
    notes = {"fingerprint": dataset.fingerprint, "resize": resize, "sizes": [], "labels": []}
    if hasattr(dataset, "image_labels"):
        notes["labels"] = dataset.image_labels().tolist()
    with ThreadPoolExecutor(workers) as pool:
        return pack(_images(pool, dataset, resize, progress, notes), len(dataset), path, notes)


def _images(pool, dataset, resize, progress, notes):
    """The images in order, decoded in threads a little ahead; their labels and sizes go into the notes."""
    places, read = range(len(dataset)), _reader(dataset)
    blocks = (places[start : start + _AHEAD] for start in places[::_AHEAD])
    results = chain.from_iterable(pool.map(read, block) for block in blocks)
    bar = tqdm(results, "decoding", len(places), disable=not progress, unit="image", dynamic_ncols=True)
    for i, (image, labels) in enumerate(bar):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"image {dataset.names[i]} is {image.dtype} {tuple(image.shape)}: expected torch.uint8 "
                "(3, H, W)"
            )
        notes["sizes"].append(tuple(image.shape[-2:]))
        if labels is not None:
            notes["labels"].append(labels.tolist())
        yield resize_square(image, resize)


def _reader(dataset):
    """index -> (image, labels); None for labels that come from ``image_labels()``, so that no mask is opened
    for each image."""
    if hasattr(dataset, "image_labels"):
        return lambda index: (dataset.image(index), None)
    return lambda index: dataset[index]
