"""Tables 1 to 4, run: every row a job, every job a chain of stored stages, beside the paper's numbers.

``run_table(1)`` gives a DataFrame; ``run_tables()`` runs what all four tables need, each thing once. Rows are
independent jobs for joblib: the same call runs in one process, on all cores and GPUs of a machine, or, under
``joblib.parallel_config(backend="dask")``, on the workers of a cluster that all see the store. The numbers
don't depend on it.
"""

import copy
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drs_course.paper import AFTER_CRF, NETWORKS, SOURCE, TITLES, Configuration, Row, table_rows
from drs_course.stages import STAGE_COST, TRAININGS, Pipeline, Splits
from drs_course.store import RunStore, StoreError, run_name
from drs_lib import crf
from drs_lib.arguments import whole
from drs_lib.files import write_text
from drs_lib.recipes import Budget, get_budget

if TYPE_CHECKING:
    import pandas as pd

TABLES = (1, 2, 3, 4)
REFERENCE = Path(__file__).with_name("reference")
# What each table measures, besides the mean IoU of the segmentation network.
_MEASURES = {1: ("accuracy", "labels"), 2: ("labels",), 3: ("labels",), 4: ("labels", "crf")}
# The number a measure's stage stores, and the table's column for it.
_VALUES = {
    "miou": ("miou", "measured"),
    "crf": ("miou", "with CRF"),
    "accuracy": ("accuracy", "accuracy"),
    "labels": ("miou", "pseudo-label mIoU"),
}


class RowsFailed(RuntimeError):
    """Some rows failed; all others were finished and stored. ``tables`` holds what there is, ``failures`` by
    row the error and its traceback."""

    def __init__(self, message: str, tables: dict, failures: dict[str, tuple[str, str]]):
        super().__init__(message)
        self.tables, self.failures = tables, failures


@dataclass(frozen=True)
class _Job:
    """One row for one seed, with everything that any of the tables measures of it."""

    configuration: Configuration
    seed: int
    measures: tuple[str, ...]

    def __str__(self):
        return f"{self.configuration} (seed {self.seed})"


def run_table(
    number: int,
    data: str | Splits = "critters",
    budget: str | Budget | None = None,
    seeds: Sequence[int] = (0,),
    voc_root: str | os.PathLike | None = None,
    store: RunStore | str | os.PathLike | None = None,
    jobs: int | None = None,
    overwrite: bool | str = False,
    progress: bool = True,
) -> "pd.DataFrame":
    """One of the paper's tables, measured; see `run_tables`."""
    options = dict(voc_root=voc_root, store=store, jobs=jobs, overwrite=overwrite, progress=progress)
    return run_tables((number,), data, budget, seeds, **options)[number]


