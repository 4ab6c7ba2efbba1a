"""Training-step time of a classifier with ReLU, constant and learnable DRS, compiled and plain.

One step is forward, loss, backward and an SGD update on random images. All variants run in one process and
take turns, step by step, so that whatever else the machine does falls on all of them alike; the table gives
medians over the turns. On a busy machine and one thread, the ratio of processor times is the steadier one.

    python benchmarks/step.py --threads 1 --repeats 40 --json step.json
"""

import argparse
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from drs_lib import kernels
from drs_lib.files import write_text
from drs_lib.networks import classifier

LAYERS = (1, 2, 3, 4, 5, 6)
VARIANTS = {
    "ReLU": ((), None, nullcontext),
    "constant, compiled": (LAYERS, 0.55, nullcontext),
    "constant, plain": (LAYERS, 0.55, kernels.disabled),
    "learnable, compiled": (LAYERS, None, nullcontext),
    "learnable, plain": (LAYERS, None, kernels.disabled),
}


def make_step(variant, args):
    """A function that runs one training step of ``variant`` and returns its wall and processor time."""
    layers, delta, context = VARIANTS[variant]
    torch.manual_seed(0)
    model = classifier(args.backbone, args.classes, drs_layers=layers, delta=delta)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    labels = (torch.rand(args.batch, args.classes) < 0.3).float()

    def step():
        start, cpu_start = time.perf_counter(), time.process_time()
        with context():
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(images), labels).backward()
            optimizer.step()
        return time.perf_counter() - start, time.process_time() - cpu_start

    return step


def _ratio(times, relu):
    return round(statistics.median(a / b for a, b in zip(times, relu, strict=True)), 3)


def measure(args):
    """A row for each variant: its times and its ratios to ReLU within a turn, medians over the turns."""
    torch.set_num_threads(args.threads)
    steps = {variant: make_step(variant, args) for variant in args.variants}
    first = {variant: step()[0] for variant, step in steps.items()}
    for step in steps.values():
        step()
    times = {variant: [] for variant in steps}
    for _ in range(args.repeats):
        for variant, step in steps.items():
            times[variant].append(step())
    rows = []
    for variant, found in times.items():
        wall, cpu = zip(*found, strict=True)
        relu_wall, relu_cpu = zip(*times["ReLU"], strict=True)
        rows.append(
            {
                "variant": variant,
                "first_step_s": round(first[variant], 3),
                "median_ms": round(1e3 * statistics.median(wall), 2),
                "fastest_ms": round(1e3 * min(wall), 2),
                "ratio": _ratio(wall, relu_wall),
                "cpu_ratio": _ratio(cpu, relu_cpu),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="mini", choices=("mini", "vgg16"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="images are size x size")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="turns, each with one step of every variant")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"ReLU is always measured; of: {', '.join(VARIANTS)}",
    )
    parser.add_argument("--json", type=Path, help="write rows and conditions to this file")
    args = parser.parse_args()
    args.variants = list(dict.fromkeys(["ReLU", *args.variants]))
    if not kernels.available():
        parser.error("numba is not installed, so there is no compiled form to measure: pip install numba")

    rows = measure(args)
    print(
        f"{args.backbone}, batch {args.batch}, {args.size}x{args.size}, {args.threads} thread(s), "
        f"{args.repeats} turns, torch {torch.__version__}"
    )
    print(
        f"{'variant':<22}{'median ms':>10}{'fastest ms':>12}{'ratio to ReLU':>15}{'of CPU time':>13}"
        f"{'first step s':>14}"
    )
    for row in rows:
        print(
            f"{row['variant']:<22}{row['median_ms']:>10.1f}{row['fastest_ms']:>12.1f}{row['ratio']:>15.3f}"
            f"{row['cpu_ratio']:>13.3f}{row['first_step_s']:>14.2f}"
        )
    if args.json:
        conditions = {key: getattr(args, key) for key in ("backbone", "batch", "size", "threads", "repeats")}
        report = {
            **conditions,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "rows": rows,
        }
        write_text(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
