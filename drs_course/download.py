"""Fetch what the tables on VOC need, check it, and put it where it is looked for.

    python -m drs_course download --root data
    python -m drs_course download --root data --only voc --mirror https://elsewhere.org/VOCtrainval_11-May-2012.tar
    python -m drs_course download --root data --local ~/Downloads

VOC 2012, its augmented masks, the saliency maps and the authors' pseudo labels go to ``VOC2012`` in the root,
weights to torch hub's folder of checkpoints, where torchvision looks for its own. `FILES` lists them all. A
mirror, or a local file of the same name, takes the place of any of them. A tree is only changed by complete
archives.

What has a published checksum is held to it, and goes on where it stopped when an interrupted command is run
again. Of the rest the SHA-256 is written beside the first download, as ``<name>.sha256``, and later downloads
are held to that.
"""

import http.client
import os
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from itertools import product
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import pooch
import torch
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from drs_lib.data.voc import VOC2012, VOC_LIST_SIZES, first_few, read_list
from drs_lib.files import atomic_path, write_text


class Remote(NamedTuple):
    """A file to fetch. known: its checksum, "md5:..." or "sha256:...", of which the first digits will do."""

    url: str
    known: str | None = None

    @property
    def name(self):
        return PurePosixPath(urlsplit(self.url).path).name


_RELEASE = "https://github.com/qjadud1994/DRS/releases/download/asset/"
_TORCHVISION = "https://download.pytorch.org/models/"
# In this order: what hangs on one unreliable host comes after the weights, and what needs VOC after VOC.
FILES = {
    "vgg16": Remote(_TORCHVISION + "vgg16-397923af.pth", "sha256:397923af"),
    "resnet101": Remote(_TORCHVISION + "resnet101-63fe2227.pth", "sha256:63fe2227"),
    "drs": Remote(_RELEASE + "DRS_learnable.pth"),
    "refine": Remote(_RELEASE + "Refine_DRS_learnable.pth"),
    "coco": Remote(_RELEASE + "deeplabv1_resnet101-coco.pth"),
    "deeplab": Remote(_RELEASE + "Deeplabv2_pseudo_segmentation_labels.pth"),
    "voc": Remote(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "md5:6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "aug": Remote(_RELEASE + "SegmentationClassAug.zip"),
    "saliency": Remote(_RELEASE + "saliency_map.zip"),
    "labels": Remote(_RELEASE + "refined_pseudo_segmentation_labels.zip"),
}
# A PNG for each training image: folder of the tree, modes, what they are.
_PNGS = {
    "aug": ("SegmentationClassAug", ("L", "P"), "augmented masks"),
    "saliency": ("saliency_map", ("L",), "saliency maps"),
    "labels": ("refined_pseudo_segmentation_labels", ("L", "P"), "pseudo labels of the authors"),
}
TREE = ("voc", *_PNGS)  # what goes there; the others are weights
COMMAND = "python -m drs_course download"

# Images and annotations in the archive. Only decides whether there is anything to do; the checksum and the
# lists decide what is right.
VOC_IMAGES = 17125

ATTEMPTS = 3
PAUSE = 2  # seconds before the second attempt, twice that before the third
TIMEOUT = 60  # seconds without a byte
_NETWORK_ERRORS = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
)  # fmt: skip


def weights_folder():
    """The folder of downloaded weights, torchvision's and the authors': torch hub's (``TORCH_HOME``)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def weights_file(kind):
    """The path of downloaded weights, by their key in `FILES`. Raises FileNotFoundError: not fetched yet."""
    path = weights_folder() / FILES[kind].name
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: '{COMMAND} --only {kind}' fetches it")
    return path


def _is_url(source):
    return urlsplit(os.fspath(source)).scheme in ("http", "https")


def _require_space(folder, needed, what):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free: make room or "
            "choose another --root"
        )


def _difference(path, known):
    """What is wrong with a file's checksum, or None."""
    kind, digits = known.split(":")
    found = pooch.file_hash(str(path), alg=kind)
    return None if found.startswith(digits) else f"{kind.upper()} {found}, expected {digits}"