def run_tables(
    numbers: Iterable[int] = TABLES,
    data: str | Splits = "critters",
    budget: str | Budget | None = None,
    seeds: Sequence[int] = (0,),
    voc_root: str | os.PathLike | None = None,
    store: RunStore | str | os.PathLike | None = None,
    jobs: int | None = None,
    overwrite: bool | str = False,
    progress: bool = True,
) -> "dict[int, pd.DataFrame]":
    """Tables by number, every row trained and scored once for all of them. What the store has is only read.

    Args:
        data: "critters", "voc" (with ``voc_root``) or a `Splits` of your own.
        budget: a name, see `get_budget`, or a `Budget`; None: "laptop" on Critters, "paper" on VOC.
        seeds: each row is trained once with each.
        store: see `RunStore`.
        jobs: processes; None: what a surrounding ``joblib.parallel_config`` says, else one per physical core,
            and no more than a few per GPU. With 1, everything happens in this process. On a Dask cluster the
            rows are one per worker, whatever larger number is given.
        overwrite: train and score again. With a name instead of True, a run of that name that was stopped
            goes on: what it has made is read, and its trainings go on where they were.
        progress: show a progress bar over all rows.

    Returns:
        A DataFrame for each number, a row for each of the paper's, in percent throughout. Columns:
        ``configuration``, ``paper``, ``measured`` (mean over seeds), ``sd`` (NaN for one seed), ``seeds``
        (how many), ``pseudo-label mIoU`` and, with an sd each where they are measured,
        1: ``delta``, ``accuracy``, ``paper accuracy``; 2: ``layer1`` to ``layer6``; 3: ``suppression
        controller``, ``refine``; 4: ``network``, ``S``, ``with CRF``, ``paper test``.
        ``attrs`` holds the conditions, the values of each seed and the IoU per class, row by row.

    Raises:
        RowsFailed: after all other rows are finished.
        StoreError: the store cannot be written, or a Dask worker doesn't see it; the other rows would train
            in vain, and are not begun.
        ValueError, FileNotFoundError: an argument, a worker of the wrong kind, or the data.
    """
    numbers, seeds = _checked(numbers, seeds, jobs)
    store = store if isinstance(store, RunStore) else RunStore(store)
    if not isinstance(budget, Budget):
        budget = get_budget(budget, data if isinstance(data, str) else "critters")
    common = dict(
        data=data,
        budget=budget,
        voc_root=None if voc_root is None else str(Path(voc_root).expanduser().absolute()),
        store=store,
        run=run_name(overwrite),
    )
    pipelines = {seed: Pipeline(seed=seed, **common) for seed in seeds}
    measures = _measures(numbers)
    work = _jobs_of(measures, seeds)
    results = {}
    for job in work:
        found = pipelines[job.seed].stored_scores(job.configuration, job.measures)
        if found is not None:
            results[job] = found
    missing = _in_order([job for job in work if job not in results], pipelines)
    if missing:
        store.tidy()
    failures = _run(missing, pipelines, common, jobs, progress, results)
    scores = {(job.configuration, job.seed): found for job, found in results.items()}
    conditions = _conditions(pipelines[seeds[0]], seeds)
    tables = {number: _table(number, measures[number], scores, seeds, conditions) for number in numbers}
    if failures:
        raise RowsFailed(_failure_message(failures, len(work), common["run"]), tables, failures)
    return tables


def run_row(
    number: int, configuration: Configuration, pipeline: Pipeline, overwrite: bool | str = False
) -> "pd.DataFrame":
    """One row of a table, trained and scored in this process: a DataFrame as of `run_tables` with that row.

    Raises ValueError for a configuration that the table doesn't have.
    """
    if configuration not in [row.configuration for row in table_rows(number) if row.configuration]:
        raise ValueError(f"Table {number} has no row for {configuration}.")
    jobs = _jobs_of(_measures((number,)), [pipeline.seed])
    [job] = [job for job in jobs if job.configuration == configuration]
    making = copy.copy(pipeline)
    if overwrite:
        making.run = run_name(overwrite)
    making.scores(configuration, job.measures)
    table = stored_table(number, pipeline)
    row = table[[row.configuration == configuration for row in table_rows(number)]]
    row.attrs = {key: table.attrs[key] for key in ("table", "title", "data", "budget", "seeds")}
    return row


def stored_table(number: int, pipeline: Pipeline) -> "pd.DataFrame":
    """A table with what the pipeline's store has of it, for the pipeline's seed; rows that are not measured
    yet are empty. Makes nothing; columns as for `run_tables`."""
    measures, seeds = _measures((number,)), [pipeline.seed]
    scores = {}
    for job in _jobs_of(measures, seeds):
        found = pipeline.stored_scores(job.configuration, job.measures)
        if found is not None:
            scores[job.configuration, job.seed] = found
    return _table(number, measures[number], scores, seeds, _conditions(pipeline, seeds))


def _measures(numbers):
    measures = {number: ("miou", *_MEASURES[number]) for number in numbers}
    if not crf.available():
        measures = {number: tuple(m for m in names if m != "crf") for number, names in measures.items()}
    return measures


def _checked(numbers, seeds, jobs):
    numbers = tuple(dict.fromkeys(numbers))
    for number in numbers:
        table_rows(number)
    seeds = tuple(dict.fromkeys(whole("seeds", seed, least=0, most=2**32 - 1) for seed in seeds))
    if not seeds:
        raise ValueError("no seeds; expected at least one whole number.")
    if jobs is not None:
        whole("jobs", jobs)
    return numbers, seeds


def _jobs_of(measures, seeds):
    wanted = {}
    for number, names in measures.items():
        for row in table_rows(number):
            if row.configuration is not None:
                # The upper bound has masks where the others have pseudo labels, so these have no score.
                names_here = [m for m in names if not (m == "labels" and row.configuration.supervised)]
                wanted.setdefault(row.configuration, {}).update(dict.fromkeys(names_here))
    return [_Job(c, seed, tuple(names)) for seed in seeds for c, names in wanted.items()]


