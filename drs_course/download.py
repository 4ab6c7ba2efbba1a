"""Fetch what the tables on VOC need, check it, and put it where it is looked for.

    python -m drs_course download --root data
    python -m drs_course download --root data --only voc --mirror https://elsewhere.org/VOCtrainval_11-May-2012.tar
    python -m drs_course download --root data --local ~/Downloads

VOC 2012, its augmented masks, the saliency maps and the authors' pseudo labels go to ``VOC2012`` in the root,
weights to torch hub's folder of checkpoints, where torchvision looks for its own. `FILES` lists them all. A
mirror, or a local file of the same name, takes the place of any of them. A download that was interrupted goes
on where it stopped when the command is run again, and a tree is only changed by complete archives.

What has a published checksum is held to it. Of the rest the SHA-256 is written beside the first download, as
``<name>.sha256``, and later downloads are held to that.
"""

import http.client
import io
import json
import os
import re
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pooch
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from drs_lib.data.voc import VOC_LIST_SIZES, first_few, read_list, save_indexed_png
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
    "saliency": ("saliency_map", ("L",), "saliency maps"),
    "labels": ("refined_pseudo_segmentation_labels", ("L", "P"), "pseudo labels of the authors"),
}
TREE = ("voc", "aug", *_PNGS)  # what goes there; the others are weights
SBD = Remote(
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    "md5:82b4d87ceb2ed10f6038a1cba92111cb",
)
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
    import torch

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
    ``<name>.part``, which the next call continues with a Range request if the server still has the same file
    (its ETag or date says so, or the checksum will); a server that doesn't know Range starts anew.

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
        target.unlink()
    pooch.get_logger().setLevel("WARNING")  # it would advise on arguments of its own
    resume = partial(_resume, target=target, checked=known is not None, progress=progress)
    pooch.retrieve(source, None, fname=target.name, path=folder, downloader=resume)
    if known is None:
        write_text(record, f"{pooch.file_hash(str(target))}  {target.name}\n")
    elif wrong := _difference(target, known):
        target.unlink()
        raise ValueError(
            f"{source} has {wrong}{recorded}. The download was removed; run the command again, or use "
            "another mirror."
        )
    return target


def _resume(url, output, _, *, target, checked, progress):
    """A downloader for pooch that goes on where the last one was broken off, which pooch's own don't."""
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part, note, checked, progress)
            break
        except _NETWORK_ERRORS as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 0
            refused = 400 <= code < 500 and code not in (416, 429)
            if not refused and attempt < ATTEMPTS:
                time.sleep(PAUSE * attempt)
                continue
            reason = error.reason if type(error) is urllib.error.URLError else error
            how_often = "the host refuses it" if refused else f"tried {attempt} times"
            kept = " What has arrived is kept; the same command goes on from there." if part.is_file() else ""
            raise ConnectionError(
                f"{url}: {reason} ({how_often}). Check the connection, try a mirror, or pass a copy of "
                f"{target.name} from elsewhere (--local).{kept}"
            ) from error
    os.replace(part, output)
    note.unlink(missing_ok=True)


def _transfer(url, part, note, checked, progress):
    """Bring ``part`` to its full length, continuing what is there if it is sure to be the same file's
    beginning."""
    headers = {"User-Agent": "drs-course", "Accept-Encoding": "identity"}
    have = part.stat().st_size if part.is_file() else 0
    known = json.loads(note.read_text()) if have and note.is_file() else {}
    if known.get("url") == url and known.get("validator"):
        headers["If-Range"] = known["validator"]
    elif not checked:
        have = 0
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what we have is all of it, or of another file: the next attempt starts anew
            part.unlink()
        raise
    with response:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        validator = response.headers.get("ETag") or ""
        if not validator or validator.startswith("W/"):
            validator = response.headers.get("Last-Modified")
        write_text(note, json.dumps({"url": url, "validator": validator}))
        _require_space(part.parent, (total or 0) - have, part.name)
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=not progress)
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection closed after {part.stat().st_size} of {total} bytes")


