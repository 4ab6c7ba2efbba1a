"""Put VOC 2012, the augmented masks and the saliency maps where `VOC2012` looks for them.

    python -m drs_lib.data.download --root DIR
    python -m drs_lib.data.download --root DIR --voc-tar VOCtrainval_11-May-2012.tar
    python -m drs_lib.data.download --root DIR --only aug --aug SegmentationClassAug.zip
    python -m drs_lib.data.download --root DIR --only saliency --saliency saliency_map.zip

VOC's host is often down: a mirror (``--mirror URL``) or a copy of the archive (``--voc-tar FILE``) does as
well, the checksum is the same. The augmented masks and the saliency maps are linked from the README of the
authors' release; the masks can also be made from the Semantic Boundaries Dataset (``--sbd``, needs SciPy). A
download that was interrupted goes on where it stopped when the command is run again, and a tree is only
changed by complete archives.
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from drs_lib.data.voc import VOC_LIST_SIZES, first_few, read_list, save_indexed_png
from drs_lib.files import write_text

VOC_URL = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
SBD_URL = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
)
SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"

# Images and annotations in the archive. Only decides whether there is anything to do; the checksum and the
# lists decide what is right.
VOC_IMAGES = 17125

ATTEMPTS = 3
PAUSE = 2  # seconds before the second attempt, twice that before the third
TIMEOUT = 60  # seconds without a byte

_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error)


def _md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_url(source):
    return urlsplit(os.fspath(source)).scheme in ("http", "https")


def _require_space(folder, needed, what):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free: make room or "
            "choose another --root"
        )


def fetch(source, folder, *, md5=None, progress=True):
    """The file behind ``source``, a path or an http(s) or file URL, as a path.

    A local file is used where it is, and never removed. A download goes to ``folder`` by way of
    ``<name>.part``, which the next call continues with a Range request if the server still has the same file
    (its ETag or date says so, or the checksum will); a server that doesn't know Range starts anew.

    Raises:
        FileNotFoundError: no such local file.
        ConnectionError: the host can't be reached, refuses the file, or breaks off repeatedly.
        ValueError: the checksum is not ``md5``. A downloaded file is removed then, a local one isn't.
        OSError: not enough disk space.
    """
    source = os.fspath(source)
    parts = urlsplit(source)
    if _is_url(source):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / (PurePosixPath(parts.path).name or "download")
        if target.is_file():
            if md5 is None or _md5(target) == md5:
                return target
            print(f"{target} has the wrong checksum; downloading it again")
            target.unlink()
        return _download(source, target, md5, progress)
    path = Path(urllib.request.url2pathname(parts.path) if parts.scheme == "file" else source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if md5 is not None and (found := _md5(path)) != md5:
        raise ValueError(f"{path} has MD5 {found}, expected {md5}: cut off, damaged, or another version")
    return path


def _download(url, target, md5, progress):
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part, note, md5 is not None, progress)
            break
        except _NETWORK_ERRORS as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 0
            refused = 400 <= code < 500 and code != 429
            if not refused and attempt < ATTEMPTS:
                time.sleep(PAUSE * attempt)
                continue
            reason = error.reason if type(error) is urllib.error.URLError else error
            how_often = "the host refuses it" if refused else f"tried {attempt} times"
            kept = " What has arrived is kept; the same command goes on from there." if part.is_file() else ""
            raise ConnectionError(
                f"{url}: {reason} ({how_often}). Check the connection, try a mirror, or pass a copy of "
                f"{target.name} from elsewhere.{kept}"
            ) from error
    if md5 is not None and (found := _md5(part)) != md5:
        part.unlink()
        note.unlink(missing_ok=True)
        raise ValueError(
            f"{url} has MD5 {found}, expected {md5}. The download was removed; run the command again, or use "
            "another mirror."
        )
    os.replace(part, target)
    note.unlink(missing_ok=True)
    return target


def _transfer(url, part, note, checked, progress):
    """Bring ``part`` to its full length, continuing what is there if it is sure to be the same file's
    beginning."""
    headers = {"User-Agent": "drs-course", "Accept-Encoding": "identity"}
    have = part.stat().st_size if part.is_file() else 0
    if have:
        known = json.loads(note.read_text()) if note.is_file() else {}
        if known.get("url") == url and known.get("validator"):
            headers["If-Range"] = known["validator"]
        elif not checked:
            have = 0
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # There is nothing after what we have: either it is all, or it belongs to another file.
            if re.fullmatch(rf"bytes \*/{have}", error.headers.get("Content-Range", "")):
                return
            part.unlink()
            raise ConnectionError("what was downloaded before doesn't fit the file on the server") from error
        raise
    with response:
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if span is None or int(span[1]) != have:
                raise ConnectionError(f"the server sent another range than asked for: {span and span[0]}")
            total = None if total is None else have + total
        else:
            have = 0
            part.unlink(missing_ok=True)
        validator = response.headers.get("ETag") or ""
        if not validator or validator.startswith("W/"):
            validator = response.headers.get("Last-Modified")
        write_text(note, json.dumps({"url": url, "validator": validator}))
        if total is not None:
            _require_space(part.parent, total - have, part.name)
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=not progress
            ) as bar,
        ):
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise ConnectionError(f"the connection closed after {size} of {total} bytes")


def _members(path):
    """(name, size, open) of the regular files of a tar or zip archive, in order.

    Links, devices, and names that leave the folder are refused whatever the Python version: this is stricter
    than tarfile's "data" filter, which not every Python 3.10 and 3.11 has, and holds for zip archives too.
    """

    def refuse(name, why):
        raise ValueError(
            f"{path} holds {name!r}, {why}: it is not the archive it should be; nothing was extracted"
        )

    def check(name, is_link):
        if is_link:
            refuse(name, "a link or device")
        if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            refuse(name, "a name outside of the archive's own folder")

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                check(info.orig_filename, stat.S_ISLNK(info.external_attr >> 16))
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda info=info: archive.open(info)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                check(member.name, not (member.isreg() or member.isdir()))
                if member.isreg():
                    yield member.name, member.size, lambda member=member: archive.extractfile(member)


@contextmanager
def _reading(path, downloaded):
    """Turn the many errors of damaged archives into one, and remove the archive if we had downloaded it."""
    try:
        yield
    except _ARCHIVE_ERRORS as error:
        ending = "It was removed; run the command again." if downloaded else "Get it again."
        if downloaded:
            path.unlink()
        raise ValueError(
            f"{path} is no archive, or cut off or damaged ({error}). {ending} A link that opens a page in "
            "the browser (a cloud drive's, say) can't be given here: download the file in the browser and "
            "pass its path."
        ) from error


def _extract(path, folder, place):
    """Write the members for which ``place(name)`` gives a relative path, below ``folder``."""
    seen = set()
    for name, _, opened in _members(path):
        relative = place(name)
        if relative is None:
            continue
        if relative in seen:
            raise ValueError(f"{path} holds two files for {relative}")
        seen.add(relative)
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened() as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _unpacked_size(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return sum(info.file_size for info in archive.infolist())
    return path.stat().st_size


def _move(source, target):
    """Move a tree over another: a folder that isn't there yet by one rename, else file by file."""
    if source.is_dir() and target.is_dir():
        for child in source.iterdir():
            _move(child, target / child.name)
    else:
        os.replace(source, target)