def _in_order(jobs, pipelines):
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


def _run(jobs, pipelines, common, requested, progress, results):
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
    import joblib
    from joblib.parallel import get_active_backend

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
    from drs_lib.runtime import pick_device

    devices = [None]
    device = pick_device()
    if device.type == "cuda" and device.index is None:
        import torch

        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    at_once = requested
    if requested is None:
        at_once = cores
        if device.type != "cpu":
            # A paper-sized training fills a GPU, a Critters one leaves most of it idle.
            at_once = min(cores, len(devices) * (1 if budget.name in ("paper", "release") else 4))
    return requested or cores, min(at_once, jobs), devices


def _parallel(jobs, common, concurrent, devices):
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

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
    from filelock import FileLock, Timeout

    for path, device in slots:
        try:
            with FileLock(path, timeout=0):
                return _run_job(job, common, device)
        except Timeout:
            continue  # another row's
    raise AssertionError(f"more than {len(slots)} rows at a time")


def _dask_client():
    """The Dask client of a surrounding ``joblib.parallel_config(backend="dask")``, or None."""
    from joblib.parallel import get_active_backend

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
    import joblib
    from distributed import get_worker

    worker, host, store = get_worker(), platform.node(), common["store"]
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
    elif _readers(job, common["budget"]):
        raise ValueError(
            f"the Dask worker on {host} may not start processes, and this budget's images are read by some. "
            "Set DASK_DISTRIBUTED__WORKER__DAEMON=False in the environment in which the workers are started."
        )
    try:
        return _run_job(job, common | {"crf_jobs": crf_jobs})
    except (StoreError, FileNotFoundError) as error:
        raise type(error)(f"on the Dask worker on {host}: {error}") from error


def _readers(job, budget):
    """How many processes a job's trainings want for reading images."""
    recipes = budget.classify, budget.refine, budget.segment(job.configuration.network)
    return max(recipe.workers for recipe in recipes)


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
    from tqdm.auto import tqdm

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


def _failure_message(failures, total, run):
    again, same = f" (with overwrite {run!r})" if run else "", {}
    for job, (error, _) in failures.items():
        same.setdefault(error, []).append(job)
    lines = []
    for error, jobs in same.items():
        more = f" and {len(jobs) - 3} more" if len(jobs) > 3 else ""
        lines.append(f"{'; '.join(jobs[:3])}{more}: {error}")
    return (
        f"{len(failures)} of {total} rows failed. What was finished is stored, and the same command{again} "
        "goes on from there.\n" + "\n".join(lines)
    )


def _table(number, measures, scores, seeds, conditions):
    import pandas as pd

    rows = table_rows(number)
    records, per_seed, iou = [], [], []
    for row in rows:
        found = [scores.get((row.configuration, seed)) for seed in seeds]
        values = {m: [f[m][_VALUES[m][0]] for f in found if f and m in f] for m in measures}
        records.append(_record(number, row, values))
        per_seed.append({_VALUES[m][1]: [_percent(v) for v in vs] for m, vs in values.items() if vs})
        iou.append(_mean_iou([f["miou"]["iou"] for f in found if f]))
    table = pd.DataFrame(records)
    table.attrs = {"table": number, "title": TITLES[number], **conditions, "per_seed": per_seed, "iou": iou}
    if number == 4:
        hint = f"not available: {crf.INSTALL_HINT}"
        table.attrs["CRF"] = "column 'with CRF'; without it in 'measured'" if "crf" in measures else hint
    return table


def _record(number, row: Row, values):
    own = dict(row.columns)
    miou = values["miou"]
    mean, sd = _mean_sd(miou)
    record = {"network": own["network"]} if number == 4 else {}
    record["configuration"] = row.label
    if number == 1:
        record["delta"] = _float(own["delta"])
    elif number == 2:
        record |= own
    elif number == 3:
        record |= own
    else:
        record["S"] = own["S"]
    record |= {"paper": _float(row.paper), "measured": mean, "sd": sd, "seeds": len(miou)}
    if number == 4:
        record["with CRF"], record["with CRF sd"] = _mean_sd(values.get("crf", []))
    if number == 1:
        record["paper accuracy"] = _float(own["paper accuracy"])
        record["accuracy"], record["accuracy sd"] = _mean_sd(values["accuracy"])
    record["pseudo-label mIoU"], record["pseudo-label mIoU sd"] = _mean_sd(values["labels"])
    if number == 4:
        record["paper test"] = _float(own["paper test"])
    return record


