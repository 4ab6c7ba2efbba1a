import hashlib
import http.server
import io
import os
import re
import shutil
import stat
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny import write_voc_tree
from torchvision.models import ResNet101_Weights, VGG16_Weights

from drs_course import download
from drs_course.__main__ import main
from drs_course.download import FILES, TREE, Remote, fetch
from drs_lib.data import VOC2012
from drs_lib.data.voc import read_list

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server:
    """A web server on loopback that serves ``files`` and misbehaves as told."""

    def __init__(self):
        self.files = {"data.bin": CONTENT}
        self.paths = []  # of each request
        self.stop_after = []  # bytes after which the next answers break off
        self.status = None  # answer with this error instead
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                server.paths.append(self.path)
                content = server.files.get(self.path.rsplit("/", 1)[1])
                if server.status or content is None:
                    return self.send_error(server.status or 404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: server.stop_after.pop(0)] if server.stop_after else content)

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()
        self.base = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def close(self):
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Torch hub's folder of checkpoints, which every test has to itself."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)  # between attempts
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    yield server
    server.close()


def test_a_download_is_complete_or_not_there(server, tmp_path):
    def get():
        return fetch(f"{server.base}/data.bin", tmp_path / "new", progress=False)

    server.stop_after = [0, 1_000_000]
    path = get()
    assert path == tmp_path / "new" / "data.bin" and path.read_bytes() == CONTENT
    assert get() == path and len(server.paths) == 3
    path.unlink()
    for server.status in (404, 503, None):
        server.stop_after = [1_000_000] * 3
        if server.status is None:
            server.close()
        reason = f"{server.status or 'refused'}.*tried 3 times.*try a mirror, or pass a copy of data.bin"
        with pytest.raises(ConnectionError, match=reason):
            get()
        assert os.listdir(path.parent) == []