class _Installer:
    def __init__(self, root, progress):
        self.root, self.progress = Path(root).expanduser(), progress
        if self.root.name == "VOC2012" or (self.root / "JPEGImages").is_dir():
            self.tree = self.root
        elif (self.root / "VOCdevkit" / "VOC2012").is_dir():
            self.tree = self.root / "VOCdevkit" / "VOC2012"
        else:
            self.tree = self.root / "VOC2012"
        self.downloads = self.tree.parent / "downloads"

    def _list(self, split, tree=None):
        path = (tree or self.tree) / "ImageSets" / "Segmentation" / f"{split}.txt"
        return read_list(path) if path.is_file() else []

    @contextmanager
    def _workspace(self):
        self.tree.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".extracting-", dir=self.tree.parent))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def clear_leftovers(self):
        for leftover in self.tree.parent.glob(".extracting-*"):
            shutil.rmtree(leftover, ignore_errors=True)

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

    def voc(self, source):
        if self.voc_problem() is None and all(
            len(os.listdir(self.tree / folder)) >= VOC_IMAGES for folder in ("JPEGImages", "Annotations")
        ):
            print(f"{self.tree}: VOC 2012 is complete")
            return
        path = fetch(source, self.downloads, md5=VOC_MD5, progress=self.progress)
        keep = re.compile(r"(?:.*/)?VOC2012/((?:JPEGImages|Annotations|ImageSets|SegmentationClass)/.+)")

        def place(name):
            match = keep.fullmatch(name)
            return match and match[1]

        with self._workspace() as work:
            _require_space(work, _unpacked_size(path), "extracting VOC 2012")
            with _reading(path, _is_url(source)):
                _extract(path, work / "VOC2012", place)
            if problem := self.voc_problem(work / "VOC2012"):
                raise ValueError(f"{path} is not VOC 2012's train/val archive: {problem}")
            _move(work / "VOC2012", self.tree)
        print(f"{self.tree}: VOC 2012 extracted")

    def _pngs(self, source, folder, expected_modes):
        """Fetch an archive and extract its PNGs into one flat folder; returns their ids."""
        path = fetch(source, self.downloads, progress=self.progress)

        def place(name):
            pure = PurePosixPath(name)
            hidden = pure.name.startswith(".") or "__MACOSX" in pure.parts
            return pure.name if pure.suffix == ".png" and not hidden else None

        folder.mkdir()
        _require_space(folder, _unpacked_size(path), f"extracting {path.name}")
        with _reading(path, _is_url(source)):
            _extract(path, folder, place)
        for file in sorted(folder.iterdir()):
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
        return {file.stem for file in folder.iterdir()}

    def _finish_masks(self, masks, names, origin):
        """Check that the masks are those of trainaug, add VOC's own where they lack, write the list, move
        it all."""
        train, val = self._list("train"), self._list("val")
        trainaug = sorted(names - set(val))
        if len(trainaug) != VOC_LIST_SIZES["trainaug"] or not set(train) <= names:
            raise ValueError(
                f"{origin} has masks for {len(trainaug)} images outside of VOC's val list and "
                f"{len(set(train) & names)} of VOC's {len(train)} train images; trainaug is "
                f"{VOC_LIST_SIZES['trainaug']} images with all of train"
            )
        for name in set(val) - names:
            shutil.copyfile(self.tree / "SegmentationClass" / f"{name}.png", masks / f"{name}.png")
        _move(masks, self.tree / "SegmentationClassAug")
        write_text(self.tree / "ImageSets" / "Segmentation" / "trainaug.txt", "\n".join(trainaug) + "\n")
        print(f"{self.tree}: {len(trainaug)} trainaug masks and the list trainaug.txt")

    def _masks_complete(self):
        names = self._list("trainaug")
        folders = [("SegmentationClassAug", ".png")]
        return len(names) == VOC_LIST_SIZES["trainaug"] and not self._missing(
            self.tree, names + self._list("val"), folders
        )

    def _ready_for_masks(self):
        if self._masks_complete():
            print(f"{self.tree}: the augmented masks are complete")
            return False
        if problem := self.voc_problem():
            raise ValueError(f"{self.tree}: VOC 2012 has to be there before its augmented masks; {problem}")
        return True

    def masks(self, source):
        if not self._ready_for_masks():
            return
        with self._workspace() as work:
            masks = work / "SegmentationClassAug"
            self._finish_masks(masks, self._pngs(source, masks, ("L", "P")), source)

    def masks_from_sbd(self, source):
        """SegmentationClassAug from the Semantic Boundaries Dataset; VOC's own masks where VOC has one."""
        if not self._ready_for_masks():
            return
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise RuntimeError(
                "reading the Semantic Boundaries Dataset needs SciPy: python -m pip install scipy; or pass "
                "SegmentationClassAug.zip with --aug instead"
            ) from error
        path = fetch(source, self.downloads, md5=SBD_MD5, progress=self.progress)
        voc = set(self._list("train") + self._list("val"))
        with self._workspace() as work:
            masks = work / "SegmentationClassAug"
            masks.mkdir()
            _require_space(masks, VOC_LIST_SIZES["trainaug"] * 20_000, "converting the masks")
            with _reading(path, _is_url(source)):
                for member, _, opened in tqdm(_members(path), desc="SBD", disable=not self.progress):
                    match = re.fullmatch(r"(?:.*/)?dataset/cls/([^/]+)\.mat", member)
                    if match is None or match[1] in voc:
                        continue
                    with opened() as file:
                        content = loadmat(io.BytesIO(file.read()))
                    save_indexed_png(
                        masks / f"{match[1]}.png", np.asarray(content["GTcls"]["Segmentation"][0][0])
                    )
            for name in voc:
                shutil.copyfile(self.tree / "SegmentationClass" / f"{name}.png", masks / f"{name}.png")
            self._finish_masks(masks, {file.stem for file in masks.iterdir()}, path)

    def saliency(self, source):
        split = "trainaug" if self._list("trainaug") else "train"
        names = self._list(split)
        if names and not self._missing(self.tree, names, [("saliency_map", ".png")]):
            print(f"{self.tree}: the saliency maps of {split} are complete")
            return
        if not names:
            raise ValueError(
                f"{self.tree}: VOC 2012 has to be there before its saliency maps; no train list found"
            )
        with self._workspace() as work:
            maps = work / "saliency_map"
            found = self._pngs(source, maps, ("L",))
            missing = [name for name in names if name not in found]
            if missing:
                raise ValueError(f"{source} has no saliency map for images of {split}: {first_few(missing)}")
            _move(maps, self.tree / "saliency_map")
        print(f"{self.tree}: {len(found)} saliency maps")


