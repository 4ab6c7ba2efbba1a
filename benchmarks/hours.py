"""Hours that the stages of all four tables take on VOC, each made once, on one GPU of an H100's class.

    python benchmarks/hours.py                                     # estimated
    python benchmarks/hours.py --measured stages.json              # what benchmarks/pipeline.py --json wrote

A stage's speed is measured where the results file has it. Elsewhere it is estimated, with caution: an image's
operations, which are counted exactly, at an assumed rate; a fixed time for each pass of a batch through a
network; and what one processor core does for each image. Each line says which of the two it is.
"""

import argparse
import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from drs_course.paper import NETWORKS, table_rows
from drs_course.stages import STAGE_VERSIONS, TRAININGS, Pipeline, Splits
from drs_course.tables import TABLES
from drs_lib import networks
from drs_lib.data.voc import VOC_LIST_SIZES
from drs_lib.recipes import get_budget

# A tenth of an H100's 989 in bfloat16. NVIDIA's PyTorch example trains ResNet-50 on an A100 at 19 % of its
# peak, with batches of 256; here they are 5 and 10, and memory has gained less than arithmetic.
TERAFLOPS = 100.0
# Without autocast convolutions run in TF32, torch's default for them, at half the rate.
RATES = {"bfloat16": 1, "float32": 0.5}
PASS = 0.010  # seconds of a batch's pass: kernels launched one by one, augmentation, the optimiser
START = 30.0  # seconds until a training begins, a guess: weights, images and targets into memory
CRF = 4.3 / 16  # seconds of an image: the slowest that benchmarks/crf.py found on one core, on 16 cores
# Seconds of one core for an image of 375 x 500, timed on a server: files, moving arrays, scoring.
HOST = {"accuracy": 0.002, "target": 0.002, "labels": 0.004, "label_score": 0.005, "evaluate": 0.011}
HOST["evaluate_crf"] = 0.036 + CRF
# What benchmarks/pipeline.py calls a kind of stage, where that is something else.
ALIASES = {"target": "maps", "evaluate_largefov": "evaluate"}


def counts(budget):
    """How many stages there are of each kind, (stage, network or None), in the order of their making."""
    # Keys need no images.
    splits = (SimpleNamespace(num_classes=20, fingerprint=split) for split in ("trainaug", "val", "train"))
    pipeline, found = Pipeline(Splits("voc", *splits), budget), {}
    rows = [(table, row.configuration) for table in TABLES for row in table_rows(table) if row.configuration]
    for table, configuration in rows:
        measures = ["miou"] if configuration.supervised else ["labels", "miou"]
        for stage in pipeline.stages(configuration, measures + {1: ["accuracy"], 4: ["crf"]}.get(table, [])):
            of_network = stage.name in ("segment", "evaluate", "evaluate_crf")
            kind = stage.name, configuration.network if of_network else None
            found.setdefault(kind, set()).add(stage.key)
    order = [(name, network) for name in STAGE_VERSIONS for network in (None, *NETWORKS)]
    return {kind: len(found[kind]) for kind in sorted(found, key=order.index)}


@cache
def flops(network, backbone, height, width, train=False):
    """Floating-point operations (a multiplication and an addition are two) of an image's way through a
    network for VOC, "classifier", "refinement" or a DeepLab's kind; with ``train`` also of the way back."""
    makers = {"classifier": networks.classifier, "refinement": networks.refinement_network}
    with torch.device("meta"):
        image = torch.empty(1, 3, height, width)
        make = makers.get(network)
        model = make(backbone, 20) if make else networks.deeplab(network, backbone, 21)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        result = model.train(train)(image)
        if train:
            result.sum().backward()
    return counter.get_total_flops()


def work(kind, budget):
    """Of a kind of stage: images (of a training those of all its batches), an image's operations, their
    precision, and an image's seconds beside them. Maps are the classifier's or, nearly the same, refined."""
    name, network = kind
    recipe = budget.segment(network) if network else getattr(budget, name, None)
    if name in TRAININGS:
        images = recipe.steps(VOC_LIST_SIZES["trainaug"])[1] * recipe.batch * recipe.accumulate
        model = {"classify": "classifier", "refine": "refinement"}.get(name) or recipe.kind
        side = recipe.crop or recipe.resize
        operations = flops(model, recipe.backbone, side, side, train=True)
        return images, operations, recipe.precision, PASS / recipe.batch
    if network:  # images differ in size and go alone
        return (
            VOC_LIST_SIZES["val"],
            flops(recipe.kind, recipe.backbone, 375, 500),
            "float32",
            PASS + HOST[name],
        )
    accuracy, classify = name == "accuracy", budget.classify
    sides = {"accuracy": (budget.resize,), "label_score": ()}.get(name, budget.scales)
    operations = sum(flops("classifier", classify.backbone, side, side) for side in sides)
    seconds = len(sides) * PASS / 32 + HOST[name]
    images = VOC_LIST_SIZES["train" if accuracy else "trainaug"]
    return images, operations, "float32" if accuracy else classify.precision, seconds


def read_measured(path):
    """{stage: images per second} of what benchmarks/pipeline.py wrote; ends the program for another file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        rates = {row["stage"]: float(row["images_per_second"]) for row in rows if row["path"] == "ours"}
        if wrong := [stage for stage, rate in rates.items() if not 0 < rate < math.inf]:
            raise ValueError(f"{wrong[0]} has {rates[wrong[0]]} images per second, expected above 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not what benchmarks/pipeline.py --json writes: {error!r}") from None
    return rates


def table(budget, teraflops=TERAFLOPS, rates=()):
    """A line for each kind of stage: (stage, count, images, operations, images per second, hours, basis)."""
    for kind, count in counts(budget).items():
        stage, network = kind
        name = network if stage == "segment" else f"{stage}_{network}" if network else stage
        images, operations, precision, beside = work(kind, budget)
        measured = next((rates[key] for key in (name, ALIASES.get(name)) if key in rates), None)
        rate = measured or 1 / (operations / (1e12 * teraflops * RATES[precision]) + beside)
        hours = count * (images / rate + (START if stage in TRAININGS else 0)) / 3600
        basis = "measured" if measured else "estimated"
        yield name, count, images, operations, rate, hours, basis


def main(given=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--budget", choices=("paper", "release"), default="paper")
    parser.add_argument("--teraflops", type=float, default=TERAFLOPS, metavar="T", help="assumed, bfloat16")
    parser.add_argument("--measured", metavar="FILE", help="what benchmarks/pipeline.py --json wrote")
    options = parser.parse_args(given)
    if not 0 < options.teraflops < math.inf:
        parser.error("argument --teraflops: expected above 0")
    rates = read_measured(options.measured) if options.measured else {}
    lines = list(table(get_budget(options.budget, "voc"), options.teraflops, rates))
    print("| stage | how many | images each | GFLOP/image | images/s | hours | basis |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for stage, count, images, operations, rate, hours, basis in lines:
        gigaflops = f"{operations / 1e9:.0f}" if operations else "-"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        print(f"| {stage} | {count} | {images:,} | {gigaflops} | {speed} | {hours:.2f} | {basis} |")
    _, counted, *_, hours, bases = zip(*lines, strict=True)
    basis = bases[0] if len(set(bases)) == 1 else "partly measured"
    print(f"| all | {sum(counted)} | | | | {sum(hours):.1f} | {basis} |")


if __name__ == "__main__":
    main()
