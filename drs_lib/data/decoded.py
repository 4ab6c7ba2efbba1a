"""Images decoded once: kept in memory, or in one file that is mapped into memory, instead of JPEGs that are
decoded again in every epoch.

`Packed` holds the bytes of arrays of any shapes, one after the other, on any device; `pack` makes one;
`decoded` puts one in the place of a data set's images.
"""

import errno
import hashlib
import json
import math
import operator
import os
import re
import shutil
import struct
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from drs_lib.arguments import whole
from drs_lib.data.weak import WithoutMasks, without_masks
from drs_lib.files import StoreError, atomic_path

# A file is the arrays' bytes, the index (JSON), and this: the index's length and a mark. The index comes last
# because shapes are known last.
_END = struct.Struct("<Q8s")
_MARK = b"drspack1"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_SAMPLE = 16  # arrays from which the size of all is estimated
_CHANGES = 1  # raised when decoding or resizing changes its results
_PATIENCE = 600  # seconds to wait for another process, or without a sign of life from it


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

    def __init__(self, flat, shapes, notes=None, path=None):
        self.flat, self.notes, self.path = flat, {} if notes is None else notes, path
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
            with open(path, "rb") as file:
                file.seek(max(size - _END.size, 0))
                length, mark = _END.unpack(file.read())
                if mark != _MARK or length > size - _END.size:
                    raise ValueError("no index at its end")
                body = size - _END.size - length
                file.seek(body)
                index = json.loads(file.read(length))
            shapes, notes = index["shapes"], index["notes"]
            expected = sum(map(math.prod, shapes))
            if expected != body:
                raise ValueError(f"{body} bytes of arrays instead of {expected}")
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is cut off, altered, or no file of packed arrays ({error}; it has {size} bytes): "
                "delete it and have it made again"
            ) from error
        if not body:
            return cls(torch.empty(0, dtype=torch.uint8), shapes, notes, path)
        # Copy-on-write: torch has no read-only tensors, and a write must neither crash nor reach the file.
        flat = torch.from_numpy(np.memmap(path, np.uint8, mode="c", shape=(body,)))
        return cls(flat, shapes, notes, path)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        index = range(len(self))[operator.index(index)]
        return self.flat[self._starts[index] : self._starts[index + 1]].view(self.shapes[index])

    def __repr__(self):
        place = self.device if self.path is None else self.path
        return f"Packed({len(self)} arrays, {self.nbytes} bytes, {str(place)!r})"

    def __reduce__(self):
        if self.path is not None:
            return Packed.open, (self.path,)
        flat = self.flat
        if (
            flat.untyped_storage().nbytes() != flat.numel()
        ):  # pickling a slice takes all it was cut from along
            flat = flat.clone()
        return Packed, (flat, self.shapes, self.notes)

    @property
    def nbytes(self):
        return self.flat.numel()

    @property
    def device(self):
        return self.flat.device

    def to(self, device):
        """The arrays on a device, self if they are there already."""
        flat = self.flat.to(device)
        return self if flat is self.flat else Packed(flat, self.shapes, self.notes)

    def pin_memory(self):
        """The arrays in page-locked memory, from which a GPU copies while it computes; needs CUDA."""
        return Packed(self.flat.pin_memory(), self.shapes, self.notes)


