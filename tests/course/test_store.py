"""The run store: atomic, locked, noticing damage."""

import errno
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from drs_course import store as store_module
from drs_course.store import MANIFEST, META, RunStore, StoreError

CONFIG, INPUTS = {"epochs": 3, "lr": 1e-3, "layers": [1, 2]}, {"data": "abc"}


def fill(writer):
    writer.json("metrics.json", {"miou": 0.5})
    writer.weights("model.safetensors", torch.nn.Linear(2, 3))
    writer.note(device="cpu")


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def make_in(store, config=CONFIG, make=fill, **options):
    return store.get_or_make("classify", config, INPUTS, make, **options)


def get_from(store, **options):
    return store.get("classify", CONFIG, INPUTS, **options)


def failing(code):
    """A function of the operating system that fails."""

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def entries(store, stage="classify"):
    return sorted(p.name for p in (store.root / stage).iterdir() if p.name != ".locks")


def test_root_from_argument_environment_or_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRS_STORE", raising=False)
    assert RunStore().root == tmp_path / "runs"
    monkeypatch.setenv("DRS_STORE", str(tmp_path / "elsewhere"))
    assert RunStore().root == tmp_path / "elsewhere"
    assert RunStore(tmp_path / "given").root == tmp_path / "given"


def test_key_is_a_documented_function_of_stage_version_config_and_inputs():
    document = '{"config":{"a":1.5,"b":[1,2]},"inputs":{"data":"x"},"stage":"segment","version":4}'
    expected = hashlib.sha256(document.encode()).hexdigest()[:24]
    assert RunStore.key("segment", {"b": (1, 2), "a": 1.5}, {"data": "x"}, version=4) == expected
    for stage, last, data, version in (
        ("classify", 2, "x", 4),
        ("segment", 3, "x", 4),
        ("segment", 2, "y", 4),
        ("segment", 2, "x", 5),
    ):
        other = RunStore.key(stage, {"b": (1, last), "a": 1.5}, {"data": data}, version=version)
        assert other != expected


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, Path("x")])
def test_config_that_is_not_json_is_refused(store, value):
    with pytest.raises(ValueError, match="JSON"):
        store.get_or_make("classify", {"value": value}, {}, fill)


