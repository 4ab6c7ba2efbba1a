"""The run store: what a stage of the pipeline made, kept under the hash of what it was made from.

An entry is a folder ``<root>/<stage>/<key>/`` with the stage's files, ``meta.json`` (configuration, inputs,
versions, seconds, date) and ``manifest.json`` (size and SHA-256 of every file). It is written beside its
final place, flushed to the disk and renamed, so that an entry is there completely or not at all, whenever the
process is killed. One process makes an entry while others that want it wait and then read it; that is the
file system's locks' doing, which on a network file system may hold between the processes of one machine only,
or be missing. Then work may be done twice, and nothing worse: the entry that is published first is kept.
``joblib.Memory`` was considered: it neither locks an entry that several processes want at once nor notices a
damaged one.
"""

import errno
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime, timezone
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import psutil
from filelock import FileLock, Timeout

from drs_lib.files import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

META, MANIFEST = "meta.json", "manifest.json"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_THERE = {errno.EEXIST, errno.ENOTEMPTY}
# Seconds after which what another machine left unfinished counts as given up: no stage takes a week.
_GIVEN_UP = 7 * 24 * 3600
# How often to look for an entry that is being replaced or kept from moving, and the seconds in between.
_LOOKS, _PAUSE = 20, 0.05
_log = logging.getLogger(__name__)


class _Damaged(Exception):
    """An entry's files do not agree with its manifest."""


class EntryWriter:
    """What a stage's ``make(writer)`` writes through: files of an entry that is not published yet."""

    def __init__(self, path: Path, store: "RunStore"):
        self.path, self.notes, self._store = path, {}, store

    def note(self, **facts: Any) -> None:
        """Adds facts (device, threads, ...) to the entry's ``meta.json``; they do not enter its key."""
        self.notes.update(facts)

    def bytes(self, name: str, data: bytes) -> None:
        try:
            with open(self.path / name, "wb") as file:
                file.write(data)
        except OSError as error:
            if error.errno in _FULL:
                raise self._store._full(f"{name} needs {_size(len(data))}") from error
            raise

    def json(self, name: str, value: Any) -> None:
        self.bytes(name, json.dumps(value, indent=1, allow_nan=False).encode())

    def weights(self, name: str, model: Any) -> None:
        """The model's parameters and buffers as safetensors."""
        from safetensors.torch import save

        # As bytes first: the file is then written by `bytes`, which knows what a full disk is.
        self.bytes(name, save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}))

    def array(self, name: str, array: Any) -> None:
        """One array as compressed npz."""
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, array=array)
        self.bytes(name, buffer.getvalue())

    def open(self, name: str) -> BinaryIO:
        """A file to stream into; the caller closes it."""
        return open(self.path / name, "wb")


class Entry:
    """A complete, verified entry of a :class:`RunStore`."""

    def __init__(self, path: Path, meta: dict, files: Mapping[str, dict]):
        self.path, self.meta, self.files = path, meta, files

    @property
    def key(self) -> str:
        return self.meta["key"]

    def file(self, name: str) -> Path:
        if name not in self.files:
            raise StoreError(f"{self.path} has no {name!r}; it has {', '.join(sorted(self.files))}.")
        return self.path / name

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def weights(self, name: str = "model.safetensors") -> dict:
        """The state dict, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.file(name), device="cpu")

    def array(self, name: str) -> Any:
        import numpy as np

        with np.load(self.file(name)) as stored:
            return stored["array"]

    def __repr__(self) -> str:
        return f"Entry({self.path})"


def course_store() -> Path | None:
    """Where the notebooks of a checked-out course keep their runs, wherever they are started: ``runs`` in its
    folder. None, which is `RunStore`'s default, with ``DRS_STORE`` set or without such a folder."""
    course = Path(__file__).resolve().parents[1]
    if os.environ.get("DRS_STORE") or not (course / "notebooks").is_dir():
        return None
    return course / "runs"