@contextmanager
def _reading(path, downloaded):
    """Turn the many errors of damaged archives into one, and remove the archive if we had downloaded it."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        ending = "It was removed; run the command again." if downloaded else "Get it again."
        if downloaded:
            _remove(path)
        raise ValueError(
            f"{path} is no archive, or cut off or damaged ({error}). {ending} A link that opens a page in "
            "the browser (a cloud drive's, say) can't be given here: download the file in the browser and "
            "pass its path."
        ) from error


def _unpack(path, folder, downloaded):
    """Unpack a tar or zip archive into a new folder, of which no name in it leads out."""
    folder.mkdir()
    with _reading(path, downloaded):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # which drops roots and dots, and makes no links
                size = sum(info.file_size for info in archive.infolist())
                _require_space(folder, size, f"extracting {path.name}")
                archive.extractall(folder)
        else:
            with tarfile.open(path) as archive:
                _require_space(folder, path.stat().st_size, f"extracting {path.name}")
                # Python before 3.10.12 and 3.11.4 has no filters; the tar has passed its checksum.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(folder)


def _move(source, target):
    """Move a tree over another: a folder that isn't there yet by one rename, else file by file."""
    if source.is_dir() and target.is_dir():
        for child in source.iterdir():
            _move(child, target / child.name)
    else:
        os.replace(source, target)


