"""The run store: what a stage of the pipeline made, kept under the hash of what it was made from.

An entry is a folder ``<root>/<stage>/<key>/`` with the stage's files, ``meta.json`` (configuration, inputs,
versions, seconds, date) and ``manifest.json`` (size and SHA-256 of every file). It is written beside its
final place and renamed, so that an entry is there completely or not at all, whenever the process is killed;
what a power cut takes from it, the manifest tells. One process makes an entry while others that want it wait
and then read it. Where a network file system's locks hold on one machine only, or are missing, two machines
may make the same entry, and the one that is published first is kept. (``joblib.Memory`` neither locks an
entry that several processes want at once nor notices a damaged one.)
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import secrets
import shutil
import tempfile
import time
import uuid
import warnings
from contextlib import suppress
from datetime import datetime, timezone
from itertools import count
from pathlib import Path

import pooch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

META, MANIFEST = "meta.json", "manifest.json"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """A folder in which things are kept can't be written or read, or has no room."""


class _Damaged(Exception):
    """An entry's files do not agree with its manifest."""


class EntryWriter:
    """What a stage's ``make(writer)`` writes through: files of an entry that is not published yet."""

    def __init__(self, path):
        self.path, self.notes = path, {}

    def note(self, **facts):
        """Adds facts (device, threads, ...) to the entry's ``meta.json``; they do not enter its key."""
        self.notes.update(facts)

    def json(self, name, value):
        (self.path / name).write_bytes(json.dumps(value, indent=1, allow_nan=False).encode())

    def weights(self, name, model):
        """The model's parameters and buffers as safetensors, on the disk before the checkpoint goes."""
        with open(self.path / name, "wb") as file:
            file.write(save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}))
            file.flush()
            os.fsync(file.fileno())


class Entry:
    """A complete, verified entry of a `RunStore`. files: size and hash of each, by name."""

    def __init__(self, path, meta, files):
        self.path, self.meta, self.files, self.key = path, meta, files, meta["key"]

    def __repr__(self):
        return f"Entry({self.path})"

    def file(self, name):
        if name not in self.files:
            raise StoreError(f"{self.path} has no {name!r}; it has {', '.join(sorted(self.files))}.")
        return self.path / name

    def json(self, name):
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def weights(self, name="model.safetensors"):
        """The state dict, on the CPU."""
        return load_file(self.file(name), device="cpu")


def course_store():
    """Where the notebooks of a checked-out course keep their runs, wherever they are started: ``runs`` in its
    folder. None, which is `RunStore`'s default, with ``DRS_STORE`` set or without such a folder."""
    course = Path(__file__).resolve().parents[1]
    if os.environ.get("DRS_STORE") or not (course / "notebooks").is_dir():
        return None
    return course / "runs"


