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
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from drs_lib.arguments import whole
from drs_lib.data.transforms import resize_square
from drs_lib.data.weak import WithoutMasks, without_masks
from drs_lib.files import StoreError, atomic_path

_HEADER = 256  # bytes of a file's beginning, with the lengths, which are known last
_SAMPLE = 16  # arrays from which the size of all is estimated
_AHEAD = 256  # images that are decoded together
_CHANGES = 1  # raised when decoding or resizing changes its results


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
        """The arrays on a device."""
        return Packed(self.flat.to(device), self.shapes, self.notes)

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
    notes, shapes = {} if notes is None else notes, []
    if path is None:
        memory = io.BytesIO()
        _write(memory, items, count, shapes)
        return Packed(torch.from_numpy(np.frombuffer(memory.getbuffer(), np.uint8)), shapes, notes)
    folder = Path(path).parent
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            file.seek(_HEADER)
            _write(file, items, count, shapes, folder)
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise
        written = f"{sum(map(math.prod, shapes)):,} bytes of packed arrays were written"
        raise _no_room(written, folder) from error
    return Packed.open(path)


def _write(file, items, count, shapes, folder=None):
    """Writes the items' bytes and lists their shapes. folder: the file's, whose room is checked."""
    written = 0
    for item in items:
        array = np.asarray(item.cpu() if torch.is_tensor(item) else item)
        if array.dtype != np.uint8:
            raise ValueError(f"item {len(shapes)} is {array.dtype} {array.shape}: packed arrays are uint8")
        written += file.write(array.tobytes())
        shapes.append(array.shape)
        if folder is not None and len(shapes) == min(count, _SAMPLE):
            needed = written * count // len(shapes)
            if needed - written > shutil.disk_usage(folder).free:
                raise _no_room(f"{count} packed arrays take about {needed:,} bytes", folder)
    if len(shapes) != count:
        raise ValueError(f"{len(shapes)} items to pack, expected {count}")


def _no_room(needed, folder):
    return StoreError(
        f"{needed}, and {shutil.disk_usage(folder).free:,} are free in {folder}: free some room, or choose a "
        "folder on a larger disk"
    )


def decoded(dataset, cache_dir=None, resize=None):
    """The same data set with its images decoded, once and now, in ``packed``, a `Packed`; without masks, as
    by `without_masks`.

    Args:
        dataset: see `drs_lib.data`; its images and labels are read here, from several threads.
        cache_dir: a folder for one file, named by the data set's fingerprint and ``resize``, which is mapped
            into memory; the next call, in any process, finds it there. Processes that come while it is being
            made make it too, and one of their files stays. Critters, which are in memory anyway, are not
            written. None: kept in memory.
        resize: side of the square to which the images are resized (bilinear, antialiased), None for none.
            Saliency stays as it is, and the fingerprint tells.

    Raises:
        ValueError: ``resize`` is no positive int, or an image is not uint8 (3, H, W); what the data set
            raises for a damaged image. No file is left then.
        StoreError: ``cache_dir`` can't be written, or has no room for the images.

    Warns:
        UserWarning: the file in ``cache_dir`` is damaged, or holds other images than this data set; it is
            made again.
    """
    resize = resize if resize is None else whole("resize", resize)
    weak = without_masks(dataset)
    if hasattr(weak, "packed") and resize is None:
        return weak
    if cache_dir is None or weak.fingerprint.startswith("critters-"):
        packed = _decode(weak, resize)
    else:
        packed = _from_folder(Path(cache_dir).expanduser().absolute(), weak, resize)
    # Images of another size are other data.
    fingerprint = weak.fingerprint if resize is None else f"{weak.fingerprint} resize {resize}"
    labels = np.array(packed.notes["labels"], np.float32)
    return WithoutMasks(weak, labels, packed=packed, fingerprint=fingerprint)


def _from_folder(folder, dataset, resize):
    words = re.sub(r"[^A-Za-z0-9]+", "-", dataset.fingerprint)[:60]
    digest = hashlib.sha256(f"{_CHANGES} {dataset.fingerprint} {resize}".encode()).hexdigest()[:12]
    path = folder / f"{words}-{resize or 'own'}-{digest}.safetensors"
    if path.is_file():
        try:
            return _checked(Packed.open(path), dataset, resize)
        except ValueError as error:
            damage = error.__cause__ or error
            warnings.warn(f"{path} can't be used ({damage}); decoding the images again", stacklevel=3)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # tells now, and not after the first images
    except OSError as error:
        raise StoreError(
            f"decoded images can't be kept in {folder} ({error.strerror or error}): choose a folder that can "
            "be written as cache_dir, or None to keep them in memory"
        ) from error
    try:
        return _decode(dataset, resize, path)
    except PermissionError:  # Windows: another process has made the file meanwhile, and maps it
        return Packed.open(path)


def _checked(packed, dataset, resize):
    """The contents of a file. Raises ValueError if they are another data set's; one of somebody's own may
    keep its fingerprint though its images change, so three are compared."""
    count = len(dataset)
    if not len(packed) == len(packed.notes["labels"]) == count:
        raise ValueError(f"{len(packed)} images instead of {count}")
    for index in {0, count // 2, count - 1}:
        if not torch.equal(_read(dataset, resize, index)[0], packed[index]):
            raise ValueError(f"image {dataset.names[index]} is another one there")
    return packed


def _decode(dataset, resize, path=None):
    notes = {"fingerprint": dataset.fingerprint, "resize": resize, "labels": []}
    with ThreadPoolExecutor() as pool:
        return pack(_images(pool, dataset, resize, notes["labels"]), len(dataset), path, notes)


def _images(pool, dataset, resize, kept):
    """The images in order, decoded in threads a little ahead; their labels are added to ``kept``."""
    places = range(len(dataset))
    for start in places[::_AHEAD]:
        for image, labels in pool.map(partial(_read, dataset, resize), places[start : start + _AHEAD]):
            kept.append(labels)
            yield image


def _read(dataset, resize, index):
    image, labels = dataset[index]
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image {dataset.names[index]} is {image.dtype} {tuple(image.shape)}: expected torch.uint8 "
            "(3, H, W)"
        )
    return resize_square(image, resize), labels.tolist()