class RunStore:
    """Entries below ``root``: the argument, else the environment's ``DRS_STORE``, else ``./runs``."""

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root or os.environ.get("DRS_STORE") or "runs").expanduser().absolute()

    def __repr__(self) -> str:
        return f"RunStore({str(self.root)!r})"

    @staticmethod
    def key(stage: str, config: Mapping, inputs: Mapping[str, str], version: int = 1) -> str:
        """The hash of (stage, stage version, configuration, input keys): 24 hexadecimal digits."""
        parts = {"stage": stage, "version": version, "config": config, "inputs": inputs}
        return _digest(_canonical(parts))[:24]

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def mark(self) -> str:
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
            self._refuse(error, "it has to be marked for the other machines")

    def tidy(self, days: float = 30) -> None:
        """Deletes what killed processes left behind: unfinished entries, checkpoints older than the entry of
        their stage, and checkpoints that were not touched for ``days``.

        Nothing goes that a process may still be writing or go on from. What can't be deleted is left.
        """
        for left in self.root.glob("*/.tmp-*"):
            if abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        for path in (self.root / "checkpoints").glob("*"):
            with suppress(OSError):
                if abandoned(path) if path.name.startswith(".") else self._spent(path, days):
                    path.unlink()

    def _spent(self, checkpoint: Path, days: float) -> bool:
        """Whether no training will go on from a checkpoint: ``<stage>-<key>.*``."""
        touched = checkpoint.stat().st_mtime
        stage, _, key = checkpoint.stem.rpartition("-")
        entry = self.folder(stage, key) / META
        # One that is newer than the entry is of a training that is being made again.
        return touched < time.time() - days * 24 * 3600 or (
            entry.exists() and touched <= entry.stat().st_mtime
        )

    def made_at(self, stage: str, key: str) -> float | None:
        """When the making of this entry began (seconds since 1970), unverified; None if it is not there."""
        return self._meta(stage, key).get("made_at")

    def has(self, stage: str, key: str, run: str | None = None) -> bool:
        """Whether this entry is there, unverified; with a run's name, whether that run made it."""
        meta = self._meta(stage, key)
        return meta.get("made_at") is not None and _made_by(meta, run)

    def _meta(self, stage, key):
        try:
            return dict(json.loads((self.folder(stage, key) / META).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def metas(self, stage: str) -> list[dict]:
        """What ``meta.json`` says of every entry of a stage (configuration, inputs, date, ...), oldest first;
        the entries themselves are not verified."""
        found = []
        for path in self.root.glob(f"{stage}/*/{META}"):
            try:
                meta = json.loads(path.read_text(encoding="utf-8"))
                # Another folder's name: being written, or set aside.
                if meta["key"] == path.parent.name and meta["made_at"] is not None:
                    found.append(meta)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: `get` tells
        return sorted(found, key=lambda meta: (meta["made_at"], meta["key"]))

    def get(
        self,
        stage: str,
        config: Mapping,
        inputs: Mapping[str, str],
        version: int = 1,
        run: str | None = None,
    ) -> Entry | None:
        """The verified entry, or None where there is none, none of that run if one is named, or a damaged one
        (which is left as it is)."""
        try:
            entry = self._read(self.folder(stage, self.key(stage, config, inputs, version)))
        except _Damaged as damage:
            _log.info("%s", damage)
            return None
        return entry if entry is not None and _made_by(entry.meta, run) else None

    def get_or_make(
        self,
        stage: str,
        config: Mapping,
        inputs: Mapping[str, str],
        make: Callable[[EntryWriter], None],
        *,
        version: int = 1,
        overwrite: bool = False,
        run: str | None = None,
    ) -> Entry:
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
        key = self.key(stage, config, inputs, version)
        folder = self.folder(stage, key)
        if not overwrite:
            try:
                entry = self._read(folder)
            except _Damaged:
                entry = None  # looked at again, and set aside, under the lock
            if entry is not None and _made_by(entry.meta, run):
                return entry
        with self._lock(stage, key):
            entry = self._whole(folder)
            if entry is not None and not overwrite and _made_by(entry.meta, run):
                return entry
            meta = {"stage": stage, "version": version, "key": key, "config": config, "inputs": inputs}
            return self._make(folder, meta | {"run": run}, make, entry)

    def _make(
        self, folder: Path, meta: dict, make: Callable[[EntryWriter], None], replaced: Entry | None
    ) -> Entry:
        for left in folder.parent.glob(f".tmp-{folder.name}-*"):
            if abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        temporary = folder.parent / f".tmp-{folder.name}-{writer_tag()}"
        began = time.time()
        clock = time.perf_counter()
        try:
            temporary.mkdir()
            writer = EntryWriter(temporary, self)
            make(writer)
            meta = meta | {
                "seconds": round(time.perf_counter() - clock, 3),
                "date": datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="seconds"),
                "made_at": began,
                "host": platform.node(),
                "versions": _versions(),
                "notes": writer.notes,
            }
            writer.json(META, meta)
            files = {p.relative_to(temporary).as_posix(): _facts(p) for p in _files_of(temporary)}
            writer.json(MANIFEST, files)
            _flush(temporary)
            self._publish(temporary, folder, meta["run"], replaced)
        except OSError as error:
            if error.errno in _FULL:
                written = sum(p.stat().st_size for p in _files_of(temporary))
                raise self._full(f"{meta['stage']} had written {_size(written)} of its files") from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        entry = self._whole(folder)
        if entry is None:
            raise StoreError(
                f"{folder} was finished and is gone: does another program delete or move what is in the run "
                "store? Run the same command again."
            )
        return entry

    def _publish(self, temporary: Path, folder: Path, run: str | None, replaced: Entry | None) -> None:
        """Moves a finished entry to its place, and the one it replaces away. One that another process put
        there meanwhile, which happens without locks, is kept."""
        moved = []
        for attempt in count(1):
            try:
                _rename(temporary, folder)
                break
            except OSError as error:
                if error.errno not in _THERE or attempt == 100 * _LOOKS:
                    raise
            found = self._whole(folder)
            if found is None:
                time.sleep(_PAUSE)  # a network file system shows it later
                continue
            if _made_by(found.meta, run) and (replaced is None or found.meta != replaced.meta):
                _log.info("another process was first with %s; its entry is kept", folder)
                break
            moved.append(temporary.with_name(f"{temporary.name}-old{len(moved)}"))
            with suppress(FileNotFoundError):  # another process is replacing it, too
                _rename(folder, moved[-1])
        for old in moved:
            shutil.rmtree(old, ignore_errors=True)
        _flush_folder(folder.parent)

    def _whole(self, folder: Path) -> Entry | None:
        """The entry; None where there is none, or a damaged one, which is set aside."""
        try:
            return self._read(folder)
        except _Damaged as damage:
            self._set_aside(folder, str(damage))
            return None

    def _read(self, folder: Path) -> Entry | None:
        """The entry, checked against its manifest; None where there is none. Raises _Damaged."""
        for _ in range(_LOOKS):
            before = _identity(folder)
            if before is None and not _between(folder):
                before = _identity(folder)
                if before is None:
                    return None
            if before is not None:
                try:
                    entry = self._verified(folder)
                except _Damaged:
                    if _identity(folder) == before:
                        raise
                else:
                    if _identity(folder) == before:
                        return entry
            time.sleep(_PAUSE)  # another process is replacing it
        return None

    def _verified(self, folder: Path) -> Entry:
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for name, facts in files.items():
                if (folder / name).stat().st_size != facts["bytes"]:
                    raise _Damaged(
                        f"{name} has {(folder / name).stat().st_size} bytes instead of {facts['bytes']}"
                    )
                if _facts(folder / name) != facts:
                    raise _Damaged(f"{name} was altered")
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if folder.name != self.key(meta["stage"], meta["config"], meta["inputs"], meta["version"]):
                raise _Damaged(f"{META} describes another entry")
        except FileNotFoundError as error:
            raise _Damaged(f"{Path(error.filename).name} is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damaged(f"{MANIFEST} or {META} cannot be read ({error})") from error
        return Entry(folder, meta, files)

    def _set_aside(self, folder: Path, reason: str) -> None:
        for taken in count(1):
            aside = folder.with_name(f"{folder.name}.damaged-{taken}")
            if aside.exists():
                continue
            try:
                _rename(folder, aside)
                break
            except FileNotFoundError:  # another process was first
                return
            except OSError as error:
                if error.errno not in _THERE:
                    raise
        warnings.warn(
            f"{folder.parent.name}/{folder.name} in the run store is damaged ({reason}); "
            f"it was set aside as {aside.name} and is made again.",
            stacklevel=5,
        )

    def _lock(self, stage: str, key: str) -> AbstractContextManager:
        """The entry's lock, taken: the operating system's, so a killed holder's is free again at once. Where
        there are no locks, a warning and a context that does nothing."""
        locks = self.root / stage / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock = FileLock(locks / f"{key}.lock")
            if reason := _locks_missing(locks / f"{key}.lock"):
                warnings.warn(
                    f"The run store {self.root} is on a file system without locks ({reason}). Processes that "
                    "want the same entry at the same time all make it, and the first one's is kept.",
                    stacklevel=4,
                )
                return nullcontext()
            try:
                return lock.acquire(timeout=1)
            except Timeout:
                _log.info("another process is making %s/%s; waiting for it", stage, key)
                return lock.acquire()
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(f"{stage} has not begun") from error
            self._refuse(error, f"{stage}/{key} is not in it")

    def _refuse(self, error: OSError, wanted: str) -> NoReturn:
        if error.errno in _READ_ONLY:
            raise StoreError(
                f"The run store {self.root} cannot be written ({error.strerror}), and {wanted}. "
                "Set DRS_STORE to a folder of your own."
            ) from error
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise StoreError(
                f"The run store {self.root} is not a folder. Set DRS_STORE to a folder of your own."
            ) from error
        raise error

    def _full(self, needed: str) -> StoreError:
        free = shutil.disk_usage(self.root).free
        return StoreError(
            f"The disk of the run store {self.root} is full: {needed}, {_size(free)} are free. Everything "
            "that was finished is kept. Free some room, or move the store to a larger disk and set DRS_STORE "
            "to it, and run the same command again: it goes on from here."
        )


def writer_tag() -> str:
    """A part of a temporary's name: machine, process and a random number, for `abandoned`."""
    return f"{_machine()}-{os.getpid()}-{os.urandom(4).hex()}"


def abandoned(path: Path) -> bool:
    """Whether a temporary, whose name ends in a `writer_tag`, was surely left behind: its process was one of
    this machine's and is gone, or nobody touched it for a week."""
    tag = re.search(r"([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}(-old[0-9]+)?$", path.name)
    if tag and tag[1] == _machine() and not psutil.pid_exists(int(tag[2])):
        return True
    try:
        return max(p.stat().st_mtime for p in (path, *path.rglob("*"))) < time.time() - _GIVEN_UP
    except FileNotFoundError:  # it is being finished right now
        return False


@lru_cache
def _machine() -> str:
    """This machine, or container, as far as process numbers mean something: eight hexadecimal digits."""
    parts = [platform.node()]
    with suppress(OSError):  # Linux only
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return _digest("\n".join(parts).encode())[:8]


def _rename(source: Path, target: Path) -> None:
    for look in range(_LOOKS):
        try:
            return os.rename(source, target)
        except PermissionError:  # Windows moves no folder in which a file is just being read
            if look == _LOOKS - 1:
                raise
            time.sleep(_PAUSE)


def _identity(folder: Path) -> tuple | None:
    """What is different once another folder took this one's place; None if there is none."""
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_ino, found.st_mtime_ns) if stat.S_ISDIR(found.st_mode) else None


def _between(folder: Path) -> bool:
    """Whether an entry that isn't there was moved away to be replaced. The listing makes a network file
    system look for the entry anew as well, instead of remembering that it was missing."""
    with suppress(OSError):
        for name in os.listdir(folder.parent):
            if name.startswith(f".tmp-{folder.name}-") and "-old" in name:
                return not abandoned(folder.with_name(name))
    return False


def _locks_missing(path: Path) -> str | None:
    """Why no process can lock this file; None if they can. (`filelock` would try for ever, or make do with
    files that lock for ever when their process is killed.)"""
    if fcntl is not None:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return error.strerror if error.errno in _NO_LOCKS else None
    return None


def run_name(overwrite: bool | str) -> str | None:
    """The name of a run that overwrites: the one given, a new one for True, None for False."""
    return secrets.token_hex(4) if overwrite in (True, "") else overwrite or None


def _made_by(meta: Mapping, run: str | None) -> bool:
    return run is None or meta.get("run") == run


def _canonical(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"A stage's configuration and inputs must be finite JSON values: {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _facts(path: Path) -> dict:
    """Size and SHA-256 of a file, as the manifest has them."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _flush(folder: Path) -> None:
    """Everything below the folder onto the disk, so that a power cut after the rename finds whole files."""
    for path in _files_of(folder):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to flush it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "torchvision", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