def pack(items, count=None, path=None, notes=None):
    """uint8 arrays or tensors of any shapes as a `Packed`, taken one at a time.

    Args:
        items: an iterable.
        count: how many there will be, if that is known: memory is set aside, or disk space checked, for all.
        path: a file to write, of which one array at a time is in memory; it is there completely or not at
            all, and the result maps it. None: in memory.
        notes: JSON values to keep along, a dict that may be filled while ``items`` is read.

    Raises:
        ValueError: an item is not uint8, or there are not ``count`` of them.
        StoreError: the disk is full, or will be.
    """
    notes = {} if notes is None else notes
    if path is None:
        return _packed_in_memory(items, count, notes)
    path = Path(path)
    shapes, written = [], 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for array in _arrays(items, count):
                file.write(array.data if array.size else b"")
                shapes.append(array.shape)
                written += array.nbytes
                if count is not None and len(shapes) == min(count, _SAMPLE):
                    _check_room(path.parent, written, written * count // len(shapes), count)
            index = json.dumps({"shapes": shapes, "notes": notes}, separators=(",", ":")).encode()
            file.write(index + _END.pack(len(index), _MARK))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(path.parent, f"{written:,} bytes of packed arrays were written") from error
        raise
    return Packed.open(path)


def _packed_in_memory(items, count, notes):
    shapes, used, buffer = [], 0, np.empty(0, np.uint8)
    for array in _arrays(items, count):
        if used + array.nbytes > len(buffer):
            # All the room that is needed if the others are as large; pages never written to take no memory.
            room = max(
                used + array.nbytes, len(buffer) * 3 // 2, 0 if shapes else array.nbytes * (count or 1)
            )
            buffer, former = np.empty(room, np.uint8), buffer
            buffer[:used] = former[:used]
        buffer[used : used + array.nbytes] = array.ravel()
        shapes.append(array.shape)
        used += array.nbytes
    return Packed(torch.from_numpy(buffer)[:used], shapes, notes)


def _arrays(items, count):
    """The items as contiguous uint8 arrays; checks them, and their number."""
    place = -1
    for place, item in enumerate(items):
        array = np.ascontiguousarray(item.cpu() if torch.is_tensor(item) else item)
        if array.dtype != np.uint8:
            raise ValueError(f"item {place} is {array.dtype} {array.shape}: packed arrays are uint8")
        yield array
    if count is not None and place + 1 != count:
        raise ValueError(f"{place + 1} items to pack, expected {count}")


def _check_room(folder, written, needed, count):
    if needed - written > shutil.disk_usage(folder).free:
        raise _no_room(folder, f"{count} packed arrays take about {needed:,} bytes")


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

    def saliency(self, index):
        """The data set's own: at the size that the image had."""
        return self._dataset.saliency(index)

    def mask(self, index):
        """The data set's own: at the size that the image had. For scoring only."""
        return self._dataset.mask(index)


def decoded(dataset, cache_dir=None, resize=None, workers=None, progress=False):
    """The same data set with its images decoded, once and now.

    The result answers to the same names, and has ``packed``, the `Packed` of the images, ``sizes``, the
    (H, W) that they had, and ``image_labels()``. Of a data set without masks comes one without masks;
    ``without_masks(decoded(ds))`` is the same, ``packed`` and ``sizes`` included.

    Args:
        dataset: see `drs_lib.data`; its images and labels are read here, from several threads.
        cache_dir: a folder for one file, named by the data set's fingerprint and ``resize``, which is mapped
            into memory; the next call, in any process, finds it there. Who comes while it is being made waits
            for it. Critters, which are in memory anyway, are not written. None: kept in memory.
        resize: side of the square to which the images are resized (bilinear, antialiased), None for none.
            Masks and saliency stay as they are, and the fingerprint tells.
        workers: threads that decode; None: one for each processor core.
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
    if type(dataset) is WithoutMasks:
        inner = object.__getattribute__(dataset, "_dataset")
        return without_masks(decoded(inner, cache_dir, resize, workers, progress))
    if isinstance(dataset, Decoded):
        if resize in (None, dataset.resize):
            return dataset
        dataset = dataset._dataset
    from drs_lib.data.critters import Critters

    if cache_dir is None or isinstance(dataset, Critters):
        packed = _decode(dataset, resize, workers, progress)
    else:
        packed = _from_folder(Path(cache_dir), dataset, resize, workers, progress)
    return Decoded(dataset, packed, resize)


def _from_folder(folder, dataset, resize, workers, progress):
    key = f"{_CHANGES} {type(dataset).__name__} {dataset.fingerprint} {resize}"
    words = re.sub(r"[^A-Za-z0-9]+", "-", dataset.fingerprint)[:60]
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = folder.expanduser().absolute() / f"{words}-{resize or 'own'}-{digest}.images"
    packed, _ = _found(path, dataset, resize)
    if packed is not None:
        return packed
    with _locked(path):
        packed, damage = _found(path, dataset, resize)  # another process may have made it
        if packed is not None:
            return packed
        if damage:
            warnings.warn(f"{path} can't be used ({damage}); decoding the images again", stacklevel=3)
        for left in path.parent.glob(f".{path.name}.*"):  # by killed processes
            if left.suffix != ".lock" and time.time() - left.stat().st_mtime > _PATIENCE:
                left.unlink(missing_ok=True)
        return _decode(dataset, resize, workers, progress, path)


@contextmanager
def _locked(path):
    """One process at a time makes a file. Where locks don't work, as on some network file systems, several
    do, each takes the other's place, and no harm is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        with suppress(Timeout, NotImplementedError):
            lock.acquire(timeout=_PATIENCE)
    except OSError as error:
        raise StoreError(
            f"decoded images can't be kept in {path.parent} ({error.strerror or error}): choose a folder "
            "that can be written as cache_dir, or None to keep them in memory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _found(path, dataset, resize):
    """The file's contents or None, and what is wrong with it or None.

    A data set of somebody's own may keep its fingerprint though its images change: three are compared.
    """
    try:
        packed = Packed.open(path)
        if len(packed) != len(dataset) or len(packed.notes["labels"]) != len(dataset):
            raise ValueError(f"{len(packed)} images instead of {len(dataset)}")
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except (ValueError, KeyError) as error:
        return None, error.__cause__ or error
    read = _reader(dataset)
    for i in sorted({0, len(packed) // 2, len(packed) - 1})[: len(packed)]:
        image = _resized(read(i)[0], resize)
        if image.shape != packed[i].shape or not torch.equal(image, packed[i]):
            return None, f"image {dataset.names[i]} is another one there"
    return packed, None


def _decode(dataset, resize, workers, progress, path=None):
    notes = {"fingerprint": dataset.fingerprint, "resize": resize, "sizes": [], "labels": []}
    with closing(_images(dataset, resize, workers, progress, notes)) as images:
        return pack(images, len(dataset), path, notes)


def _images(dataset, resize, workers, progress, notes):
    """The images in order, decoded in threads a little ahead; their labels and sizes go into the notes."""
    if workers is None:
        from joblib import cpu_count

        workers = cpu_count()
    read, ahead = _reader(dataset), 4 * workers
    if hasattr(dataset, "image_labels"):
        notes["labels"] = dataset.image_labels().tolist()
    pool = ThreadPoolExecutor(workers)
    try:
        pending = deque(pool.submit(read, i) for i in range(min(ahead, len(dataset))))
        for i in tqdm(
            range(len(dataset)), "decoding", disable=not progress, unit="image", dynamic_ncols=True
        ):
            image, labels = pending.popleft().result()
            if i + ahead < len(dataset):
                pending.append(pool.submit(read, i + ahead))
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(
                    f"image {dataset.names[i]} is {image.dtype} {tuple(image.shape)}: expected torch.uint8 "
                    "(3, H, W)"
                )
            notes["sizes"].append(tuple(image.shape[-2:]))
            if labels is not None:
                notes["labels"].append(labels.tolist())
            yield _resized(image, resize)
    finally:
        pool.shutdown(cancel_futures=True)


def _reader(dataset):
    """index -> (image, labels); None for labels that come from ``image_labels()``, so that no mask is opened
    for each image."""
    if hasattr(dataset, "image_labels"):
        return lambda index: (dataset.image(index), None)
    return dataset.__getitem__


def _resized(image, resize):
    if resize is None or tuple(image.shape[-2:]) == (resize, resize):
        return image
    return interpolate(image[None], (resize, resize), mode="bilinear", antialias=True)[0]