def test_made_once_then_read(store):
    calls = []
    assert get_from(store) is None and not store.root.exists()
    first = make_in(store, make=lambda writer: (calls.append(1), fill(writer)))
    again = make_in(RunStore(store.root), make=lambda writer: calls.append(2))
    assert calls == [1] and again.path == first.path == store.folder("classify", first.key)
    assert get_from(store).path == first.path
    assert again.json("metrics.json") == {"miou": 0.5}
    assert {k: tuple(v.shape) for k, v in again.weights().items()} == {"weight": (3, 2), "bias": (3,)}
    meta = json.loads((again.path / META).read_text())
    assert meta["config"] == CONFIG and meta["inputs"] == INPUTS and meta["notes"] == {"device": "cpu"}
    assert meta["host"] == platform.node() and meta["seconds"] >= 0
    assert meta["versions"]["torch"] and meta["date"].endswith("+00:00")
    for name, facts in json.loads((again.path / MANIFEST).read_text()).items():
        data = (again.path / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(StoreError, match="has no 'other'.*metrics.json"):
        again.file("other")


def test_overwrite_and_runs(store, monkeypatch):
    values = iter(range(10))

    def make(writer):
        writer.json("metrics.json", next(values))

    def value(**options):
        return store.get_or_make("classify", CONFIG, INPUTS, make, **options).json("metrics.json")

    assert [value(), value(), value(overwrite=True), value()] == [0, 0, 1, 1]
    now, key = time.time(), store.key("classify", CONFIG, INPUTS)
    assert [value(run="a"), value(run="a"), value()] == [2, 2, 2]
    assert [store.has("classify", key, run) for run in (None, "a", "b")] == [True, True, False]
    assert get_from(store, run="b") is None
    assert get_from(store, run="a").meta["run"] == "a"
    assert entries(store) == [key] and store.made_at("classify", key) >= now
    assert store.made_at("classify", "none") is None and not store.has("classify", "none")
    # Another machine's clock, hours behind, changes nothing.
    monkeypatch.setattr(store_module.time, "time", lambda: now - 10_000)
    assert [value(run="b"), value(run="b"), value(run="a"), value(overwrite=True, run="a")] == [3, 3, 4, 5]
    assert store.made_at("classify", key) == now - 10_000 and store.has("classify", key, "a")


def test_an_entry_that_names_no_run_was_made_by_none(store):
    """As they were written before there were names."""
    entry = make_in(store)
    (entry.path / META).write_text(json.dumps({k: v for k, v in entry.meta.items() if k != "run"}))
    files = entry.files | {META: store_module._facts(entry.path / META)}
    (entry.path / MANIFEST).write_text(json.dumps(files))
    assert get_from(store) is not None and store.has("classify", entry.key)
    assert get_from(store, run="a") is None and not store.has("classify", entry.key, "a")


def test_metas_tell_what_is_there_oldest_first(store):
    assert store.metas("classify") == []
    entries = [make_in(store, {"n": n}) for n in (3, 1, 2)]
    store.get_or_make("segment", {"n": 4}, INPUTS, fill)
    found = store.metas("classify")
    assert found == [entry.meta for entry in entries]
    assert [meta["config"]["n"] for meta in found] == [3, 1, 2] and found[0]["inputs"] == INPUTS
    make_in(store, {"n": 3}, overwrite=True)
    assert [meta["config"]["n"] for meta in store.metas("classify")] == [1, 2, 3]


@pytest.mark.parametrize("text", [b"", b"[1]", b"null", b"{}", b'{"key": "x", "made_at": null}', b"\xff"])
def test_metas_pass_over_what_is_damaged(store, text):
    good, bad = (make_in(store, {"n": n}) for n in (1, 2))
    (bad.path / META).write_bytes(text)
    assert store.metas("classify") == [good.meta]


def test_metas_leave_out_what_was_set_aside_and_what_is_being_written(store):
    entry = make_in(store)
    truncate(entry.path / "model.safetensors")

    def make(writer):
        fill(writer)
        writer.json(META, {"key": entry.key, "made_at": 1.0})
        assert store.metas("classify") == []

    with pytest.warns(UserWarning, match="damaged"):
        again = make_in(store, make=make)
    assert len(entries(store)) == 2 and store.metas("classify") == [again.meta]


def test_failing_make_leaves_nothing(store):
    def fail(writer):
        writer.json("metrics.json", 1)
        raise ZeroDivisionError("diverged")

    with pytest.raises(ZeroDivisionError, match="diverged"):
        make_in(store, make=fail)
    assert entries(store) == []
    assert make_in(store).json("metrics.json") == {"miou": 0.5}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename_entry_fields(path):
    path.write_text(path.read_text().replace('"epochs": 3', '"epochs": 4'))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model.safetensors", truncate),
        ("model.safetensors", flip_a_byte),
        ("model.safetensors", Path.unlink),
        ("metrics.json", flip_a_byte),
        (META, truncate),
        (META, rename_entry_fields),
        (META, Path.unlink),
        (MANIFEST, lambda path: path.write_text("[1]")),
        (MANIFEST, lambda path: path.write_text('{"model.safetensors": 3}')),
        (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe\x00")),
        (MANIFEST, Path.unlink),
    ],
)
def test_damage_is_noticed_set_aside_and_repaired(store, name, damage):
    entry = make_in(store)
    for count in (1, 2):
        damage(entry.path / name)
        assert get_from(store) is None
        if name == META and damage is not rename_entry_fields:
            assert store.made_at("classify", entry.key) is None
        with pytest.warns(UserWarning, match=rf"classify/{entry.key}.*damaged") as caught:
            repaired = make_in(store)
        assert len(caught) == 1 and repaired.json("metrics.json") == {"miou": 0.5}
        assert entries(store) == [entry.key] + [f"{entry.key}.damaged-{n}" for n in range(1, count + 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_in(store)


def test_an_entry_copied_under_another_name_is_not_believed(store):
    entry = make_in(store)
    other = store.folder("classify", store.key("classify", {}, INPUTS))
    os.rename(entry.path, other)
    with pytest.warns(UserWarning, match="describes another entry"):
        make_in(store, {})


def test_full_disk_is_one_clear_error_and_leaves_no_half_entry(store):
    kept = make_in(store, {"other": 1})

    def make(writer):
        writer.json("metrics.json", {})
        failing(errno.ENOSPC)()

    with pytest.raises(StoreError, match="disk.*full.*MB are free.*kept.*DRS_STORE"):
        make_in(store, make=make)
    assert entries(store) == [kept.key]
    assert make_in(store, {"other": 1}).meta == kept.meta
    assert make_in(store).json("metrics.json") == {"miou": 0.5}


def test_read_only_store_is_read_but_not_written(store, monkeypatch):
    make_in(store)
    monkeypatch.setattr(Path, "mkdir", failing(errno.EROFS))
    monkeypatch.setattr(os, "rename", failing(errno.EROFS))
    assert make_in(store).json("metrics.json") == {"miou": 0.5}
    with pytest.raises(StoreError, match="cannot be written.*Set DRS_STORE"):
        make_in(store, {"new": 1})


@pytest.mark.parametrize("act", [make_in, RunStore.mark])
def test_store_below_a_file(tmp_path, act):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="not a folder"):
        act(RunStore(tmp_path / "file"))


PROGRAM = textwrap.dedent(
    """
    import os, sys, time
    from drs_course.store import RunStore
    root, log, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    def make(writer):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, b"begin\\n")
        writer.json("a.json", "a" * 100_000)
        time.sleep(pause)
        writer.json("b.json", "b" * 100_000)
        os.write(handle, b"end\\n")
    entry = RunStore(root).get_or_make("classify", {"n": 1}, {}, make)
    print(len(entry.json("a.json") + entry.json("b.json")), flush=True)
    """
)


def start(store, log, pause):
    """One process that makes an entry, and in the middle of it pauses for so many seconds."""
    arguments = ["-W", "error", "-c", PROGRAM, str(store.root), str(log), str(pause)]
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=root)


