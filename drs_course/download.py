"""Fetch what the tables on VOC need, check it, and put it where it is looked for.

    python -m drs_course download --root data
    python -m drs_course download --root data --only voc --mirror https://elsewhere.org/VOCtrainval_11-May-2012.tar
    python -m drs_course download --root data --local ~/Downloads

VOC 2012, its augmented masks, the saliency maps and the authors' pseudo labels go to ``VOC2012`` in the root,
weights to torch hub's folder of checkpoints, where torchvision looks for its own. `FILES` lists them all. A
mirror, or a local file of the same name, takes the place of any of them. A tree is only changed by complete
archives.

What has a published checksum is held to it. An interrupted command is run again: it fetches what is lacking.
"""

import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import pooch
import torch
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from requests import RequestException

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

VOC_IMAGES = 17125  # in the archive; only decides whether there is anything to do
RETRIES = 2  # after an error of the network


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
    return str(source).startswith(("http://", "https://"))


def _difference(path, known):
    """What is wrong with a file's checksum, or None."""
    if known is None:
        return None
    kind, digits = known.split(":")
    found = pooch.file_hash(str(path), alg=kind)
    return None if found.startswith(digits) else f"{kind.upper()} {found}, expected {digits}"


def fetch(source, folder, *, progress=True):
    """The file behind ``source``, a path or an http(s) URL, as a path. A local file stays where it is, a
    download appears complete in ``folder``, or is there already.

    Raises:
        FileNotFoundError: no such local file.
        ConnectionError: the host can't be reached, refuses the file, or breaks off repeatedly.
    """
    if not _is_url(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        return path
    name = PurePosixPath(urlsplit(source).path).name or "download"
    place = pooch.create(folder, "", registry={name: None}, urls={name: source}, retry_if_failed=RETRIES)
    downloader = pooch.HTTPDownloader(progress, chunk_size=1 << 18, timeout=60)
    try:
        return Path(place.fetch(name, downloader=downloader))
    except RequestException as error:
        raise ConnectionError(
            f"{source}: {error} (tried {RETRIES + 1} times). Check the connection, try a mirror, or pass a "
            f"copy of {name} from elsewhere (--local)."
        ) from error


def _unpack(path, folder):
    """Unpack a zip or tar archive into a new folder, of which no name in it leads out."""
    folder.mkdir()
    needed, free = path.stat().st_size, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"extracting {path.name} needs {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free: "
            "make room or choose another --root"
        )
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
        raise ValueError(
            f"{path} is no archive, or cut off or damaged ({error}). A link that opens a page in the browser "
            "(a cloud drive's, say) can't be given here: download the file in the browser and pass its path."
        ) from error


def _voc_folder(root):
    root = Path(root).expanduser()
    if root.name == "VOC2012" or (root / "JPEGImages").is_dir():
        return root
    devkit = root / "VOCdevkit" / "VOC2012"
    return devkit if devkit.is_dir() else root / "VOC2012"


def _lists(tree):
    """The ids of train, val and trainaug, as far as they are there."""
    paths = [tree / "ImageSets" / "Segmentation" / f"{name}.txt" for name in ("train", "val", "trainaug")]
    return [read_list(path) if path.is_file() else [] for path in paths]


def _voc_problem(tree):
    """What is wrong with the devkit's own part of a tree, or None."""
    try:
        for split in ("train", "val"):
            VOC2012(tree, split, masks="SegmentationClass")
    except (FileNotFoundError, ValueError) as error:
        return str(error)