class _Installer:
    """Puts files into place. source: from a `Remote` to the URL or path that stands for it."""

    def __init__(self, root, source, sbd, progress):
        root = Path(root).expanduser()
        self.source, self.sbd, self.progress = source, sbd, progress
        if root.name == "VOC2012" or (root / "JPEGImages").is_dir():
            self.tree = root
        elif (root / "VOCdevkit" / "VOC2012").is_dir():
            self.tree = root / "VOCdevkit" / "VOC2012"
        else:
            self.tree = root / "VOC2012"

    def install(self, kind):
        if kind in _PNGS:
            self.pngs(kind)
        elif kind == "voc":
            self.voc()
        elif kind == "aug":
            self.masks()
        else:
            self.weights(FILES[kind])

    def _fetch(self, remote, folder=None):
        """The file's path, and whether it was downloaded."""
        source = self.source(remote)
        folder = self.tree.parent / "downloads" if folder is None else folder
        return fetch(source, folder, known=remote.known, progress=self.progress), _is_url(source)

    def _list(self, split, tree=None):
        path = (tree or self.tree) / "ImageSets" / "Segmentation" / f"{split}.txt"
        return read_list(path) if path.is_file() else []

    @contextmanager
    def _workspace(self):
        work = Path(tempfile.mkdtemp(prefix=".extracting-", dir=self.tree.parent))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def weights(self, remote):
        place = weights_folder() / remote.name
        path, downloaded = self._fetch(remote, place.parent)
        with open(path, "rb") as file:
            begins = file.read(2)
        if begins not in (b"PK", b"\x80\x02"):  # what torch.save writes, now and before 1.6
            if downloaded:
                _remove(path)
            raise ValueError(f"{path} holds no weights{'; it was removed' if downloaded else ''}")
        if not place.is_file() or not place.samefile(path):
            with atomic_path(place) as temporary:
                shutil.copyfile(path, temporary)
        print(place)

    def _missing(self, tree, names, folders):
        """Files of ``names`` that are not there, as relative paths."""
        missing = []
        for folder, suffix in folders:
            there = set(os.listdir(tree / folder)) if (tree / folder).is_dir() else set()
            missing += [f"{folder}/{name}{suffix}" for name in names if name + suffix not in there]
        return missing

    def voc_problem(self, tree=None):
        """What is wrong with the devkit's own part of the tree, or None."""
        tree = tree or self.tree
        names = []
        for split in ("train", "val"):
            found = self._list(split, tree)
            if len(found) != VOC_LIST_SIZES[split]:
                return f"the {split} list has {len(found)} ids, expected {VOC_LIST_SIZES[split]}"
            names += found
        folders = (("JPEGImages", ".jpg"), ("Annotations", ".xml"), ("SegmentationClass", ".png"))
        missing = self._missing(tree, names, folders)
        return f"missing: {first_few(missing)}" if missing else None

    def voc(self):
        if self.voc_problem() is None and all(
            len(os.listdir(self.tree / folder)) >= VOC_IMAGES for folder in ("JPEGImages", "Annotations")
        ):
            print(f"{self.tree}: VOC 2012 is complete")
            return
        path, downloaded = self._fetch(FILES["voc"])
        with self._workspace() as work:
            _unpack(path, work / "archive", downloaded)
            tree = next((found.parent for found in work.rglob("JPEGImages")), work)
            if problem := self.voc_problem(tree):
                raise ValueError(f"{path} is not VOC 2012's train/val archive: {problem}")
            _move(tree, self.tree)
        print(f"{self.tree}: VOC 2012 extracted")

    def _pngs(self, remote, folder, expected_modes):
        """Fetch an archive and put its PNGs into one flat folder; returns the archive and their ids."""
        path, downloaded = self._fetch(remote)
        _unpack(path, folder.with_name("archive"), downloaded)
        folder.mkdir()
        for file in sorted(folder.with_name("archive").rglob("*.png")):
            if file.name.startswith(".") or "__MACOSX" in file.parts:
                continue
            if (folder / file.name).exists():
                raise ValueError(f"{path} holds two files {file.name}")
            try:
                with Image.open(file) as image:
                    mode = image.mode
            except UnidentifiedImageError as error:
                raise ValueError(f"{path}: {file.name} is not an image") from error
            if mode not in expected_modes:
                raise ValueError(
                    f"{path}: {file.name} has mode {mode}, expected {' or '.join(expected_modes)} "
                    "(L = 8-bit greyscale, P = indexed)"
                )
            os.replace(file, folder / file.name)
        return path, {file.stem for file in folder.iterdir()}

    def masks(self):
        """SegmentationClassAug and the list trainaug."""
        train, val, trainaug = (self._list(split) for split in ("train", "val", "trainaug"))
        if len(trainaug) == VOC_LIST_SIZES["trainaug"] and not self._missing(
            self.tree, trainaug + val, [("SegmentationClassAug", ".png")]
        ):
            print(f"{self.tree}: the augmented masks are complete")
            return
        if problem := self.voc_problem():
            raise ValueError(f"{self.tree}: VOC 2012 has to be there before its augmented masks; {problem}")
        with self._workspace() as work:
            masks = work / "SegmentationClassAug"
            if self.sbd:
                origin, names = self._masks_from_sbd(masks)
            else:
                origin, names = self._pngs(FILES["aug"], masks, ("L", "P"))
            trainaug = sorted(names - set(val))
            if len(trainaug) != VOC_LIST_SIZES["trainaug"] or not set(train) <= names:
                raise ValueError(
                    f"{origin} has masks for {len(trainaug)} images outside of VOC's val list and "
                    f"{len(set(train) & names)} of VOC's {len(train)} train images; trainaug is "
                    f"{VOC_LIST_SIZES['trainaug']} images with all of train"
                )
            self._copy_masks(set(val) - names, masks)
            _move(masks, self.tree / "SegmentationClassAug")
        write_text(self.tree / "ImageSets" / "Segmentation" / "trainaug.txt", "\n".join(trainaug) + "\n")
        print(f"{self.tree}: {len(trainaug)} trainaug masks and the list trainaug.txt")

    def _copy_masks(self, names, folder):
        for name in names:
            shutil.copyfile(self.tree / "SegmentationClass" / f"{name}.png", folder / f"{name}.png")

    def _masks_from_sbd(self, masks):
        """Masks of the Semantic Boundaries Dataset; VOC's own where VOC has one."""
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise RuntimeError(
                "reading the Semantic Boundaries Dataset needs SciPy: python -m pip install scipy; or leave "
                "out --sbd, which takes SegmentationClassAug.zip"
            ) from error
        path, downloaded = self._fetch(SBD)
        voc = set(self._list("train") + self._list("val"))
        masks.mkdir()
        _require_space(masks, VOC_LIST_SIZES["trainaug"] * 20_000, "converting the masks")
        with _reading(path, downloaded), tarfile.open(path) as archive:
            for member in tqdm(archive, desc="SBD", disable=not self.progress):
                match = re.fullmatch(r"(?:.*/)?dataset/cls/([^/]+)\.mat", member.name)
                if match and match[1] not in voc:
                    content = loadmat(io.BytesIO(archive.extractfile(member).read()))
                    labels = np.asarray(content["GTcls"]["Segmentation"][0][0])
                    save_indexed_png(masks / f"{match[1]}.png", labels)
        self._copy_masks(voc, masks)
        return path, {file.stem for file in masks.iterdir()}

    def pngs(self, kind):
        folder, modes, what = _PNGS[kind]
        split = "trainaug" if self._list("trainaug") else "train"
        names = self._list(split)
        if names and not self._missing(self.tree, names, [(folder, ".png")]):
            print(f"{self.tree}: the {what}, of {split}, are complete")
            return
        if not names:
            raise ValueError(f"{self.tree}: VOC 2012 has to be there before the {what}; no train list found")
        with self._workspace() as work:
            path, found = self._pngs(FILES[kind], work / folder, modes)
            missing = [f"{name}.png" for name in names if name not in found]
            if missing:
                raise ValueError(f"{path} lacks {what} for images of {split}: {first_few(missing)}")
            _move(work / folder, self.tree / folder)
        print(f"{self.tree}: {len(found)} {what}")