def _record(path):
    return path.with_name(path.name + ".sha256")


def _remove(path):
    """A download that is not what it should be, and the checksum that was recorded of it."""
    path.unlink()
    _record(path).unlink(missing_ok=True)


def fetch(source, folder, *, known=None, progress=True):
    """The file behind ``source``, a path or an http(s) URL, as a path.

    A local file is used where it is, and never removed. A download goes to ``folder`` by way of
    ``<name>.part``, which the next call continues if there is a checksum to tell that it is the same file.

    known: the checksum, see `Remote`. None: of a download, the one recorded at the first.

    Raises:
        FileNotFoundError: no such local file.
        ConnectionError: the host can't be reached, refuses the file, or breaks off repeatedly.
        ValueError: another checksum. A downloaded file is removed then, a local one isn't.
        OSError: not enough disk space.
    """
    if not _is_url(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        if known and (wrong := _difference(path, known)):
            raise ValueError(f"{path} has {wrong}: cut off, damaged, or another version")
        return path
    target = Path(folder) / (PurePosixPath(urlsplit(source).path).name or "download")
    record, recorded = _record(target), ""
    if known is None and record.is_file():
        known = f"sha256:{record.read_text(encoding='utf-8').split()[0]}"
        recorded = f" (in {record}, written at the first download)"
    if target.is_file() and known:
        if not _difference(target, known):
            return target
        print(f"{target} has the wrong checksum; downloading it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    _arrive(source, target, resume=known is not None, progress=progress)
    if known is None:
        write_text(record, f"{pooch.file_hash(str(target))}  {target.name}\n")
    elif wrong := _difference(target, known):
        target.unlink()
        raise ValueError(
            f"{source} has {wrong}{recorded}. The download was removed; run the command again, or use "
            "another mirror."
        )
    return target


def _arrive(url, target, resume, progress):
    """Download, in several attempts, going on where the last one broke off, which pooch can't."""
    part = target.with_name(target.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part, resume, progress)
            return os.replace(part, target)
        except _NETWORK_ERRORS as error:
            code = getattr(error, "code", 0)
            refused = 400 <= code < 500 and code not in (416, 429)
            if not refused and attempt < ATTEMPTS:
                time.sleep(PAUSE * attempt)
                continue
            how_often = "the host refuses it" if refused else f"tried {attempt} times"
            kept = " What has arrived is kept; the same command goes on from there."
            raise ConnectionError(
                f"{url}: {error} ({how_often}). Check the connection, try a mirror, or pass a copy of "
                f"{target.name} from elsewhere (--local).{kept if resume and part.is_file() else ''}"
            ) from error


def _transfer(url, part, resume, progress):
    """Bring ``part`` to its full length."""
    have = part.stat().st_size if resume and part.is_file() else 0
    headers = {"User-Agent": "drs-course"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what we have is all of it, or of another file: the next attempt starts anew
            part.unlink()
        raise
    with response:
        have = have if response.status == 206 else 0
        total = have + int(response.headers.get("Content-Length", 0))
        _require_space(part.parent, total - have, part.name)
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=not progress)
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < total:
        raise ConnectionError(f"the connection closed after {part.stat().st_size} of {total} bytes")


def _unpack(path, folder, downloaded):
    """Unpack a zip or tar archive into a new folder, of which no name in it leads out. One that is damaged is
    removed if it was downloaded."""
    folder.mkdir()
    _require_space(folder, path.stat().st_size, f"extracting {path.name}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # which drops roots and dots, and makes no links
                archive.extractall(folder)
        else:
            with tarfile.open(path) as archive:
                # Python before 3.10.12 and 3.11.4 has no filters; the tar has passed its checksum.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        ending = "It was removed; run the command again." if downloaded else "Get it again."
        if downloaded:
            _remove(path)
        raise ValueError(
            f"{path} is no archive, or cut off or damaged ({error}). {ending} A link that opens a page in "
            "the browser (a cloud drive's, say) can't be given here: download the file in the browser and "
            "pass its path."
        ) from error


def _move(source, target):
    """Move a tree over another: a folder that isn't there yet by one rename, else file by file."""
    if source.is_dir() and target.is_dir():
        for child in source.iterdir():
            _move(child, target / child.name)
    else:
        os.replace(source, target)


def _voc_folder(root):
    root = Path(root).expanduser()
    if root.name == "VOC2012" or (root / "JPEGImages").is_dir():
        return root
    devkit = root / "VOCdevkit" / "VOC2012"
    return devkit if devkit.is_dir() else root / "VOC2012"


def _ids(tree, split):
    path = tree / "ImageSets" / "Segmentation" / f"{split}.txt"
    return read_list(path) if path.is_file() else []


def _voc_problem(tree):
    """What is wrong with the devkit's own part of a tree, or None."""
    try:
        for split, labels in product(("train", "val"), ("xml", "mask")):
            VOC2012(tree, split, labels=labels, masks="SegmentationClass")
    except (FileNotFoundError, ValueError) as error:
        return str(error)


def _weights(kind, get):
    place = weights_folder() / FILES[kind].name
    path, downloaded = get(FILES[kind], place.parent)
    with open(path, "rb") as file:
        is_weights = file.read(2) in (b"PK", b"\x80\x02")  # what torch.save writes, now and before 1.6
    if not is_weights:
        if downloaded:
            _remove(path)
        raise ValueError(f"{path} holds no weights{'; it was removed' if downloaded else ''}")
    if not place.is_file() or not place.samefile(path):
        with atomic_path(place) as temporary:
            shutil.copyfile(path, temporary)
    return f"{place}"


def _voc(tree, get, work):
    if _voc_problem(tree) is None and all(
        len(os.listdir(tree / folder)) >= VOC_IMAGES for folder in ("JPEGImages", "Annotations")
    ):
        return f"{tree}: VOC 2012 is complete"
    path, downloaded = get(FILES["voc"], tree.parent / "downloads")
    _unpack(path, work / "archive", downloaded)
    found = next((images.parent for images in work.rglob("JPEGImages")), work)
    if problem := _voc_problem(found):
        raise ValueError(f"{path} is not VOC 2012's train/val archive: {problem}")
    _move(found, tree)
    return f"{tree}: VOC 2012 extracted"


def _pngs(kind, tree, get, work):
    """A folder with a PNG for each image; of the augmented masks, also the list trainaug."""
    folder, modes, what = _PNGS[kind]
    train, val, trainaug = (_ids(tree, split) for split in ("train", "val", "trainaug"))
    wanted = trainaug or train
    problem = None if wanted else "no train list found"
    if kind == "aug":
        wanted = trainaug + val if len(trainaug) == VOC_LIST_SIZES["trainaug"] else []
        problem = _voc_problem(tree)
    if wanted and {file.stem for file in (tree / folder).glob("*.png")}.issuperset(wanted):
        return f"{tree}: the {what} are complete"
    if problem:
        raise ValueError(f"{tree}: VOC 2012 has to be there before the {what}; {problem}")
    path, downloaded = get(FILES[kind], tree.parent / "downloads")
    _unpack(path, work / "archive", downloaded)
    (work / folder).mkdir()
    for file in sorted((work / "archive").rglob("*.png")):
        if not file.name.startswith(".") and "__MACOSX" not in file.parts:
            _check_png(path, file, modes)
            if (work / folder / file.name).exists():
                raise ValueError(f"{path} holds two files {file.name}")
            os.replace(file, work / folder / file.name)
    found = {file.stem for file in (work / folder).iterdir()}
    if kind == "aug":
        _check_masks(path, found, train, val)
        for name in set(val) - found:
            shutil.copyfile(tree / "SegmentationClass" / f"{name}.png", work / folder / f"{name}.png")
    elif missing := [f"{name}.png" for name in wanted if name not in found]:
        raise ValueError(f"{path} lacks {what} for images of the training list: {first_few(missing)}")
    _move(work / folder, tree / folder)
    if kind != "aug":
        return f"{tree}: {len(found)} {what}"
    trainaug = sorted(found - set(val))
    write_text(tree / "ImageSets" / "Segmentation" / "trainaug.txt", "\n".join(trainaug) + "\n")
    return f"{tree}: {len(trainaug)} trainaug masks and the list trainaug.txt"


def _check_png(path, file, modes):
    try:
        with Image.open(file) as image:
            mode = image.mode
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: {file.name} is not an image") from error
    if mode not in modes:
        expected = " or ".join(modes)
        raise ValueError(
            f"{path}: {file.name} has mode {mode}, expected {expected} (L = 8-bit greyscale, P = indexed)"
        )


def _check_masks(path, found, train, val):
    outside, needed = len(found - set(val)), VOC_LIST_SIZES["trainaug"]
    if outside != needed or not set(train) <= found:
        raise ValueError(
            f"{path} has masks for {outside} images outside of VOC's val list and {len(set(train) & found)} "
            f"of VOC's {len(train)} train images; trainaug is {needed} images with all of train"
        )


def _sources(mirror, local):
    """The function from a `Remote` to the path or URL to fetch it from."""
    known = {remote.name for remote in FILES.values()}
    paths = [Path(path).expanduser() for path in local]
    copies = {file.name: file for path in paths for file in (path.iterdir() if path.is_dir() else [path])}
    if local and not copies.keys() & known:
        raise ValueError(
            f"--local {' '.join(map(str, paths))}: no file there has the name of one that is wanted; the "
            f"names are {', '.join(sorted(known))}"
        )

    def source(remote):
        last = mirror and PurePosixPath(urlsplit(mirror).path).name
        if remote.name in copies:
            return copies[remote.name]
        if mirror is None or (last in known and last != remote.name):
            return remote.url
        return mirror if last == remote.name else f"{mirror.rstrip('/')}/{remote.name}"

    return source


def download(root="data", *, only=None, mirror=None, local=(), progress=True):
    """Fetch, check and put into place what is still lacking; returns the VOC2012 folder.

    Args:
        root: the folder that holds (or will hold) VOC2012, or VOC2012 itself.
        only: keys of `FILES`; None: all.
        mirror: URL of one of the files, or of a folder that has all that is wanted.
        local: copies of the files under their names, or folders with such.

    Raises:
        ValueError: another checksum, or a file that is damaged, unsafe or not what it should be.
        ConnectionError, FileNotFoundError, OSError: as `fetch`.
        RuntimeError: another download is at work there.
    """
    if unknown := sorted(set(only or ()) - set(FILES)):
        raise ValueError(f"nothing to download is called {unknown[0]!r}; there are {', '.join(FILES)}")
    tree, source_of = _voc_folder(root), _sources(mirror, local)

    def get(remote, folder):
        """The file's path, and whether it was downloaded."""
        source = source_of(remote)
        return fetch(source, folder, known=remote.known, progress=progress), _is_url(source)

    for kind in FILES if only is None else [kind for kind in FILES if kind in only]:
        folder = tree.parent if kind in TREE else weights_folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".download.lock", timeout=0):
                for leftover in folder.glob(".extracting-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=".extracting-", dir=folder) as work:
                    if kind == "voc":
                        print(_voc(tree, get, Path(work)))
                    elif kind in _PNGS:
                        print(_pngs(kind, tree, get, Path(work)))
                    else:
                        print(_weights(kind, get))
        except Timeout as error:
            raise RuntimeError(f"another download is working on {folder}; wait for it") from error
    return tree
