"""The run store: atomic, locked, noticing damage."""

import errno
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from drs_course import store as store_module
from drs_course.store import MANIFEST, META, RunStore, StoreError, writer_tag

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


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{}", '{"key": "x", "made_at": null}', "\udcff"])
def test_metas_pass_over_what_is_damaged(store, text):
    good, bad = (make_in(store, {"n": n}) for n in (1, 2))
    (bad.path / META).write_bytes(text.encode("utf-8", "surrogateescape"))
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
        (META, lambda path: path.write_text("[1]")),
        (META, Path.unlink),
        (MANIFEST, truncate),
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


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.mark.parametrize("where", ["bytes", "stream", pytest.param("device", marks=needs_full)])
def test_full_disk_is_one_clear_error_and_leaves_no_half_entry(store, monkeypatch, where):
    kept, full = make_in(store, {"other": 1}), failing(errno.ENOSPC)

    def make(writer):
        writer.json("metrics.json", {})
        if where == "stream":
            full()
        if where == "device":
            os.symlink("/dev/full", writer.path / "big.bin")
        else:
            patch.setattr(Path, "write_bytes", full)
        writer.bytes("big.bin", bytes(1_234_567))

    said = "disk.*full.*free.*kept.*DRS_STORE"
    with monkeypatch.context() as patch, pytest.raises(StoreError, match=said) as caught:
        make_in(store, make=make)
    assert where == "stream" or "big.bin needs 1.2 MB" in str(caught.value)
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
    root, log, pause, locks = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4] == "True"
    if not locks:
        import errno, fcntl, warnings
        def flock(file, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        fcntl.flock = flock
        warnings.simplefilter("ignore")
    def make(writer):
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, b"begin\\n")
        writer.bytes("a.bin", b"a" * 100_000)
        time.sleep(pause)
        writer.bytes("b.bin", b"b" * 100_000)
        os.write(handle, b"end\\n")
    entry = RunStore(root).get_or_make("classify", {"n": 1}, {}, make)
    print(len(entry.file("a.bin").read_bytes()) + len(entry.file("b.bin").read_bytes()), flush=True)
    """
)


def start(store, log, pause, locks=True):
    """One process that makes an entry, and in the middle of it pauses for so many seconds."""
    arguments = [str(store.root), str(log), str(pause), str(locks)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


needs_flock = pytest.mark.skipif(store_module.fcntl is None, reason="Windows locks in another way")


@pytest.mark.parametrize("locks", [True, pytest.param(False, marks=needs_flock)])
def test_several_processes_make_an_entry_once_and_without_locks_the_first_one_s_is_kept(
    store, tmp_path, locks
):
    log = tmp_path / "log"
    processes = [start(store, log, 0.5, locks) for _ in range(3)]
    assert [p.communicate(timeout=60)[0] for p in processes] == ["200000\n"] * 3
    assert 1 <= log.read_text().count("begin") == log.read_text().count("end") <= (1 if locks else 3)
    assert entries(store) == [store.key("classify", {"n": 1}, {})], "one entry, whole, and nothing beside it"


@needs_flock
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(store, monkeypatch, code):
    monkeypatch.setattr(store_module.fcntl, "flock", failing(code))
    with pytest.warns(UserWarning, match=rf"without locks \({os.strerror(code)}\).*first one's is kept"):
        make_in(store)
    assert get_from(store) is not None


@needs_flock
@pytest.mark.filterwarnings("ignore:The run store .* is on a file system without locks")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_the_entry_of_another_process_that_was_first(store, monkeypatch, overwrite, damaged):
    monkeypatch.setattr(store_module.fcntl, "flock", failing(errno.ENOLCK))
    if overwrite:
        make_in(store, make=lambda writer: writer.json("who", "before"))

    def make(writer):
        writer.json("who", "second")
        other = RunStore(store.root)
        first = make_in(other, make=lambda writer: writer.json("who", "first"), overwrite=overwrite)
        if damaged:
            truncate(first.file("who"))

    with pytest.warns(UserWarning, match="damaged") if damaged else nullcontext():
        entry = make_in(store, make=make, overwrite=overwrite)
    assert entry.json("who") == ("second" if damaged else "first")
    assert entries(store) == [entry.key] + [f"{entry.key}.damaged-1"] * damaged


def test_an_entry_is_replaced_under_its_readers(store):
    make_in(store)
    over, looks = threading.Event(), []

    def read():
        while not over.is_set():
            looks.append(get_from(store))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    made, until = [], time.monotonic() + 60
    while (len(looks) <= 100 or len(made) < 30) and time.monotonic() < until:
        made.append(make_in(store, overwrite=True))
    over.set()
    for reader in readers:
        reader.join()
    assert len(looks) > 100 and None not in looks, "there at any moment, and never taken for damaged"
    assert len({entry.meta["made_at"] for entry in made}) == len(made)


def test_an_entry_that_is_moved_away_to_be_replaced_is_waited_for(store):
    entry = make_in(store)
    away = entry.path.with_name(f".tmp-{entry.key}-{writer_tag()}-old0")
    os.rename(entry.path, away)
    back = threading.Timer(0.3, os.rename, (away, entry.path))
    back.start()
    assert get_from(store).meta == entry.meta
    back.join()
    away = entry.path.with_name(f".tmp-{entry.key}-{tag(dead_process())}-old0")
    os.rename(entry.path, away)
    began = time.monotonic()
    assert get_from(store) is None and time.monotonic() - began < 0.5
    make_in(store)
    assert not away.exists()


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


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def tag(pid, machine=None):
    here, _, number = writer_tag().split("-")
    return f"{machine or here}-{pid}-{number}"


def leftovers(folder, prefix):
    """Temporaries of several writers: (all names, those of the surely dead)."""
    found = {}
    for writer, days_old, dead in (
        (tag(os.getppid()), 0, False),
        (tag(dead_process()), 0, True),
        (tag(1, "0123abcd"), 0, False),
        (tag(1, "0123abcd"), 3, False),
        (tag(1, "0123abcd"), 8, True),
        ("of-an-older-version", 8, True),
        ("of-an-older-version", 0, False),
    ):
        path = folder / f"{prefix}{days_old}-{writer}"
        path.mkdir(parents=True)
        (path / "half").touch()
        for each in (path / "half", path):
            os.utime(each, (time.time() - days_old * 24 * 3600,) * 2)
        found[path.name] = dead
    assert len(found) == 7
    return set(found), {name for name, dead in found.items() if dead}


def test_only_what_a_dead_process_left_is_cleared_away(store):
    key = store.key("classify", CONFIG, INPUTS)
    own, dead = leftovers(store.root / "classify", f".tmp-{key}-")
    other, dead_too = leftovers(store.root / "classify", ".tmp-another-")
    make_in(store)
    assert set(entries(store)) == {key} | own - dead | other
    store.tidy()
    assert set(entries(store)) == {key} | own - dead | other - dead_too


def test_checkpoints_that_nobody_goes_on_from_are_cleared_away(store):
    folder, now = store.root / "checkpoints", time.time()
    folder.mkdir(parents=True)
    entry = make_in(store)
    finished = (entry.path / META).stat().st_mtime
    ages = {
        f"classify-{entry.key}.pt": (finished - 1, False),
        f"classify-{entry.key}.unusable": (finished - 1, False),
        "classify-0123.pt": (now - 29 * 24 * 3600, True),
        "segment-4567.pt": (now - 31 * 24 * 3600, False),
        f"segment-{entry.key}.pt": (now - 60, True),
        f".segment-4567.pt.{tag(os.getpid())}": (now, True),
        f".segment-4567.pt.{tag(dead_process())}": (now, False),
    }
    for name, (touched, _) in ages.items():
        (folder / name).touch()
        os.utime(folder / name, (touched, touched))
    store.tidy()
    assert {path.name for path in folder.iterdir()} == {name for name, (_, kept) in ages.items() if kept}
    # The training is being made again, and was checkpointed.
    (folder / f"classify-{entry.key}.pt").touch()
    os.utime(folder / f"classify-{entry.key}.pt", (finished + 5, finished + 5))
    store.tidy()
    assert (folder / f"classify-{entry.key}.pt").exists()


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
        process, deadline = start(store, log, 30), time.monotonic() + 30
        while log.read_text().count("begin") == killed and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        process.communicate(timeout=30)
        assert store.made_at("classify", key) is None, "it was killed while at work"
    assert start(store, log, 0).communicate(timeout=60)[0] == "200000\n"
    assert entries(store) == [key], "what the killed ones left is cleared away"


def test_writer_streams(store):
    def make(writer):
        with writer.open("maps.bin") as file:
            for _ in range(3):
                file.write(b"abc")

    assert make_in(store, make=make).file("maps.bin").read_bytes() == b"abc" * 3