class RunStore:
    """Entries below ``root``: the argument, else the environment's ``DRS_STORE``, else ``./runs``."""

    def __init__(self, root=None):
        self.root = Path(root or os.environ.get("DRS_STORE") or "runs").expanduser().absolute()

    def __repr__(self):
        return f"RunStore({str(self.root)!r})"

    @staticmethod
    def key(stage, config, inputs, version=1):
        """The hash of (stage, stage version, configuration, input keys): 24 hexadecimal digits."""
        parts = {"stage": stage, "version": version, "config": config, "inputs": inputs}
        try:
            text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            message = f"A stage's configuration and inputs must be finite JSON values: {error}"
            raise ValueError(message) from error
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def folder(self, stage, key):
        return self.root / stage / key

    def mark(self):
        """The name of an empty file in the store that no other store has, put there by the first call:
        a machine that doesn't see it has another folder at this place. Raises StoreError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            marks = sorted(path.name for path in self.root.glob(".store-*"))
            if not marks:
                marks = [f".store-{uuid.uuid4().hex}"]
                (self.root / marks[0]).touch()
            return marks[0]
        except OSError as error:
            _refuse(self.root, error)

    def tidy(self, days=30):
        """Deletes unfinished entries and checkpoints that nobody has touched for so many days."""
        long_ago = time.time() - days * 24 * 3600
        for path in (*self.root.glob("*/.tmp-*"), *self.root.glob("checkpoints/*")):
            with suppress(OSError):  # a process is finishing it, or nothing may be deleted here
                if max(p.stat().st_mtime for p in (path, *path.rglob("*"))) < long_ago:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def made_at(self, stage, key):
        """When the making of this entry began (seconds since 1970), unverified; None if it is not there."""
        return _meta(self.folder(stage, key) / META).get("made_at")

    def has(self, stage, key, run=None):
        """Whether this entry is there, unverified; with a run's name, whether that run made it."""
        meta = _meta(self.folder(stage, key) / META)
        return meta.get("made_at") is not None and _made_by(meta, run)

    def metas(self, stage):
        """What ``meta.json`` says of every entry of a stage (configuration, inputs, date, ...), oldest first;
        the entries themselves are not verified."""
        found = [(path.parent.name, _meta(path)) for path in self.root.glob(f"{stage}/*/{META}")]
        # Under another name it is being written, or was set aside.
        found = [meta for name, meta in found if meta.get("key") == name and meta.get("made_at") is not None]
        return sorted(found, key=lambda meta: (meta["made_at"], meta["key"]))

    def get(self, stage, config, inputs, version=1, run=None):
        """The verified entry, or None where there is none, none of that run if one is named, or a damaged one
        (which is left as it is)."""
        try:
            entry = _read(self.folder(stage, self.key(stage, config, inputs, version)))
        except _Damaged as damage:
            _log.info("%s", damage)
            return None
        return entry if entry is not None and _made_by(entry.meta, run) else None

    def get_or_make(self, stage, config, inputs, make, *, version=1, overwrite=False, run=None):
        """Reads the entry of this stage, configuration and inputs, or makes it by ``make(writer)``.

        Args:
            stage: the folder's name; ``version`` is raised when the stage's code changes its results.
            config, inputs: JSON values; inputs are the keys or fingerprints of what the stage reads.
            make: writes the entry's files through the `EntryWriter` it is given.
            overwrite: make it again in any case.
            run: make it again if it doesn't carry this name, and give it the name, so that the jobs of one
                run that share a stage make it again only once between them, whatever their clocks say.

        A damaged entry is set aside as ``<key>.damaged-<n>`` with a warning and made again.

        Raises:
            StoreError: the disk is full, or the store is read-only and the entry has to be made. What was
                finished before is kept.
        """
        if not overwrite and (entry := self.get(stage, config, inputs, version, run)) is not None:
            return entry
        key = self.key(stage, config, inputs, version)
        folder = self.folder(stage, key)
        with _lock(self.root, stage, key):
            entry = _whole(folder)
            if entry is not None and not overwrite and _made_by(entry.meta, run):
                return entry
            meta = {"stage": stage, "version": version, "key": key, "config": config, "inputs": inputs}
            return self._make(folder, meta | {"run": run}, make, entry)

    def _make(self, folder, meta, make, before):
        # This machine's only process at work on this entry: what it finds there, a killed one left.
        temporary = folder.with_name(f".tmp-{folder.name}-{platform.node()}")
        replaced = temporary.with_name(f"{temporary.name}-old")
        _delete(temporary, replaced)
        began, clock = time.time(), time.perf_counter()
        try:
            temporary.mkdir()
            writer = EntryWriter(temporary)
            make(writer)
            facts = {
                "seconds": round(time.perf_counter() - clock, 3),
                "date": datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="seconds"),
                "made_at": began,
                "host": platform.node(),
                "versions": _versions(),
                "notes": writer.notes,
            }
            writer.json(META, meta | facts)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            writer.json(MANIFEST, {p.relative_to(temporary).as_posix(): _facts(p) for p in files})
            if before is not None:
                with suppress(FileNotFoundError):  # without locks, another machine is replacing it, too
                    _rename(folder, replaced)
            try:
                _rename(temporary, folder)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                _log.info("another machine was first with %s; its entry is kept", folder)
        except OSError as error:
            if error.errno in _FULL:
                _refuse(self.root, error)
            raise
        finally:
            _delete(temporary, replaced)
        entry = _whole(folder)
        if entry is None:
            raise StoreError(f"{folder} was finished and is gone or damaged: does another program change it?")
        return entry