def test_several_processes_make_an_entry_once(store, tmp_path):
    log = tmp_path / "log"
    processes = [start(store, log, 0.5) for _ in range(3)]
    assert [p.communicate(timeout=300)[0] for p in processes] == ["200000\n"] * 3
    assert log.read_text() == "begin\nend\n"
    assert entries(store) == [store.key("classify", {"n": 1}, {})], "one entry, whole, and nothing beside it"


@pytest.mark.skipif(store_module.fcntl is None, reason="Windows locks in another way")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(store, monkeypatch, code):
    waited = []
    # The real one is left to `filelock`, which would try for ever.
    monkeypatch.setattr(store_module, "fcntl", SimpleNamespace(flock=failing(code), LOCK_EX=2, LOCK_NB=4))
    monkeypatch.setattr(store_module, "FileLock", lambda path: waited.append(path) or FileLock(path))
    with pytest.warns(UserWarning, match=rf"without locks \({os.strerror(code)}\).*first one's is kept"):
        make_in(store)
    assert get_from(store) is not None
    assert not waited[0].is_relative_to(store.root), "processes of this machine still wait for each other"


def test_the_entry_of_another_machine_that_was_first_is_kept(store, tmp_path):
    """As happens where locks hold on one machine only."""
    first = make_in(RunStore(tmp_path / "other"), make=lambda writer: writer.json("who", "first"))

    def make(writer):
        writer.json("who", "second")
        shutil.copytree(first.path, store.folder("classify", first.key))

    assert make_in(store, make=make).json("who") == "first"
    assert entries(store) == [first.key]