def test_local_files_are_used_in_place(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    assert fetch(path, tmp_path / "x") == path and not (tmp_path / "x").exists()
    with pytest.raises(FileNotFoundError, match="no file"):
        fetch(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize("digits", [None, 8])
def test_checksums_of_which_the_first_digits_will_do(server, tmp_path, monkeypatch, hub, kind, digits):
    torch.save({"x": torch.ones(1)}, tmp_path / "any.pth")
    content = (tmp_path / "any.pth").read_bytes()
    found = hashlib.new(kind, content).hexdigest()
    server.files = {FILES["drs"].name: content}
    options = {"root": tmp_path, "only": ["drs"], "mirror": server.base, "progress": False}

    def known(expected):
        monkeypatch.setitem(FILES, "drs", FILES["drs"]._replace(known=f"{kind}:{expected}"))

    known("0" * len(found[:digits]))
    with pytest.raises(ValueError, match=f"{kind.upper()} {found}, expected 0+:.*The download was removed"):
        download.download(**options)
    assert visible(hub) == []
    known(found[:digits])
    for _ in range(2):
        download.download(**options)
        assert visible(hub) == [FILES["drs"].name] and len(server.paths) == 2
    # A local file with another checksum stays.
    (hub / FILES["drs"].name).unlink()
    (tmp_path / FILES["drs"].name).write_bytes(content + b"x")
    with pytest.raises(ValueError, match=f"{kind.upper()} .*, expected {found[:digits]}: cut off"):
        download.download(**options, local=[tmp_path])
    assert (tmp_path / FILES["drs"].name).exists() and visible(hub) == []


# The archives below hold a tiny tree; the numbers of the real ones are replaced by its own.
TRAIN, VAL, MORE = 5, 3, 4


def with_checksum(kind, path):
    return FILES[kind]._replace(known=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """VOC tar, mask zip and saliency zip of a tiny tree: 5 train, 3 val, 4 other images."""
    source = write_voc_tree(tmp_path / "source" / "VOCdevkit", TRAIN + MORE, VAL, own_classes=False)
    lists = source / "ImageSets" / "Segmentation"
    trainaug, val = (read_list(lists / f"{split}.txt") for split in ("train", "val"))
    (lists / "train.txt").write_text("\n".join(trainaug[:TRAIN]), encoding="utf-8")
    for split in ("trainaug", "trainval"):
        (lists / f"{split}.txt").unlink()
    for name in trainaug[TRAIN:]:
        (source / "SegmentationClass" / f"{name}.png").unlink()
    paths = {kind: tmp_path / FILES[kind].name for kind in TREE}
    with tarfile.open(paths["voc"], "w") as tar:
        for folder in ("JPEGImages", "ImageSets", "SegmentationClass"):
            tar.add(source / folder, f"VOCdevkit/VOC2012/{folder}")
    shutil.copytree(source / "SegmentationClassAug", source / "refined_pseudo_segmentation_labels")
    folders = ("SegmentationClassAug", "saliency_map", "refined_pseudo_segmentation_labels")
    for kind, folder in zip(TREE[1:], folders, strict=True):
        with zipfile.ZipFile(paths[kind], "w") as archive:
            for file in sorted((source / folder).iterdir()):
                archive.write(file, f"{folder}/{file.name}")
            archive.writestr("__MACOSX/._2007_000001.png", b"junk")
    monkeypatch.setattr(download, "VOC_IMAGES", TRAIN + VAL + MORE)
    sizes = {"train": TRAIN, "val": VAL, "trainval": TRAIN + VAL, "trainaug": TRAIN + MORE}
    for split, size in sizes.items():
        monkeypatch.setitem(download.VOC_LIST_SIZES, split, size)
    monkeypatch.setitem(FILES, "voc", with_checksum("voc", paths["voc"]))
    return {**paths, "source": source, "train": trainaug[:TRAIN], "trainaug": trainaug, "val": val}


def install(archives, root, only=TREE, **other):
    local = [archives[kind] for kind in only if kind in TREE]
    return download.download(root, only=only, local=local, progress=False, **other)


def visible(folder):
    return sorted(name for name in os.listdir(folder) if name != ".download.lock")


@pytest.mark.parametrize("val_masks", [True, False])  # VOC's own take the place of those that lack
def test_everything_from_local_files(archives, tmp_path, val_masks):
    root = tmp_path / "data"
    if not val_masks:
        rewrite_zip(archives["aug"], drop=archives["val"])
    tree = install(archives, root)
    assert tree == root / "VOC2012" and visible(root) == ["VOC2012"]
    for split in ("train", "val", "trainaug"):
        ds = VOC2012(root, split)
        assert ds.names == archives[split]
        for i, name in enumerate(ds.names):
            source = archives["source"]
            masks = "SegmentationClassAug" if val_masks or split != "val" else "SegmentationClass"
            np.testing.assert_array_equal(ds.mask(i), Image.open(source / masks / f"{name}.png"))
            np.testing.assert_array_equal(ds.saliency(i), Image.open(source / "saliency_map" / f"{name}.png"))
    assert len(os.listdir(tree / "refined_pseudo_segmentation_labels")) == TRAIN + MORE + VAL
    # A second run finds all in place and needs no archive.
    for kind in TREE:
        archives[kind].unlink()
    install(archives, root)


def test_from_a_server_and_a_mirror(archives, tmp_path, server, monkeypatch):
    server.files = {archives[kind].name: archives[kind].read_bytes() for kind in TREE}
    for kind in TREE[1:]:
        monkeypatch.setitem(FILES, kind, FILES[kind]._replace(url=f"{server.base}/asset/{FILES[kind].name}"))
    options = {"only": ("voc", "aug", "saliency"), "progress": False}
    mirror = f"{server.base}/mirror/{FILES['voc'].name}"  # of VOC alone; the others from their own place
    tree = download.download(tmp_path / "data", mirror=mirror, **options)
    assert len(VOC2012(tree, "trainaug")) == TRAIN + MORE
    names = [FILES[kind].name for kind in options["only"]]
    assert server.paths == [f"/mirror/{names[0]}", *(f"/asset/{name}" for name in names[1:])]
    server.paths.clear()
    download.download(tmp_path / "again", mirror=server.base + "/all/", **options)
    assert server.paths == [f"/all/{name}" for name in names]


def test_a_half_extracted_tree_is_completed(archives, tmp_path):
    root = tmp_path / "data"
    tree = install(archives, root)
    last = archives["trainaug"][-1]
    spoilt = [tree / "JPEGImages" / f"{last}.jpg", tree / "SegmentationClassAug" / f"{last}.png"]
    for path in spoilt:
        path.unlink()
    shutil.rmtree(tree / "SegmentationClass")
    mine = tree / "results.txt"
    mine.write_text("mine")
    install(archives, root)
    assert all(path.is_file() for path in spoilt) and mine.read_text() == "mine"
    assert len(os.listdir(tree / "SegmentationClass")) == TRAIN + VAL


def test_a_killed_extraction_leaves_no_half_tree(archives, tmp_path, monkeypatch):
    root = tmp_path / "data"
    real, calls = tarfile.copyfileobj, []

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", stops)
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # killed: no time to clean up
        with pytest.raises(KeyboardInterrupt):
            install(archives, root)
    assert not (root / "VOC2012").exists() and visible(root)[0].startswith(".extracting-")
    install(archives, root)
    assert visible(root) == ["VOC2012"]


def test_two_at_once(archives, tmp_path):
    (tmp_path / "data").mkdir()
    with (
        FileLock(tmp_path / "data" / ".download.lock"),
        pytest.raises(RuntimeError, match="another download"),
    ):
        install(archives, tmp_path / "data")


def test_no_space(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**3))
    with pytest.raises(OSError, match="extracting VOCtrainval_11-May-2012.tar needs 0.00 GB.*make room"):
        install(archives, tmp_path / "data")
    assert visible(tmp_path / "data") == []


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("share", [0.3, 0.75])
def test_truncated_archives(archives, tmp_path, monkeypatch, kind, share):
    root = tmp_path / "data"
    install(archives, root, ["voc"] if kind != "voc" else [])
    content = archives[kind].read_bytes()
    archives[kind].write_bytes(content[: int(len(content) * share)])
    monkeypatch.setitem(FILES, "voc", with_checksum("voc", archives["voc"]))
    before = {*root.rglob("*")}
    with pytest.raises(ValueError, match="cut off or damaged|is not VOC 2012"):
        install(archives, root, [kind])
    assert {*root.rglob("*")} - {root / ".download.lock"} == before - {root / ".download.lock"}
    assert archives[kind].exists()


@pytest.mark.parametrize(
    ("kind", "content"),
    [("aug", b"<html>log in</html>"), ("drs", b"<html>log in</html>"), ("drs", b"PK cut off")],
)
def test_a_web_page_instead_of_a_file_is_removed(archives, tmp_path, hub, server, kind, content):
    root = tmp_path / "data"
    install(archives, root, ["voc"])
    server.files = {FILES[kind].name: content}
    mirror = f"{server.base}/{FILES[kind].name}"
    says = "in the browser" if kind == "aug" else "no weights"
    with pytest.raises(ValueError, match=f"{says}.*removed"):
        download.download(root, only=[kind], mirror=mirror, progress=False)
    assert visible(root / "downloads" if kind == "aug" else hub) == []


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("VOCdevkit/../../evil", tarfile.REGTYPE, "evil"),
        ("VOCdevkit/VOC2012/JPEGImages/evil", tarfile.SYMTYPE, "evil"),
        ("/{outside}/evil", tarfile.REGTYPE, "is not VOC 2012"),  # stays in its folder
    ],
)
def test_nothing_in_a_tar_leaves_its_folder(archives, tmp_path, monkeypatch, name, kind, message):
    with tarfile.open(archives["voc"], "w") as tar:
        good = tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages/a.jpg")
        good.size = 4
        tar.addfile(good, io.BytesIO(b"good"))
        bad = tarfile.TarInfo(name.format(outside=tmp_path))
        bad.type, bad.linkname, bad.size = kind, "/etc/passwd", 4 if kind == tarfile.REGTYPE else 0
        tar.addfile(bad, io.BytesIO(b"evil"))
    monkeypatch.setitem(FILES, "voc", with_checksum("voc", archives["voc"]))
    with pytest.raises(ValueError, match=message):
        install(archives, tmp_path / "data")
    assert visible(tmp_path / "data") == [] and not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "link.png"])