def _is_weights(path):
    """Whether it looks like what torch.save writes, a whole zip archive, or a pickle before torch 1.6."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x80\x02" or zipfile.is_zipfile(file)


def _there(kind, tree):
    """Whether nothing lacks. Raises ValueError if VOC lacks, into which it has to go."""
    if kind not in TREE:
        place = weights_folder() / FILES[kind].name
        return place.is_file() and _is_weights(place) and not _difference(place, FILES[kind].known)
    if kind == "voc":
        return _voc_problem(tree) is None and len(os.listdir(tree / "JPEGImages")) >= VOC_IMAGES
    folder, _, what = _PNGS[kind]
    train, val, trainaug = _lists(tree)
    wanted = trainaug or train
    problem = None if wanted else "no train list found"
    if kind == "aug":
        wanted = trainaug + val if len(trainaug) == VOC_LIST_SIZES["trainaug"] else []
        problem = _voc_problem(tree)
    if wanted and {file.stem for file in (tree / folder).glob("*.png")}.issuperset(wanted):
        return True
    if problem:
        raise ValueError(f"{tree}: VOC 2012 has to be there before the {what}; {problem}")
    return False


def _install(kind, path, tree, work):
    """Check what was fetched and put it into place; returns what is there now. work: a folder to unpack in.
    Raises ValueError for what is damaged, or not what it should be."""
    if kind in TREE:
        _unpack(path, work / "archive")
        if kind in _PNGS:
            return _install_pngs(kind, path, tree, work)
        found = next((images.parent for images in work.rglob("JPEGImages")), work)
        if problem := _voc_problem(found):
            raise ValueError(f"{path} is not VOC 2012's train/val archive: {problem}")
        _move(found, tree)
        return f"{tree}: VOC 2012 extracted"
    place = weights_folder() / FILES[kind].name
    if not _is_weights(path):
        raise ValueError(f"{path} holds no weights.")
    if not place.is_file() or not place.samefile(path):
        with atomic_path(place) as temporary:
            shutil.copyfile(path, temporary)
    return str(place)


def _install_pngs(kind, path, tree, work):
    """A folder with a PNG for each image; of the augmented masks, also the list trainaug."""
    folder, modes, what = _PNGS[kind]
    train, val, trainaug = _lists(tree)
    (work / folder).mkdir()
    for file in sorted((work / "archive").rglob("*.png")):
        if not file.name.startswith(".") and "__MACOSX" not in file.parts:
            _check_png(path, file, modes)
            os.replace(file, work / folder / file.name)
    found = {file.stem for file in (work / folder).iterdir()}
    wanted = train if kind == "aug" else trainaug or train
    if missing := [f"{name}.png" for name in wanted if name not in found]:
        raise ValueError(f"{path} lacks {what} for images of the training list: {first_few(missing)}")
    outside, size = sorted(found - set(val)), VOC_LIST_SIZES["trainaug"]
    if kind == "aug" and len(outside) != size:
        raise ValueError(f"{path} has masks for {len(outside)} images out of val; trainaug is {size} images")
    if kind == "aug":
        for name in set(val) - found:
            shutil.copyfile(tree / "SegmentationClass" / f"{name}.png", work / folder / f"{name}.png")
    _move(work / folder, tree / folder)
    if kind == "aug":
        write_text(tree / "ImageSets" / "Segmentation" / "trainaug.txt", "\n".join(outside) + "\n")
    return f"{tree}: {len(found)} {what}"


def _move(source, target):
    """Move the files of a tree to another, over those that are there."""
    shutil.copytree(source, target, copy_function=os.replace, dirs_exist_ok=True)


def _check_png(path, file, modes):
    try:
        with Image.open(file) as image:
            mode = image.mode
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: {file.name} is not an image") from error
    if mode not in modes:
        expected = "8-bit greyscale" if modes == ("L",) else "8-bit greyscale or indexed"
        raise ValueError(f"{path}: {file.name} has mode {mode}, expected {expected}")


def _copies(local):
    """Local copies by their names."""
    known = {remote.name for remote in FILES.values()}
    paths = [Path(path).expanduser() for path in local]
    copies = {file.name: file for path in paths for file in (path.iterdir() if path.is_dir() else [path])}
    if local and not copies.keys() & known:
        raise ValueError(
            f"--local {' '.join(map(str, paths))}: no file there has the name of one that is wanted; the "
            f"names are {', '.join(sorted(known))}"
        )
    return copies


def _mirrored(remote, mirror):
    """The URL of a file. mirror: of it, of another file, of a folder that has all; or None."""
    last = mirror and PurePosixPath(urlsplit(mirror).path).name
    if mirror is None or (last != remote.name and last in {other.name for other in FILES.values()}):
        return remote.url
    return mirror if last == remote.name else f"{mirror.rstrip('/')}/{remote.name}"


def _bring(kind, tree, folder, source, progress):
    """Fetch one of `FILES` and put it into place. A download that isn't what it should be is removed."""
    path = fetch(source, folder / "downloads" if kind in TREE else folder, progress=progress)
    try:
        if wrong := _difference(path, FILES[kind].known):
            raise ValueError(f"{path} has {wrong}: cut off, damaged, or another version.")
        with tempfile.TemporaryDirectory(prefix=".extracting-", dir=folder) as work:
            print(_install(kind, path, tree, Path(work)))
    except ValueError as error:
        if not _is_url(source):
            raise
        path.unlink()
        how = "The download was removed; run the command again, or use another mirror."
        raise ValueError(f"{error} {how}") from error


def download(root="data", *, only=None, mirror=None, local=(), progress=True):
    """Fetch, check and put into place what is still lacking; returns the VOC2012 folder.

    Args:
        root: the folder that holds (or will hold) VOC2012, or VOC2012 itself.
        only: keys of `FILES`; None: all.
        mirror: URL of one of the files, or of a folder that has all that is wanted.
        local: copies of the files under their names, or folders with such.

    Raises:
        ValueError: another checksum, or a file that is damaged, unsafe or not what it should be.
        ConnectionError, FileNotFoundError: as `fetch`.
        OSError: not enough disk space.
        RuntimeError: another download is at work there.
    """
    if unknown := sorted(set(only or ()) - set(FILES)):
        raise ValueError(f"nothing to download is called {unknown[0]!r}; there are {', '.join(FILES)}")
    tree, copies = _voc_folder(root), _copies(local)

    for kind in FILES if only is None else [kind for kind in FILES if kind in only]:
        folder = tree.parent if kind in TREE else weights_folder()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".download.lock", timeout=0):
                for leftover in folder.glob(".extracting-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                if _there(kind, tree):
                    print(f"{kind} is complete")
                else:
                    source = copies.get(FILES[kind].name) or _mirrored(FILES[kind], mirror)
                    _bring(kind, tree, folder, source, progress)
        except Timeout as error:
            raise RuntimeError(f"another download is working on {folder}; wait for it") from error
    return tree
