"""Hours that all four tables take on VOC, on one GPU and on several, from the speed of each stage.

    python benchmarks/hours.py                                       # estimated, for an H100
    python benchmarks/hours.py --measured stages.json --gpus 1 2 8    # what benchmarks/pipeline.py wrote
    python benchmarks/hours.py --budget release --markdown

Which stages there are, how many and how large follows from the library's own plan for the tables, each stage
once. A stage's speed is measured where the results file has it. Elsewhere it is estimated, with caution: the
convolutions of an image, counted, at a rate that is assumed; a fixed time for each pass of a batch through a
network; what the processor does for each image, one after another. A training's start comes to either. Every
figure says which of the two it is, and a sum is called measured only if all of its parts are.

On several GPUs the rows are started in the library's order, one at a time on each; a row waits for a stage
that another one is making.
"""

import argparse
import heapq
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from drs_course import tables as experiments
from drs_course.paper import NETWORKS
from drs_course.stages import STAGE_VERSIONS, TRAININGS, Pipeline, Splits
from drs_lib import networks
from drs_lib.data import VOC_CLASSES
from drs_lib.data.voc import VOC_LIST_SIZES
from drs_lib.files import write_text
from drs_lib.recipes import PRECISIONS, get_budget

PEAK = 989  # TFLOP/s of an H100 SXM in bfloat16, dense
# Without autocast convolutions run in TF32, torch's default for them, at half the rate.
RATES = {"bfloat16": 1, "float32": 0.5}
# Milliseconds of one processor core per image of 375 x 500 that no other process takes over, by stage:
# reading files, moving arrays, scoring. The parts were timed on one core of a server (AMD EPYC): JPEG 1.4,
# resizing 0.6, mask 0.4, saliency 1.4, a confusion matrix 9.0, the largest of 21 probabilities 13.6, handing
# them to another process 11. Waiting for the GPU was not timed; 2 ms are taken for maps.
HOST_MS = {"accuracy": 2, "target": 2, "labels": 4, "label_score": 5, "evaluate": 11, "evaluate_crf": 36}
VOC_SIZE = (375, 500)
# Images in a pass through the network: `iterate_maps`, `evaluate_classifier`. VOC's sizes differ from image
# to image, so in the evaluation few neighbours go together, and none is assumed to.
BATCHES = {"target": 32, "labels": 32, "accuracy": 32, "evaluate": 1, "evaluate_crf": 1}
# What benchmarks/pipeline.py calls a kind of stage, where that is something else.
ALIASES = {"target": ("maps",), "evaluate_largefov": ("evaluate",)}


class Names:
    """What a data set of VOC tells without its images: enough for the plan, which only computes keys."""

    classes, num_classes = VOC_CLASSES, len(VOC_CLASSES)

    def __init__(self, split):
        self.split, self.fingerprint = split, f"voc-{split}"
        self.names = [f"{split}_{i}" for i in range(VOC_LIST_SIZES[split])]

    def __len__(self):
        return len(self.names)


@dataclass(frozen=True)
class Plan:
    """rows: of each row of the tables, in the order of their start, its stages in the order of their making.
    parents: of each stage. kinds: of each stage what determines its time, such as "aspp" for a training."""

    rows: list
    parents: dict
    kinds: dict

    def counts(self):
        """How many stages there are of each kind, in the order in which a row makes them."""
        found = Counter(self.kinds.values())
        order = [kind_of(name, network) for name in STAGE_VERSIONS for network in NETWORKS]
        return {kind: found[kind] for kind in sorted(found, key=order.index)}


@dataclass(frozen=True)
class Speed:
    """Seconds of an image, seconds that a stage takes beside its images, "measured" or "estimated"."""

    seconds: float
    start: float
    basis: str


@dataclass(frozen=True)
class Schedule:
    """Seconds until the last row is finished, and those that GPUs wait for a stage of another row."""

    makespan: float
    waiting: float