def _float(value):
    return math.nan if value is None else float(value)


def _percent(value):
    return 100.0 * value


def _mean_sd(values):
    if not values:
        return math.nan, math.nan
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return _percent(statistics.fmean(values)), _percent(sd)


def _mean_iou(seeds):
    classes = seeds[0] if seeds else {}
    return {
        name: _percent(statistics.fmean(known))
        if (known := [s[name] for s in seeds if s[name] is not None])
        else None
        for name in classes
    }


def _conditions(pipeline, seeds):
    budget, data = pipeline.budget, pipeline.data
    refine = budget.refine
    return {
        "data": data.name,
        "budget": budget.name,
        "seeds": list(seeds),
        "split": f"val, {len(data.val)} images; trained on {len(data.train)}",
        "unit": "percent; measured = mean IoU without CRF, mean over the seeds",
        **_precision(budget),
        "paper": f"{SOURCE}, VOC 2012 val (test where the column says so)",
        "accuracy": f"exact match of all labels, {len(data.accuracy_images)} images"
        + (" (VOC train, part of the training images)" if data.accuracy is not None else " (val)"),
        "pseudo labels": f"scored on the {len(data.train)} training images, ignored pixels as background",
        "networks": "; ".join(
            f"{title}: {recipe.kind} on {recipe.backbone}, initial weights {recipe.weights or 'random'}"
            for network, title in NETWORKS.items()
            for recipe in [budget.segment(network)]
        ),
        "scales": list(budget.scales) if budget.scales else None,
        "resize": budget.resize,
        "alpha": budget.alpha,
        "beta": budget.beta,
        "rule": budget.rule,
        "conflict": budget.conflict,
        "refined alpha": budget.refined_alpha,
        "renormalize": budget.renormalize,
        "refinement": (f"{refine.epochs} epochs" if refine.epochs else f"{refine.iterations} iterations")
        + f" on {budget.target}",
        "CRF": "off",
    }


def save_table(table: "pd.DataFrame", path: str | os.PathLike) -> None:
    """Writes ``path`` as JSON (rows and conditions) and, beside it, as CSV, each complete or not at all."""
    path = Path(path).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: _plain(v) for k, v in record.items()} for record in table.to_dict("records")]
    document = {"conditions": table.attrs, "columns": list(table.columns), "rows": rows}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.3f", lineterminator="\n"))


def load_table(path: str | os.PathLike) -> "pd.DataFrame":
    """The DataFrame that `save_table` wrote, conditions in ``attrs``."""
    import pandas as pd

    document = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    table = pd.DataFrame(document["rows"], columns=document["columns"])
    numbers = [c for c in table.columns if c not in _TEXT and not c.startswith("layer")]
    table = table.astype({c: "int64" if c == "seeds" else "float64" for c in numbers})
    table.attrs = document["conditions"]
    return table


_TEXT = {"configuration", "network", "S", "suppression controller", "refine"}


def _plain(value):
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def reference_path(number: int, data: str = "critters") -> Path:
    """Where the reference results of a table are kept."""
    table_rows(number)
    return REFERENCE / f"table{number}-{data}.json"


def reference_table(number: int, data: str = "critters") -> "pd.DataFrame":
    """The committed reference results of a table: what this course's authors measured, with the conditions in
    ``attrs``.

    Raises FileNotFoundError where there are none, naming the command that makes them.
    """
    path = reference_path(number, data)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no reference results of Table {number} on {data!r} ({path}). "
            f"'python -m drs_course reference --data {data} --tables {number}' measures and writes them."
        )
    return load_table(path)