def test_zips_that_leave_their_folder_are_refused(archives, tmp_path, name):
    root = tmp_path / "data"
    install(archives, root, ["voc"])
    info = zipfile.ZipInfo(name)
    if name == "link.png":
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archives["aug"], "a") as archive:
        archive.writestr(info, b"../../evil.png")
    with pytest.raises(ValueError, match=r"(link|evil)\.png is not an image"):
        install(archives, root, ["aug"])
    assert not list(tmp_path.rglob("evil.png")) and not (root / "VOC2012" / "SegmentationClassAug").exists()


def rewrite_zip(path, drop=(), change=None):
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if Path(name).stem not in drop:
                archive.writestr(name, (change or {}).get(Path(name).stem, content))


def test_masks_and_maps_that_are_not_the_images_are_refused(archives, tmp_path):
    root, last = tmp_path / "data", archives["trainaug"][-1]
    for kind in ("aug", "saliency", "labels"):
        with pytest.raises(ValueError, match="VOC 2012 has to be there"):
            install(archives, root, [kind])
    install(archives, root, ["voc"])
    coloured = io.BytesIO()
    Image.new("RGB", (4, 4)).save(coloured, "PNG")
    for kind in ("aug", "saliency", "labels"):
        whole = archives[kind].read_bytes()
        rewrite_zip(archives[kind], change={last: coloured.getvalue()})
        with pytest.raises(ValueError, match=f"{last}.png has mode RGB"):
            install(archives, root, [kind])
        archives[kind].write_bytes(whole)
    rewrite_zip(archives["aug"], drop=[last])
    with pytest.raises(ValueError, match=f"masks for {TRAIN + MORE - 1} images.*trainaug is {TRAIN + MORE}"):
        install(archives, root, ["aug"])
    assert not (root / "VOC2012" / "ImageSets" / "Segmentation" / "trainaug.txt").exists()
    rewrite_zip(archives["saliency"], drop=archives["train"][:1])
    with pytest.raises(ValueError, match=f"lacks saliency maps.*{archives['train'][0]}"):
        install(archives, root, ["saliency"])