def splits():
    return Splits("voc", Names("trainaug"), Names("val"), Names("train"))


def plan(budget):
    """The `Plan` of a run of all four tables that finds nothing in the store, CRF included."""
    line = Pipeline(splits(), budget)
    measures = {number: ("miou", *experiments._MEASURES[number]) for number in experiments.TABLES}
    jobs = experiments._in_order(experiments._jobs_of(measures, (line.seed,)), {line.seed: line})
    rows, parents, kinds = [], {}, {}
    for job in jobs:
        stages = line.stages(job.configuration, job.measures)
        rows.append([place(stage) for stage in stages])
        for stage in stages:
            parents[place(stage)] = tuple(map(place, stage.parents))
            kinds[place(stage)] = kind_of(stage.name, job.configuration.network)
    return Plan(rows, parents, kinds)


def place(stage):
    return stage.name, stage.key


def kind_of(name, network):
    if name == "segment":
        return network
    return f"{name}_{network}" if name in ("evaluate", "evaluate_crf") else name


def parts_of(kind):
    """(stage, network or None) of a kind."""
    if kind in NETWORKS:
        return "segment", kind
    for name in ("evaluate_crf", "evaluate"):
        if kind.startswith(f"{name}_"):
            return name, kind.removeprefix(f"{name}_")
    return kind, None


def recipe_of(kind, budget):
    name, network = parts_of(kind)
    return budget.segment(network) if network else getattr(budget, name)


def images_of(kind, budget):
    """Images that a stage of this kind takes, with repetition: in a training, those of all its batches."""
    name, _ = parts_of(kind)
    data = splits()
    if name in TRAININGS:
        recipe = recipe_of(kind, budget)
        return recipe.steps(len(data.train))[1] * recipe.batch * recipe.accumulate
    of = {"accuracy": data.accuracy_images, "evaluate": data.val, "evaluate_crf": data.val}
    return len(of.get(name, data.train))