def compare_with_reference(table: "pd.DataFrame", tolerance: float = 5.0) -> str:
    """Holds the measured column of a table against the committed reference results.

    tolerance: in points of mIoU, against the reference's mean over its seeds. Returns a sentence that says
    how many rows were compared and how far the farthest is, or, for a run at another budget than the laptop's
    on Critters, that there is nothing to compare. Raises AssertionError naming the rows farther away.
    """
    budget, data = table.attrs["budget"], table.attrs["data"]
    if budget != "laptop" or data != "critters":
        return (
            f"Nothing is compared: this is budget {budget!r} on {data!r}, "
            "and the reference is 'laptop' on 'critters'."
        )
    reference = reference_table(table.attrs["table"])
    distance = (table["measured"] - reference["measured"]).abs()
    names = table["configuration"] + (" / " + table["network"] if "network" in table else "")
    compared, far = int(distance.notna().sum()), distance > tolerance
    if far.any():
        listed = "; ".join(
            f"{name}: {table['measured'][i]:.1f}, reference {reference['measured'][i]:.1f}"
            for i, name in names[far].items()
        )
        raise AssertionError(
            f"{int(far.sum())} rows are more than {tolerance} points from the reference: {listed}."
        )
    if not compared:
        return "No row is measured yet."
    return (
        f"{compared} rows, all within {tolerance} points of the reference; "
        f"the farthest is {distance.max():.1f} away."
    )


def _precision(budget):
    """Only where it isn't what everything on a processor is computed in."""
    recipes = (budget.classify, budget.refine, *map(budget.segment, NETWORKS))
    found = dict.fromkeys(recipe.precision for recipe in recipes)
    return {} if list(found) == ["float32"] else {"precision": ", ".join(found)}


def _notes(table):
    """The conditions in a few lines, for below a table."""
    groups = (
        ("data", "budget", "precision", "split", "seeds", "unit"),
        ("scales", "resize", "alpha", "beta", "rule", "CRF"),
        ("refinement", "refined alpha", "renormalize") if table.attrs.get("table") in (3, 4) else (),
        ("accuracy",) if table.attrs.get("table") == 1 else (),
        ("pseudo labels",),
        ("networks",) if table.attrs.get("table") == 4 else (),
        ("paper",),
    )
    known = [[f"{key}: {table.attrs[key]}" for key in keys if key in table.attrs] for keys in groups]
    after_crf = [AFTER_CRF] if table.attrs.get("table") == 4 else []
    return [*("; ".join(notes) for notes in known if notes), *after_crf]


def _shown(table):
    """The table without the columns that hold nothing, or nothing new."""
    empty = [c for c in table.columns if table[c].isna().all() and c not in ("paper", "measured")]
    return table.drop(columns=[*empty, *({"delta", "suppression controller", "refine"} & set(table.columns))])


def _title(table):
    return f"Table {table.attrs.get('table', '?')}: {table.attrs.get('title', '')}"


def format_table(table: "pd.DataFrame") -> str:
    """The table as plain text for a terminal: numbers with one decimal, its conditions below."""
    shown = _shown(table)
    networks = shown.pop("network") if "network" in shown else None
    columns = list(zip(*([name, *map(_cell, shown[name])] for name in shown.columns), strict=True))
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    right = [shown[name].dtype.kind in "fi" for name in shown.columns]

    def line(cells):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    lines = [line(columns[0])]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    lines.append(rule)
    for index, cells in enumerate(columns[1:]):
        if networks is not None and (index == 0 or networks[index] != networks[index - 1]):
            lines.append(networks[index])
        lines.append(line(cells))
    return "\n".join([_title(table), *lines, rule, *_notes(table)])


def _cell(value):
    if isinstance(value, (bool, np.bool_)):
        return "x" if value else "-"
    if isinstance(value, (float, np.floating)):
        return "" if math.isnan(value) else f"{value:.1f}"
    return str(value)


def style_table(table: "pd.DataFrame") -> Any:
    """The table for a notebook (a pandas Styler): check marks, one decimal, the conditions as its caption."""
    shown = _shown(table)
    marks = [c for c in shown.columns if shown[c].dtype == bool]
    numbers = [c for c in shown.columns if shown[c].dtype.kind == "f"]
    return (
        shown.style.hide(axis="index")
        .format("{:.1f}", subset=numbers, na_rep="")
        .format(lambda mark: "✓" if mark else "–", subset=marks)
        .set_caption(". ".join([_title(table), *_notes(table)]))
        .set_properties(subset=["measured"], **{"font-weight": "bold"})
        .set_table_styles(
            [{"selector": "caption", "props": "caption-side: bottom; text-align: left; font-size: 90%"}]
        )
    )