def _voc_source(voc_tar, mirror):
    if voc_tar is not None:
        return voc_tar
    if mirror is None:
        return VOC_URL
    name = PurePosixPath(urlsplit(VOC_URL).path).name
    return mirror if mirror.endswith(".tar") else f"{mirror.rstrip('/')}/{name}"


def download_voc(
    root, *, voc_tar=None, mirror=None, aug=None, sbd=None, saliency=None, only=None, progress=True
):
    """Fetch, check and extract what a VOC tree at ``root`` still lacks; see the command's help.

    Args:
        root: the folder that holds (or will hold) VOC2012, or VOC2012 itself.
        voc_tar: a copy of VOCtrainval_11-May-2012.tar. mirror: URL of that file or of its folder.
        aug: SegmentationClassAug.zip, path or URL. sbd: benchmark.tgz, path or URL, instead of it.
        saliency: saliency_map.zip, path or URL.
        only: some of "voc", "aug", "saliency"; default: voc, and whatever has a source.

    Raises:
        ValueError: a wrong checksum, an archive that is damaged, unsafe or not what it should be, a missing
        source. ConnectionError, FileNotFoundError, OSError: as `fetch`.
        RuntimeError: another download works on this root, or SciPy is missing for ``sbd``.
    """
    wanted = only or ["voc", *(["aug"] if aug or sbd else []), *(["saliency"] if saliency else [])]
    if "aug" in wanted and not (aug or sbd):
        raise ValueError(
            "the augmented masks need a source: --aug SegmentationClassAug.zip (linked from the README of "
            "the authors' release), or --sbd, which makes them from the Semantic Boundaries Dataset"
        )
    if "saliency" in wanted and not saliency:
        raise ValueError(
            "the saliency maps need a source: --saliency saliency_map.zip (linked from the README of the "
            "authors' release)"
        )
    installer = _Installer(root, progress)
    installer.tree.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(installer.tree.parent / ".download.lock", timeout=0):
            installer.clear_leftovers()
            if "voc" in wanted:
                installer.voc(_voc_source(voc_tar, mirror))
            if "aug" in wanted:
                installer.masks(aug) if aug else installer.masks_from_sbd(sbd)
            if "saliency" in wanted:
                installer.saliency(saliency)
    except Timeout as error:
        raise RuntimeError(f"another download is working on {installer.tree.parent}; wait for it") from error
    return installer.tree


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m drs_lib.data.download",
        description="Download, check and extract VOC 2012, its augmented masks and the saliency maps.",
    )
    parser.add_argument("--root", required=True, help="the folder that will hold VOC2012")
    parser.add_argument("--voc-tar", metavar="FILE", help="a copy of VOCtrainval_11-May-2012.tar")
    parser.add_argument("--mirror", metavar="URL", help="another place of that file, or of its folder")
    parser.add_argument("--aug", metavar="FILE|URL", help="SegmentationClassAug.zip of the authors' release")
    parser.add_argument(
        "--sbd", metavar="FILE|URL", nargs="?", const=SBD_URL,
        help="make the augmented masks from the Semantic Boundaries Dataset (benchmark.tgz); needs SciPy",
    )  # fmt: skip
    parser.add_argument("--saliency", metavar="FILE|URL", help="saliency_map.zip of the authors' release")
    parser.add_argument("--only", nargs="+", choices=("voc", "aug", "saliency"), help="leave out the rest")
    arguments = vars(parser.parse_args(argv))
    try:
        tree = download_voc(arguments.pop("root"), **arguments)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    lacking = [
        hint
        for folder, hint in (
            ("SegmentationClassAug", "the augmented masks (--aug or --sbd)"),
            ("saliency_map", "the saliency maps (--saliency)"),
        )
        if not (tree / folder).is_dir()
    ]
    if lacking:
        print(f"still missing: {' and '.join(lacking)}")


if __name__ == "__main__":
    main()