def count_flops(model, height, width, train):
    """Floating-point operations (a multiplication and an addition are two) of one image: its way through the
    network, which lies on the meta device, and with `train` the way back."""
    images = torch.empty(1, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        result = model(images)
        if train:
            result.sum().backward()
    return counter.get_total_flops()


@cache
def flops(network, backbone, height, width, train=False):
    """`count_flops` of "classifier", "refinement" or a DeepLab ("largefov", "aspp") for VOC's classes."""
    classes = len(VOC_CLASSES)
    with torch.device("meta"):
        if network == "classifier":
            model = networks.classifier(backbone, classes)
        elif network == "refinement":
            model = networks.refinement_network(backbone, classes)
        else:
            model = networks.deeplab(network, backbone, classes + 1)
    return count_flops(model.train(train), height, width, train)


def flops_of(kind, budget):
    """Operations for one image of a stage. Maps are the classifier's or, nearly the same, refined ones."""
    name, network = parts_of(kind)
    if name in TRAININGS:
        recipe = recipe_of(kind, budget)
        side = recipe.crop or recipe.resize
        if side is None:
            raise ValueError(f"the recipe of {kind} has neither crop nor resize: expected one of them.")
        model = {"classify": "classifier", "refine": "refinement"}.get(name) or recipe.kind
        return flops(model, recipe.backbone, side, side, train=True)
    if name in ("target", "labels"):
        sides = budget.scales or (budget.resize,)
        return sum(flops("classifier", budget.classify.backbone, side, side) for side in sides)
    if name == "accuracy":
        return flops("classifier", budget.classify.backbone, budget.resize, budget.resize)
    if network:
        recipe = recipe_of(kind, budget)
        return flops(recipe.kind, recipe.backbone, *VOC_SIZE)
    return 0


def estimate(kind, budget, options):
    """The `Speed` of a kind of stage by its operations."""
    name, _ = parts_of(kind)
    precision, batch, passes = "float32", BATCHES.get(name, math.inf), 1
    if name in TRAININGS:
        recipe = recipe_of(kind, budget)
        precision, batch = recipe.precision, recipe.batch
    elif name in ("target", "labels"):
        precision, passes = budget.classify.precision, len(budget.scales or (None,))
    seconds = flops_of(kind, budget) / (1e12 * options.teraflops * RATES[precision])
    seconds += (passes * options.step_ms / batch + HOST_MS.get(name, 0)) / 1000
    if name == "evaluate_crf":
        seconds += options.crf_seconds / options.cores
    return Speed(seconds, start_of(kind, options), "estimated")


def start_of(kind, options):
    return options.start_s if parts_of(kind)[0] in TRAININGS else 0.0


def find_rate(kind, rates):
    """Images per second of a kind in what `read_measured` found, or None."""
    return next((rates[name] for name in (kind, *ALIASES.get(kind, ())) if name in rates), None)


def speeds(kinds, budget, options, rates):
    """The `Speed` of each kind: measured where `rates` has it, else estimated."""
    found = {}
    for kind in kinds:
        rate = find_rate(kind, rates)
        if rate is None:
            found[kind] = estimate(kind, budget, options)
        else:
            found[kind] = Speed(1 / rate, start_of(kind, options), "measured")
    return found


def read_measured(path):
    """What benchmarks/pipeline.py wrote: (a line on the conditions, {path: {stage: images per second}}).

    Raises ValueError for a file that isn't there or isn't such a file.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        conditions = [str(report["device"]), f"torch {report['torch']}"]
        conditions += [str(report["precision"])] if report.get("precision") else []
        rows = [(row["stage"], row["path"], row["images_per_second"]) for row in report["rows"]]
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what benchmarks/pipeline.py --json writes ({type(error).__name__}: {error}). "
            "Expected JSON with device, torch and rows of stage, path and images_per_second."
        ) from None
    rates = {"ours": {}, "plain": {}}
    for stage, way, rate in rows:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f"{path}: {stage} ({way}) has {rate!r} images per second; expected above 0.")
        if stage in rates.setdefault(way, {}):
            raise ValueError(f"{path} has {stage} ({way}) twice; keep the row that is to count.")
        rates[way][stage] = rate
    return ", ".join(conditions), rates


def schedule(rows, seconds, gpus):
    """The `Schedule` of rows (lists of stages) on some GPUs, one row at a time on each, in the given order.

    seconds: of each stage. A stage is made by the first row that comes to it; until it is there, others that
    need it wait, and hold their GPU.
    """
    waiting, finished, total, end = list(reversed(rows)), {}, 0.0, 0.0
    # What each GPU still has to do of its row; the one whose time is earliest goes on.
    work = [(0.0, gpu, iter(())) for gpu in range(gpus)]
    while work:
        now, gpu, row = heapq.heappop(work)
        stage = next(row, None)
        if stage is None:
            end = max(end, now)
            if waiting:
                heapq.heappush(work, (now, gpu, iter(waiting.pop())))
            continue
        if stage in finished:
            total += max(0.0, finished[stage] - now)
        else:
            finished[stage] = now + seconds[stage]
        heapq.heappush(work, (max(now, finished[stage]), gpu, row))
    return Schedule(end, total)


def longest_chain(parents, seconds):
    """Seconds of the longest chain of stages that need one another: no number of GPUs is faster."""

    @cache
    def until(stage):
        return seconds[stage] + max(map(until, parents[stage]), default=0.0)

    return max(map(until, parents))


def project(options):
    """The report: conditions, a row for each kind of stage, and hours on each number of GPUs."""
    conditions, rates = (None, {"ours": {}, "plain": {}})
    if options.measured:
        conditions, rates = read_measured(options.measured)
    budget = get_budget(options.budget, "voc")
    if options.precision:
        budget = budget.for_all(precision=options.precision)
    work = plan(budget)
    counts = work.counts()
    found = speeds(counts, budget, options, rates["ours"])
    images = {kind: images_of(kind, budget) for kind in counts}
    each = {kind: images[kind] * found[kind].seconds + found[kind].start for kind in counts}
    seconds = {stage: each[kind] for stage, kind in work.kinds.items()}
    stages = [
        {
            "stage": kind,
            "count": count,
            "images": images[kind],
            "gigaflops_per_image": flops_of(kind, budget) / 1e9,
            "images_per_second": 1 / found[kind].seconds,
            "hours": count * each[kind] / 3600,
            "basis": found[kind].basis,
        }
        for kind, count in counts.items()
    ]
    total = sum(seconds.values())
    runs = []
    for gpus in options.gpus:
        run = schedule(work.rows, seconds, gpus)
        idle = gpus * run.makespan - total - run.waiting
        runs.append(
            {
                "gpus": gpus,
                "hours": run.makespan / 3600,
                "waiting_hours": run.waiting / 3600,
                "idle_hours": max(0.0, idle) / 3600,
            }
        )
    settings = ("teraflops", "step_ms", "start_s", "crf_seconds", "cores")
    return {
        "budget": budget.name,
        "precision": budget.classify.precision,
        "measured_on": conditions,
        **{name: getattr(options, name) for name in settings},
        "torch": torch.__version__,
        "rows": len(work.rows),
        "stages": stages,
        "hours_of_work": total / 3600,
        "longest_chain_hours": longest_chain(work.parents, seconds) / 3600,
        "schedules": runs,
        "basis": joint_basis(stages, options.start_s),
        "plain": plain(stages, rates),
    }


def joint_basis(stages, start):
    """What sums over the stages are, the start of each training included."""
    found = {row["basis"] for row in stages} | ({"estimated"} if start else set())
    return found.pop() if len(found) == 1 else "partly measured"


def plain(stages, rates):
    """Both paths' hours for those stages for which both were measured, or None if there is none."""
    both = [row for row in stages if find_rate(row["stage"], rates["plain"]) and row["basis"] == "measured"]
    if not both:
        return None

    def hours(way):
        return sum(r["count"] * r["images"] / find_rate(r["stage"], rates[way]) for r in both) / 3600

    return {"stages": [row["stage"] for row in both], "hours": hours("plain"), "ours": hours("ours")}


def texts(report):
    """Lines above the tables, and lines below."""
    count = sum(row["count"] for row in report["stages"])
    above = [
        f"All four tables on VOC, budget {report['budget']} ({report['precision']}): {report['rows']} rows, "
        f"{count} stages, each made once."
    ]
    if any(row["basis"] == "measured" for row in report["stages"]):
        above.append(f"Measured on: {report['measured_on']}.")
        if report["budget"] != "paper":
            above.append("What is measured is so with the batches and crops of the budget paper.")
    else:
        above.append("No stage is measured: every figure is an estimate, and none comes from a GPU.")
    estimated = {row["stage"] for row in report["stages"] if row["basis"] == "estimated"}
    if estimated:
        share = report["teraflops"] / PEAK
        above.append(
            f"Estimates: {report['teraflops']:g} TFLOP/s sustained in bfloat16 ({share:.0%} of an H100's "
            f"{PEAK}), half of that in float32; {report['step_ms']:g} ms more for each pass of a batch; "
            "reading and scoring on one core."
        )
    above.append(
        f"Each training starts in {report['start_s']:g} s (estimated): process, weights, images and targets."
    )
    if any(stage.startswith("evaluate_crf") for stage in estimated):
        above.append(
            f"CRF: {report['crf_seconds']:g} s per image and core (pydensecrf takes 1.7 to 4.3, measured), "
            f"{report['cores']} cores for each GPU; as attention on a GPU: not measured."
        )
    below = [
        f"Work: {report['hours_of_work']:.1f} GPU hours ({report['basis']}). Longest chain of stages: "
        f"{report['longest_chain_hours']:.1f} hours ({report['basis']}); no number of GPUs is faster."
    ]
    if report["plain"]:
        found = report["plain"]
        below.append(
            f"The plain path takes {found['hours']:.1f} hours instead of {found['ours']:.1f} (measured, "
            f"{found['hours'] / found['ours']:.1f} times) for {', '.join(found['stages'])}."
        )
    return above, below


def tables(report):
    """Two tables as (heads, rows) of text: the stages, and the hours on GPUs."""
    stages = [
        (
            row["stage"],
            f"{row['count']}",
            f"{row['images']:,}",
            f"{row['gigaflops_per_image']:.0f}" if row["gigaflops_per_image"] else "-",
            f"{row['images_per_second']:,.0f}"
            if row["images_per_second"] >= 10
            else f"{row['images_per_second']:.2f}",
            f"{row['hours']:.2f}",
            row["basis"],
        )
        for row in report["stages"]
    ]
    heads = ("stage", "how many", "images each", "GFLOP/image", "images/s", "hours", "basis")
    runs = [
        (
            f"{run['gpus']}",
            f"{run['hours']:.1f}",
            f"{report['hours_of_work'] / (run['gpus'] * run['hours']):.0%}",
            f"{run['waiting_hours']:.1f}",
            f"{run['idle_hours']:.1f}",
            report["basis"],
        )
        for run in report["schedules"]
    ]
    return (heads, stages), (
        ("GPUs", "hours", "GPUs busy", "GPU hours waiting", "without a row", "basis"),
        runs,
    )


def as_text(heads, rows):
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    )