def _sources(mirror, local):
    """The function from a `Remote` to the path or URL to fetch it from."""
    known = {remote.name for remote in (*FILES.values(), SBD)}
    paths = [Path(path).expanduser() for path in local]
    copies = {file.name: file for path in paths for file in (path.iterdir() if path.is_dir() else [path])}
    if local and not copies.keys() & known:
        raise ValueError(
            f"--local {' '.join(map(str, paths))}: no file there has the name of one that is wanted; the "
            f"names are {', '.join(sorted(known))}"
        )

    def source(remote):
        if remote.name in copies:
            return copies[remote.name]
        last = mirror and PurePosixPath(urlsplit(mirror).path).name
        if mirror is None or (last in known and last != remote.name):
            return remote.url
        return mirror if last == remote.name else f"{mirror.rstrip('/')}/{remote.name}"

    return source


def download(root="data", *, only=None, mirror=None, local=(), sbd=False, progress=True):
    """Fetch, check and put into place what is still lacking; see the command's help.

    Args:
        root: the folder that holds (or will hold) VOC2012, or VOC2012 itself.
        only: keys of `FILES`; None: all.
        mirror: URL of one of the files, or of a folder that has all that is wanted.
        local: copies of the files under their names, or folders with such.
        sbd: make the augmented masks from the Semantic Boundaries Dataset (benchmark.tgz).

    Returns:
        The VOC2012 folder.

    Raises:
        ValueError: another checksum, or a file that is damaged, unsafe or not what it should be.
        ConnectionError, FileNotFoundError, OSError: as `fetch`.
        RuntimeError: another download is at work there, or SciPy is missing for ``sbd``.
    """
    wanted = [kind for kind in FILES if only is None or kind in only]
    if unknown := sorted(set(only or ()) - set(FILES)):
        raise ValueError(f"nothing to download is called {unknown[0]!r}; there are {', '.join(FILES)}")
    installer = _Installer(root, _sources(mirror, local), sbd, progress)
    for kind in wanted:
        folder = installer.tree.parent if kind in TREE else weights_folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".download.lock", timeout=0):
                for leftover in folder.glob(".extracting-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                installer.install(kind)
        except Timeout as error:
            raise RuntimeError(f"another download is working on {folder}; wait for it") from error
    return installer.tree
