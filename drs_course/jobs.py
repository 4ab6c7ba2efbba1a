"""Rows of tables as jobs: one after the other, side by side on a machine's cores and GPUs through joblib, or,
under ``joblib.parallel_config(backend="dask")``, one per worker of a cluster whose machines share the store.
"""

import multiprocessing
import os
import platform
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend
from tqdm.auto import tqdm

from drs_course.paper import Configuration
from drs_course.stages import STAGE_COST, TRAININGS, Pipeline
from drs_course.store import StoreError
from drs_lib.runtime import pick_device


@dataclass(frozen=True)
class Job:
    """One row for one seed, with everything that any of the tables measures of it."""

    configuration: Configuration
    seed: int
    measures: tuple[str, ...]

    def __str__(self):
        return f"{self.configuration} (seed {self.seed})"


def in_order(jobs, pipelines):
    """Jobs in the order in which to start them, so that workers seldom wait for each other.

    The first job of those that share a training makes it for the others: such jobs come first, long ones
    before short ones; then those that share nothing; last the sharers, who then find what they need.
    """
    trainings, cost = {}, {}
    for job in jobs:
        stages = pipelines[job.seed].stages(job.configuration, job.measures)
        trainings[job] = {(s.name, s.key) for s in stages if s.name in TRAININGS}
        cost[job] = sum(STAGE_COST.get(s.name, 1) for s in stages)
    claimed, makers, sharers = set(), [], []
    for job in sorted(jobs, key=lambda job: -cost[job]):
        (sharers if trainings[job] & claimed else makers).append(job)
        claimed |= trainings[job]
    wanted = set().union(*(trainings[job] for job in sharers))
    return (
        [j for j in makers if trainings[j] & wanted]
        + [j for j in makers if not trainings[j] & wanted]
        + sharers
    )