def as_markdown(heads, rows):
    rule = ["---", *["---:"] * (len(heads) - 2), "---"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def show(report, markdown=False):
    above, below = texts(report)
    draw = as_markdown if markdown else as_text
    stages, runs = (draw(*table) for table in tables(report))
    gap = "\n\n" if markdown else "\n"
    return "\n\n".join([gap.join(above), stages, runs, gap.join(below)])


def above_zero(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def zero_or_more(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def whole(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def arguments(given=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", choices=("paper", "release"), default="paper")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of trainings and maps; default: the budget's"
    )
    parser.add_argument("--gpus", type=whole, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="what benchmarks/pipeline.py --json wrote"
    )
    parser.add_argument(
        "--teraflops",
        type=above_zero,
        default=100.0,
        metavar="T",
        help="sustained rate of the convolutions in bfloat16, TFLOP/s; default 100, a tenth of what an H100 "
        f"can do ({PEAK}, dense). NVIDIA's PyTorch example trains ResNet-50 on an A100 at 2,470 images/s in "
        "mixed precision, about 60 TFLOP/s or 19%% of its 312, with batches of 256. Here they are 5 and 10, "
        "and from the A100 to the H100 memory has gained less than arithmetic: half of that share is a "
        "cautious guess. VGG's wide 3x3 convolutions should do better",
    )
    parser.add_argument(
        "--step-ms",
        type=zero_or_more,
        default=10.0,
        metavar="MS",
        help="added for each pass of a batch: a few hundred kernels launched one by one, augmentation, the "
        "optimiser; default 10. In truth much of it happens while the GPU computes",
    )
    parser.add_argument(
        "--start-s",
        type=zero_or_more,
        default=30.0,
        metavar="S",
        help="start of a training: weights, images and targets into memory, the choice of algorithms; "
        "default 30, a guess",
    )
    parser.add_argument("--cores", type=whole, default=16, help="processor cores for each GPU; default 16")
    parser.add_argument(
        "--crf-seconds",
        type=zero_or_more,
        default=4.3,
        metavar="S",
        help="of the CRF per image and core; default 4.3, the slowest of what benchmarks/crf.py found "
        "(1.7 to 4.3, by the kernels' widths)",
    )
    parser.add_argument("--markdown", action="store_true", help="tables for a page of documentation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args(given)


def main(given=None):
    options = arguments(given)
    try:
        report = project(options)
    except ValueError as error:
        raise SystemExit(f"hours.py: {error}") from None
    print(show(report, options.markdown))
    if options.json:
        write_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