def _whole(folder):
    """The entry; None where there is none, or a damaged one, which is set aside."""
    try:
        return _read(folder)
    except _Damaged as damage:
        reason = str(damage)
    asides = (folder.with_name(f"{folder.name}.damaged-{number}") for number in count(1))
    aside = next(path for path in asides if not path.exists())
    with suppress(FileNotFoundError):  # another process was first
        _rename(folder, aside)
        warnings.warn(
            f"{folder.parent.name}/{folder.name} in the run store is damaged ({reason}); "
            f"it was set aside as {aside.name} and is made again.",
            stacklevel=4,
        )
    return None


def _read(folder):
    """The entry, checked against its manifest; None where there is none. Raises _Damaged."""
    with suppress(OSError):
        os.listdir(folder.parent)  # a network file system then looks anew for what was missing
    if not folder.is_dir():
        return None
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, facts in files.items():
            found = (folder / name).stat().st_size
            if found != facts["bytes"]:
                raise _Damaged(f"{name} has {found} bytes instead of {facts['bytes']}")
            if _facts(folder / name) != facts:
                raise _Damaged(f"{name} was altered")
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if folder.name != RunStore.key(meta["stage"], meta["config"], meta["inputs"], meta["version"]):
            raise _Damaged(f"{META} describes another entry")
    except FileNotFoundError as error:
        raise _Damaged(f"{Path(error.filename).name} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{MANIFEST} or {META} cannot be read ({error})") from error
    return Entry(folder, meta, files)


def _lock(root, stage, key):
    """The entry's lock, taken: the operating system's, so a killed holder's is free again at once."""
    path = root / stage / ".locks" / f"{key}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if reason := _locks_missing(path):
            warnings.warn(
                f"The run store {root} is on a file system without locks ({reason}). Machines that "
                "want the same entry at the same time all make it, and the first one's is kept.",
                stacklevel=4,
            )
            path = Path(tempfile.gettempdir(), f"drs-{os.getuid()}-{key}.lock")
        try:
            return FileLock(path).acquire(timeout=1)
        except Timeout:
            _log.info("another process is making %s/%s; waiting for it", stage, key)
            return FileLock(path).acquire()
    except OSError as error:
        _refuse(root, error)


def _locks_missing(path):
    """Why no process can lock this file; None if they can. (`filelock` would try for ever, or make do with
    files that lock for ever when their process is killed.)"""
    if fcntl is not None:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return error.strerror if error.errno in _NO_LOCKS else None
    return None


def _refuse(root, error):
    """Raises the error that says why the store can't be written; another error as it is."""
    if error.errno in _FULL:
        free = shutil.disk_usage(root).free / 1e6
        raise StoreError(
            f"The disk of the run store {root} is full: {free:.1f} MB are free. Everything that was finished "
            "is kept. Free some room, or move the store to a larger disk and set DRS_STORE to it, and run "
            "the same command again: it goes on from here."
        ) from error
    if error.errno in _READ_ONLY:
        what = f"cannot be written ({error.strerror})"
    elif isinstance(error, (FileExistsError, NotADirectoryError)):
        what = "is not a folder"
    else:
        raise error
    raise StoreError(f"The run store {root} {what}. Set DRS_STORE to a folder of your own.") from error


def _delete(*folders):
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(source, target):
    for pause in (0.05,) * 20 + (0,):
        try:
            return os.rename(source, target)
        except PermissionError:  # Windows moves no folder in which a file is just being read
            if not pause:
                raise
            time.sleep(pause)


def run_name(overwrite):
    """The name of a run that overwrites: the one given, a new one for True, None for False."""
    return secrets.token_hex(4) if overwrite in (True, "") else overwrite or None


def _made_by(meta, run):
    return run is None or meta.get("run") == run


def _meta(path):
    """What a ``meta.json`` says, {} where it is missing or damaged; `RunStore.get` tells."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _facts(path):
    """Size and SHA-256 of a file, as the manifest has them."""
    return {"bytes": path.stat().st_size, "sha256": pooch.file_hash(str(path))}


def _versions():
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return versions | {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
