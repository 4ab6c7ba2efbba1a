"""Tables 1 to 4, run: every row a job, every job a chain of stored stages, beside the paper's numbers.

``run_table(1)`` gives a DataFrame; ``run_tables()`` runs what all four tables need, each thing once. Rows are
independent jobs (`drs_course.jobs`): the same call runs in one process, on all cores and GPUs of a machine,
or on a cluster. The numbers don't depend on it.
"""

import copy
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pandas as pd

from drs_course.jobs import Job, in_order, run_jobs
from drs_course.paper import AFTER_CRF, NETWORKS, SOURCE, TITLES, table_rows
from drs_course.stages import Pipeline
from drs_course.store import RunStore, run_name
from drs_lib import crf
from drs_lib.arguments import whole
from drs_lib.files import write_text
from drs_lib.recipes import Budget, get_budget

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

    def __init__(self, message, tables, failures):
        super().__init__(message)
        self.tables, self.failures = tables, failures


def run_table(number, data="critters", budget=None, seeds=(0,), **options):
    """One of the paper's tables, measured: a DataFrame. Arguments: see `run_tables`."""
    return run_tables((number,), data, budget, seeds, **options)[number]


def run_tables(
    numbers=TABLES, data="critters", budget=None, seeds=(0,), voc_root=None, store=None, jobs=None,
    overwrite=False, progress=True,
):  # fmt: skip
    """Tables by number, every row trained and scored once for all of them. What the store has is only read.

    Args:
        data: "critters", "voc" (with ``voc_root``) or a `drs_course.stages.Splits` of your own.
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
        {number: DataFrame}, a row for each of the paper's, in percent throughout. Columns:
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
    root = None if voc_root is None else str(Path(voc_root).expanduser().absolute())
    common = dict(data=data, budget=budget, voc_root=root, store=store, run=run_name(overwrite))
    pipelines = {seed: Pipeline(seed=seed, **common) for seed in seeds}
    measures = _measures(numbers)
    work = _jobs_of(measures, seeds)
    results = _stored(work, pipelines)
    missing = in_order([job for job in work if job not in results], pipelines)
    if missing:
        store.tidy()
    failures = run_jobs(missing, pipelines, common, jobs, progress, results)
    conditions = _conditions(pipelines[seeds[0]], seeds)
    tables = {number: _table(number, measures[number], results, seeds, conditions) for number in numbers}
    if failures:
        raise RowsFailed(_failure_message(failures, len(work), common["run"]), tables, failures)
    return tables


def _stored(jobs, pipelines):
    """{job: its scores} of those that the store has."""
    found = {job: pipelines[job.seed].stored_scores(job.configuration, job.measures) for job in jobs}
    return {job: scores for job, scores in found.items() if scores is not None}


def run_row(number, configuration, pipeline, overwrite=False):
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


def stored_table(number, pipeline):
    """A table with what the pipeline's store has of it, for the pipeline's seed; rows that are not measured
    yet are empty. Makes nothing; columns as for `run_tables`."""
    measures, seeds = _measures((number,)), [pipeline.seed]
    found = _stored(_jobs_of(measures, seeds), {pipeline.seed: pipeline})
    return _table(number, measures[number], found, seeds, _conditions(pipeline, seeds))


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
    return [Job(c, seed, tuple(names)) for seed in seeds for c, names in wanted.items()]


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
    scores = {(job.configuration, job.seed): found for job, found in scores.items()}
    rows = table_rows(number)
    records, per_seed, iou = [], [], []
    for row in rows:
        found = [scores.get((row.configuration, seed)) for seed in seeds]
        values = {m: [f[m][_VALUES[m][0]] for f in found if f and m in f] for m in measures}
        records.append(_record(number, row, values))
        per_seed.append({_VALUES[m][1]: [100 * v for v in vs] for m, vs in values.items() if vs})
        iou.append(_mean_iou([f["miou"]["iou"] for f in found if f]))
    table = pd.DataFrame(records)
    table.attrs = {"table": number, "title": TITLES[number], **conditions, "per_seed": per_seed, "iou": iou}
    if number == 4:
        hint = f"not available: {crf.INSTALL_HINT}"
        table.attrs["CRF"] = "column 'with CRF'; without it in 'measured'" if "crf" in measures else hint
    return table


def _record(number, row, values):
    own = dict(row.columns)
    miou = values["miou"]
    mean, sd = _mean_sd(miou)
    record = {"network": own["network"]} if number == 4 else {}
    record["configuration"] = row.label
    if number == 1:
        record["delta"] = _float(own["delta"])
    else:
        record |= {"S": own["S"]} if number == 4 else own
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


def _mean_sd(values):
    if not values:
        return math.nan, math.nan
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return 100 * statistics.fmean(values), 100 * sd


def _mean_iou(seeds):
    """By class, in percent, over the seeds; None for a class that occurs nowhere."""
    found = {}
    for name in seeds[0] if seeds else ():
        known = [scores[name] for scores in seeds if scores[name] is not None]
        found[name] = 100 * statistics.fmean(known) if known else None
    return found


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


def save_table(table, path):
    """Writes ``path`` as JSON (rows and conditions) and, beside it, as CSV, each complete or not at all."""
    path = Path(path).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: _plain(v) for k, v in record.items()} for record in table.to_dict("records")]
    document = {"conditions": table.attrs, "columns": list(table.columns), "rows": rows}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.3f", lineterminator="\n"))


def load_table(path):
    """The DataFrame that `save_table` wrote, conditions in ``attrs``."""
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


def reference_path(number, data="critters"):
    """Where the reference results of a table are kept."""
    table_rows(number)
    return REFERENCE / f"table{number}-{data}.json"


def reference_table(number, data="critters"):
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


def compare_with_reference(table, tolerance=5.0):
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


def format_table(table):
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


def style_table(table):
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