def test_an_entry_is_replaced_under_its_readers(store):
    """Who reads finds an entry at any moment, and never takes one for damaged."""
    made, looks, over = [make_in(store)], [0, 0], threading.Event()

    def read(reader):
        while not over.is_set():
            found = make_in(store, make=lambda writer: pytest.fail("it is there"))
            assert found.json("metrics.json") == {"miou": 0.5}
            looks[reader] += 1

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read, reader) for reader in range(2)]
        end = time.monotonic() + 120
        while min(len(made), *looks) < 20 and time.monotonic() < end and not any(r.done() for r in readers):
            made.append(make_in(store, overwrite=True))
        over.set()
        for reader in readers:
            reader.result()
    assert min(looks) >= 20
    assert len({entry.meta["made_at"] for entry in made}) == len(made) >= 20


@pytest.mark.parametrize("change", [shutil.rmtree, lambda folder: (folder / "metrics.json").unlink()])
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_finished_entry_that_another_program_takes_away(store, monkeypatch, change):
    rename = os.rename

    def renamed(source, target):
        rename(source, target)
        if Path(source).name.startswith(".tmp-"):
            change(Path(target))

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(StoreError, match="was finished and is gone or damaged: does another program"):
        make_in(store)


def test_a_folder_that_is_being_read_moves_a_little_later(store, monkeypatch):
    """So it is on Windows."""
    rename, refused = os.rename, []

    def busy(source, target):
        if len(refused) < 3:
            refused.append(source)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    assert make_in(store).json("metrics.json") == {"miou": 0.5}
    assert len(refused) == 3


def test_what_a_killed_process_left_is_cleared_away(store):
    key, folder, now = store.key("classify", CONFIG, INPUTS), store.root / "classify", time.time()
    checkpoints = store.root / "checkpoints"
    checkpoints.mkdir(parents=True)
    left = {
        folder / f".tmp-{key}-{platform.node()}": 0,
        folder / f".tmp-{key}-another-machine": 0,
        folder / f".tmp-{key}-a-third": 31,
        folder / ".tmp-0123-another-machine": 29,
        checkpoints / "classify-0123.pt": 29,
        checkpoints / "segment-4567.pt": 31,
        checkpoints / ".segment-4567.pt.another-machine": 31,
    }
    for path, days in left.items():
        if path.parent == folder:
            path.mkdir(parents=True)
            path = path / "half"
        path.touch()
        for each in (path, path.parent):
            os.utime(each, (now - days * 24 * 3600,) * 2)
    assert make_in(store).json("metrics.json") == {"miou": 0.5}
    [own, *others] = left
    assert not own.exists() and all(path.exists() for path in others)
    store.tidy()
    assert [path for path in others if not path.exists()] == [p for p in others if left[p] > 30]


def test_a_store_has_a_mark_of_its_own(store, tmp_path):
    mark = store.mark()
    assert (store.root / mark).is_file() and RunStore(store.root).mark() == mark
    assert RunStore(tmp_path / "other").mark() != mark


def test_tidying_where_nothing_is_or_nothing_may_be_deleted(store, monkeypatch):
    store.tidy()
    assert not store.root.exists()
    (store.root / "checkpoints").mkdir(parents=True)
    old = store.root / "checkpoints" / "classify-0123.pt"
    old.touch()
    os.utime(old, (0, 0))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing(errno.EROFS))
        store.tidy()
    store.tidy()
    assert not old.exists()


def test_killed_at_random_moments_the_store_stays_sound(store, tmp_path):
    log, key = tmp_path / "log", store.key("classify", {"n": 1}, {})
    log.touch()
    for killed in range(2):
        process, deadline = start(store, log, 30), time.monotonic() + 150
        while log.read_text().count("begin") == killed and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.communicate(timeout=30)
        assert store.made_at("classify", key) is None, "it was killed while at work"
    assert start(store, log, 0).communicate(timeout=300)[0] == "200000\n"
    assert entries(store) == [key], "what the killed ones left is cleared away"