def test_torchvisions_files_are_torchvisions():
    for kind, weights in (("vgg16", VGG16_Weights), ("resnet101", ResNet101_Weights)):
        url = weights.IMAGENET1K_V1.url
        assert FILES[kind] == Remote(url, "sha256:" + re.search(r"-(\w+)\.pth", url)[1])


def test_weights_go_where_torchvision_looks(server, tmp_path, hub, capsys):
    weights = [kind for kind in FILES if kind not in TREE and FILES[kind].known is None]
    command = "DRS_learnable.pth: 'python -m drs_course download --only drs'"
    with pytest.raises(FileNotFoundError, match=command):
        download.weights_file("drs")
    torch.save({"x": torch.ones(1)}, tmp_path / "any.pth")
    server.files = {FILES[kind].name: (tmp_path / "any.pth").read_bytes() for kind in weights}
    copy = tmp_path / "copies" / FILES["drs"].name
    copy.parent.mkdir()
    torch.save({"x": torch.zeros(1)}, copy, _use_new_zipfile_serialization=False)
    options = ["--only", *weights, "--mirror", server.base, "--local", str(copy.parent)]
    assert main(["download", "--root", str(tmp_path / "data"), *options]) == 0
    assert [download.weights_file(kind) for kind in weights] == [hub / FILES[kind].name for kind in weights]
    assert len(server.paths) == len(weights) - 1  # one was at hand
    assert torch.load(hub / copy.name)["x"] == 0 and str(hub / copy.name) in capsys.readouterr().out
    assert main(["download", *options]) == 0 and len(server.paths) == len(weights) - 1
    # Table 4's initial weights may be named as they were downloaded; this file is none of them.
    assert main(["tables", "--data", "voc", "--aspp-weights", FILES["coco"].name]) == 1
    assert f"{hub / FILES['coco'].name} does not fit" in capsys.readouterr().err


def test_command(archives, tmp_path, capsys):
    root = str(tmp_path / "data")
    assert main(["download", "--root", root, "--only", "voc", "--local", str(tmp_path)]) == 0
    assert "VOC 2012 extracted" in capsys.readouterr().out
    for wrong, says in (
        (["--only", "mask"], "no.*'mask'; there are vgg16,.*labels"),
        (["--local", str(tmp_path / "none.zip")], "none.zip: no file there has the name"),
        (["--only", "aug", "--local", "no/SegmentationClassAug.zip"], "no file no"),
    ):
        assert main(["download", "--root", root, *wrong]) == 1
        assert re.search(says, capsys.readouterr().err)
    assert main(["download", "--root", root, "--only", "aug", "labels", "--local", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{TRAIN + MORE + VAL} augmented masks" in out and f"{TRAIN + MORE + VAL} pseudo labels" in out