def run_jobs(jobs, pipelines, common, requested, progress, results):
    """Runs the jobs, puts scores into ``results`` and returns the failures, {job: (error, traceback)}."""
    if not jobs:
        return {}
    client = _dask_client() if requested != 1 else None
    if client is not None:
        processes, concurrent, devices = 1, max(1, len(client.nthreads())), [None]
    else:
        processes, concurrent, devices = _processes(requested, len(jobs), common["budget"])
    failures = {}
    with _progress(jobs, pipelines, common["run"], progress, concurrent) as report:
        if client is not None:
            outcomes = _on_cluster(client, jobs, common)
        elif concurrent == 1:
            common = common | {"crf_jobs": processes, "report": report}
            outcomes = ((job, _run_job(job, common)) for job in jobs)
        else:
            common = common | {"crf_jobs": max(1, processes // concurrent)}
            outcomes = zip(jobs, _parallel(jobs, common, concurrent, devices), strict=True)
        for job, (found, error, trace) in outcomes:
            if error is None:
                results[job] = found
            else:
                failures[job] = (error, trace)
    return {str(job): failures[job] for job in jobs if job in failures}


def _run_job(job, common, device=None):
    """(scores, None, None), or (None, error, traceback): an error must not cost the other rows theirs."""
    pipeline = Pipeline(seed=job.seed, device=device, **common)
    try:
        return pipeline.scores(job.configuration, job.measures), None, None
    except StoreError:
        raise  # on a full disk every other row would train in vain
    except Exception as error:
        if pipeline.orphaned:
            os._exit(1)  # nobody is left to hand a result to, and the worker would idle on for minutes
        return None, f"{type(error).__name__}: {error}", traceback.format_exc()


def _processes(requested, jobs, budget):
    """(processes in all, jobs at a time, devices to spread the jobs over)."""
    backend, configured = get_active_backend()
    if requested is None and configured is not None:
        requested = joblib.effective_n_jobs(configured)
    elif requested is None and not isinstance(backend, joblib.parallel.LokyBackend):
        requested = joblib.effective_n_jobs(-1)
    cores = joblib.cpu_count(only_physical_cores=True)
    if requested == 1 or jobs == 1:
        return requested or cores, 1, [None]
    if getattr(backend, "uses_threads", False):
        raise ValueError(
            "the joblib backend 'threading' can't run rows side by side: threads share one random generator, "
            "and the numbers would depend on their timing. Use 'loky' (the default), 'dask' with one thread "
            "per worker, or jobs=1."
        )
    devices = [None]
    device = pick_device()
    if device.type == "cuda" and device.index is None:
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    at_once = requested
    if requested is None:
        at_once = cores
        if device.type != "cpu":
            # A paper-sized training fills a GPU, a Critters one leaves most of it idle.
            at_once = min(cores, len(devices) * (1 if budget.name in ("paper", "release") else 4))
    return requested or cores, min(at_once, jobs), devices


def _parallel(jobs, common, concurrent, devices):
    try:
        with tempfile.TemporaryDirectory(prefix="drs-rows-") as folder:
            slots = [(Path(folder, f"{k}.lock"), devices[k % len(devices)]) for k in range(concurrent)]
            calls = (joblib.delayed(_run_in_slot)(job, common, slots) for job in jobs)
            # One by one and not in batches: rows differ in length, and their order was chosen.
            return joblib.Parallel(n_jobs=concurrent, batch_size=1, pre_dispatch="n_jobs")(calls)
    except TerminatedWorkerError as error:
        raise RuntimeError(
            f"a worker process was killed, most likely because {concurrent} rows at once need more memory "
            "than there is. Finished stages are kept: run the same command again with fewer jobs (--jobs 1)."
        ) from error


def _run_in_slot(job, common, slots):
    """`_run_job` on a device with room: each slot, (lock file, device), is one row's at a time."""
    for path, device in slots:
        try:
            with FileLock(path, timeout=0):
                return _run_job(job, common, device)
        except Timeout:
            continue  # another row's
    raise AssertionError(f"more than {len(slots)} rows at a time")


def _dask_client():
    """The Dask client of a surrounding ``joblib.parallel_config(backend="dask")``, or None."""
    backend, _ = get_active_backend()
    return backend.client if type(backend).__name__ == "DaskDistributedBackend" else None


def _on_cluster(client, jobs, common):
    """Yields (job, what `_run_job` returns) as the rows are finished.

    Not by `joblib.Parallel`, for which the first row that the cluster can't run is the end of all. No more
    rows are handed out than there are workers: Dask holds a worker's death against all that waits at it.
    """
    from distributed import CancelledError, KilledWorker

    mark, run = common["store"].mark(), uuid.uuid4().hex
    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            workers = client.nthreads()
            for address, threads in workers.items():
                _expect_a_process(address, threads)
            beside = max(Counter(address.rpartition(":")[0] for address in workers).values(), default=1)
            while waiting and len(running) < max(1, len(workers)):
                job, key = waiting.popleft(), f"drs-row-{run}-{len(waiting)}"
                running[client.submit(_run_on_worker, job, common, mark, beside, key=key)] = job
            time.sleep(0.2)
            for future in [future for future in running if future.done()]:
                job = running.pop(future)
                try:
                    yield job, future.result()
                except KilledWorker as error:
                    yield job, (None, _DEADLY.format(error.allowed_failures + 1), str(error))
    except CancelledError as error:
        raise RuntimeError(
            "the Dask cluster was closed or lost its scheduler before all rows were finished. Finished "
            "stages are kept: start a cluster and run the same command again."
        ) from error
    finally:
        if client.status == "running":
            client.cancel(list(running))


_DEADLY = (
    "KilledWorker: {} workers died while they ran this row, of its need of memory or at the end of their time"
)


def _run_on_worker(job, common, mark, beside):
    """`_run_job` in a Dask worker, on the device that the worker finds. Its machine's errors name it.

    mark: see `RunStore.mark`. beside: how many workers share a machine.
    """
    from distributed import get_worker

    worker, host, store, budget = get_worker(), platform.node(), common["store"], common["budget"]
    _expect_a_process(worker.address, worker.state.nthreads)
    if not (store.root / mark).exists():
        raise StoreError(
            f"the Dask worker on {host} has another folder, or none, where the run store {store.root} should "
            "be. Keep the store on a file system that all machines share, and set DRS_STORE to it."
        )
    crf_jobs = 1
    if not multiprocessing.current_process().daemon:
        # A worker that is bound to cores of its own, as SLURM does it, has all that it sees.
        bound = joblib.cpu_count() < os.cpu_count()
        crf_jobs = max(1, joblib.cpu_count(only_physical_cores=True) // (1 if bound else beside))
    elif any(r.workers for r in (budget.classify, budget.refine, budget.segment(job.configuration.network))):
        raise ValueError(
            f"the Dask worker on {host} may not start processes, and this budget's images are read by some. "
            "Set DASK_DISTRIBUTED__WORKER__DAEMON=False in the environment in which the workers are started."
        )
    try:
        return _run_job(job, common | {"crf_jobs": crf_jobs})
    except (StoreError, FileNotFoundError) as error:
        raise type(error)(f"on the Dask worker on {host}: {error}") from error


def _expect_a_process(address, threads):
    """Raises ValueError for a Dask worker that runs rows in threads."""
    if threads > 1 or address.startswith("inproc:"):
        what = f"{threads} threads" if threads > 1 else "threads of this process"
        raise ValueError(
            f"the Dask worker {address} runs rows in {what}: they share one random generator, and the "
            "numbers would depend on their timing. Start workers that are processes with one thread each: "
            "LocalCluster(threads_per_worker=1, processes=True), SLURMCluster(cores=1, processes=1), or "
            "'dask worker --nthreads 1'."
        )


@contextmanager
def _progress(jobs, pipelines, run, shown, concurrent):
    """A bar over the work of all jobs, and a function that says what is being done.

    A thread looks into the store for what is finished: that works alike for one process, for many, and on a
    cluster.
    """
    if not shown:
        yield None
        return
    store = next(iter(pipelines.values())).store
    waiting = {}
    for job in jobs:
        for stage in pipelines[job.seed].stages(job.configuration, job.measures):
            waiting[stage.name, stage.key] = stage
    total = sum(STAGE_COST.get(name, 1) for name, _ in waiting)
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=total, desc=f"{len(jobs)} rows", bar_format=layout, dynamic_ncols=True)
    doing, over = [], threading.Event()

    def look():
        finished = None
        for name, key in list(waiting):
            if store.has(name, key, run):
                finished = waiting.pop((name, key))
                bar.update(STAGE_COST.get(name, 1))
        if doing:
            bar.set_description_str(f"{len(jobs)} rows | {doing[-1]}")
        elif finished is not None:
            bar.set_description_str(f"{len(jobs)} rows, {concurrent} at a time | done: {finished.title}")

    def watch():
        while not over.wait(1):
            look()

    look()
    bar.initial = bar.n  # what a former run did says nothing about this one's speed
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda text: doing.__setitem__(slice(None), [text])
    finally:
        over.set()
        watcher.join()
        look()
        bar.close()
