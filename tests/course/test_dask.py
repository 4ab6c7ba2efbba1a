"""Tables on a Dask cluster: a killed worker costs nothing, a deadly row only itself."""

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import joblib
import pandas as pd
import pytest

from drs_course import jobs as jobs_module
from drs_course import stages
from drs_course import store as store_module
from drs_course.paper import Configuration
from drs_course.stages import Pipeline
from drs_course.store import RunStore, StoreError
from drs_course.tables import RowsFailed, run_table
from drs_lib.recipes import get_budget

distributed = pytest.importorskip("distributed")


BUDGET = get_budget("ci").replace(train_images=16, val_images=4, image_size=32)


class Noting(distributed.WorkerPlugin):
    """Workers, also those that are started anew, write down which stages they finished. A refinement network
    ends the worker that trains it as soon as there is a file ``deadly``."""

    def __init__(self, folder):
        self.log, self.deadly = folder / "log", folder / "deadly"
        self.log.touch()

    def setup(self, worker):
        make, refine = RunStore._make, stages.train_refinement

        def noting(store, folder, meta, *rest):
            entry = make(store, folder, meta, *rest)
            with open(self.log, "a") as file:  # one short line at a time, so no other's gets into it
                file.write(f"{meta['stage']} {meta['key']} {os.getpid()}\n")
            return entry

        def deadly(*arguments, **options):
            if self.deadly.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return refine(*arguments, **options)

        RunStore._make, stages.train_refinement = noting, deadly


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return Noting(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def client(tmp_path_factory, notes):
    options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0")
    with (
        distributed.LocalCluster(**options, local_directory=str(tmp_path_factory.mktemp("dask"))) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.register_plugin(notes)
        yield client


def on_cluster(store, budget=BUDGET, overwrite=False):
    with joblib.parallel_config(backend="dask"):
        return run_table(3, budget=budget, store=store, overwrite=overwrite, progress=False)


def noted(notes):
    """(stage, key, process) of what was finished."""
    return [tuple(line.split()) for line in notes.log.read_text().splitlines()]


def stored(store):
    folders = (path.parent for path in store.root.glob("*/*/meta.json"))
    return sorted((one.parent.name, one.name) for one in folders if not one.name.startswith(".tmp-"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Table 3 by one process: (store, table)."""
    store = RunStore(tmp_path_factory.mktemp("alone"))
    return store, run_table(3, budget=BUDGET, store=store, jobs=1, progress=False)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_worker_is_killed_in_mid_table(client, notes, alone, tmp_path):
    killed = []

    def kill():
        while len({pid for *_, pid in noted(notes)}) < 2:  # each of the two is in its first row
            time.sleep(0.01)
        killed.append(noted(notes)[0][-1])
        os.kill(int(killed[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    store = RunStore(tmp_path)
    table = on_cluster(store)
    pd.testing.assert_frame_equal(table, alone[1])
    assert killed and not killer.is_alive()
    by = [pid for *_, pid in noted(notes)]
    assert 0 < by.count(killed[0]) < len(by) / 2 and len(set(by)) >= 2
    made = sorted((stage, key) for stage, key, _ in noted(notes))
    assert made == stored(store) == stored(alone[0]), "every stage made to its end once"
    for stage, key in made:
        for name in ("model.safetensors", "scores.json", "labels.zip"):
            theirs, ours = (s.folder(stage, key) / name for s in (alone[0], store))
            assert not theirs.exists() or theirs.read_bytes() == ours.read_bytes(), (stage, name)
    assert not list(tmp_path.glob("*/.tmp-*")) and not list(tmp_path.glob("checkpoints/*"))

    # A single row goes to the cluster as well: this machine may be one that only hands out work.
    line = Pipeline(budget=BUDGET, store=store)
    shutil.rmtree(store.folder("evaluate", line.stage("evaluate", Configuration()).key))
    pd.testing.assert_frame_equal(on_cluster(store), table)
    stage, _, pid = noted(notes)[-1]
    assert stage == "evaluate" and int(pid) in client.run(os.getpid).values()


def test_a_run_of_this_machine_beside_that_of_the_cluster(client, notes, alone, tmp_path, monkeypatch):
    here, make, before = [], RunStore._make, len(noted(notes))

    def noting(store, folder, meta, *rest):
        here.append((meta["stage"], meta["key"]))
        return make(store, folder, meta, *rest)

    monkeypatch.setattr(RunStore, "_make", noting)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(on_cluster, tmp_path)
        ours = run_table(3, budget=BUDGET, store=tmp_path, jobs=1, progress=False)
    pd.testing.assert_frame_equal(ours, alone[1])
    pd.testing.assert_frame_equal(theirs.result(), alone[1])
    there = [(stage, key) for stage, key, _ in noted(notes)[before:]]
    assert sorted(here + there) == stored(alone[0]), "no stage was made by both"


class LateClock(distributed.WorkerPlugin):
    """A worker whose clock is three hours behind that of the one who gives the command."""

    name = "late-clock"

    def setup(self, worker):
        late = dict(vars(time), time=lambda: time.time() - 3 * 3600)
        store_module.time = SimpleNamespace(**late)

    def teardown(self, worker):
        store_module.time = time


def test_rows_that_overwrite_share_their_trainings_whatever_the_workers_clocks_say(
    client, notes, alone, tmp_path
):
    shutil.copytree(alone[0].root, tmp_path / "runs")
    store, before = RunStore(tmp_path / "runs"), len(noted(notes))
    client.register_plugin(LateClock())
    try:
        table = on_cluster(store, overwrite=True)
    finally:
        client.unregister_worker_plugin("late-clock")
    pd.testing.assert_frame_equal(table, alone[1])
    assert sorted((stage, key) for stage, key, _ in noted(notes)[before:]) == stored(alone[0])
    latest = max(store.made_at(stage, key) for stage, key in stored(store))
    assert latest < time.time() - 2 * 3600, "it was the workers' clocks"


def test_a_failing_row_costs_no_other_row(client, alone, tmp_path):
    with pytest.raises(RowsFailed, match="2 of 4 rows failed.*\n.*refined.*TrainingDiverged") as caught:
        on_cluster(tmp_path, BUDGET.replace(refine=BUDGET.refine.replace(lr=1e30)))
    partial = caught.value.tables[3]
    assert partial["measured"].isna().tolist() == [False, True, False, True]
    pd.testing.assert_frame_equal(partial[::2], alone[1][::2])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_row_that_kills_its_workers_fails_alone(client, notes, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    notes.deadly.touch()
    with pytest.raises(RowsFailed, match="2 of 4 rows failed.*\n.*KilledWorker: 1 workers died") as caught:
        on_cluster(tmp_path)
    notes.deadly.unlink()
    pd.testing.assert_frame_equal(caught.value.tables[3][::2], alone[1][::2])


def test_a_worker_that_sees_another_store_is_named(client, tmp_path, monkeypatch):
    monkeypatch.setattr(RunStore, "mark", lambda self: ".store-of-another-machine")
    with pytest.raises(StoreError, match=r"worker on \S+ has another folder.*all machines share"):
        on_cluster(tmp_path)
    assert not list(tmp_path.glob("classify/*"))


def test_a_worker_without_the_data_is_named(client, voc_tree, tmp_path):
    store = RunStore(tmp_path)
    job = jobs_module.Job(Configuration(), 0, ("miou",))
    common = dict(data="voc", budget=get_budget("ci", "voc"), store=store, voc_root=str(tmp_path / "nowhere"))
    row = client.submit(jobs_module._run_on_worker, job, common, store.mark(), 1)
    with pytest.raises(FileNotFoundError, match=r"on the Dask worker on \S+: .*nowhere"):
        row.result()


def test_reading_processes_need_a_worker_that_may_start_them(client, tmp_path):
    with pytest.raises(ValueError, match="DASK_DISTRIBUTED__WORKER__DAEMON=False"):
        on_cluster(tmp_path, BUDGET.replace(classify=BUDGET.classify.replace(workers=1)))


@pytest.mark.parametrize("threads, match", [(2, "runs rows in 2 threads"), (1, "in threads of this process")])
def test_threads_are_refused(threads, match, tmp_path):
    options = dict(n_workers=1, threads_per_worker=threads, processes=False, dashboard_address=":0")
    with (
        distributed.LocalCluster(**options, local_directory=str(tmp_path / "dask")) as cluster,
        distributed.Client(cluster),
        pytest.raises(ValueError, match=match),
    ):
        on_cluster(tmp_path / "runs")
