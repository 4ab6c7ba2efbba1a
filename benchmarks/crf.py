"""Seconds per image of the dense CRF, on one process and on several.

    python benchmarks/crf.py
    python benchmarks/crf.py --jobs 1 2 4 --cases voc

Images of Critters' size (128 x 128, 7 labels) and of VOC's (375 x 500, 21 labels), 10 iterations.
Starting the worker processes is part of the time, as it is for a user; a first round is not counted.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from drs_lib.crf import INSTALL_HINT, CRFConfig, available, iterate_crf
from drs_lib.files import write_text

# labels, height, width, images per job and round
CASES = {"critters": (7, 128, 128, 12), "voc": (21, 375, 500, 2)}


def scene(labels, height, width, seed):
    """An image of coloured regions with noise, and probabilities to match: colours decide the CRF's time."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centres = rng.random((labels, 2)) * (height, width)
    logits = -np.stack([np.hypot(y - cy, x - cx) for cy, cx in centres]) / (0.1 * width)
    colours = rng.integers(0, 256, (labels, 3))
    image = colours[logits.argmax(axis=0)] + rng.normal(0, 12, (height, width, 3))
    probabilities = np.exp(logits - logits.max(axis=0))
    probabilities /= probabilities.sum(axis=0)
    return probabilities.astype(np.float32), np.clip(image, 0, 255).astype(np.uint8)


def measure(case, jobs, rounds, config):
    labels, height, width, per_job = CASES[case]
    items = [scene(labels, height, width, seed) for seed in range(per_job * max(jobs))]
    seconds = {n: [] for n in jobs}
    for n in jobs:
        for round_number in range(-1, rounds):  # round -1 fills the disk's cache
            start = time.perf_counter()
            some = items[: n * (1 if round_number < 0 else per_job)]
            list(iterate_crf(some, config, jobs=n))
            if round_number >= 0:
                seconds[n].append((time.perf_counter() - start) / (n * per_job))
    medians = {n: statistics.median(values) for n, values in seconds.items()}
    return [
        {
            "case": case,
            "size": f"{labels} x {height} x {width}",
            "jobs": n,
            "seconds_per_image": medians[n],
            "speedup": medians[jobs[0]] / medians[n],
        }
        for n in jobs
    ]


def show(row):
    print(
        f"{row['case']:12s}{row['size']:>16s}{row['jobs']:>6}"
        f"{row['seconds_per_image']:10.3f}{row['speedup']:10.3f}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument(
        "--jobs", nargs="+", type=int, default=[1, 2], help="numbers of processes; the first is the baseline"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if not available():
        parser.exit(1, INSTALL_HINT + "\n")

    config = CRFConfig.LARGEFOV_VGG16
    print(f"{platform.machine()}, {config.iterations} iterations")
    print(f"{'case':12s}{'C x H x W':>16s}{'jobs':>6s}{'s/image':>10s}{'speed-up':>10s}")
    rows = []
    for case in options.cases:
        for row in measure(case, options.jobs, options.rounds, config):
            show(row)
            rows.append(row)
    if options.json:
        found = {"machine": platform.machine(), "rows": rows}
        write_text(options.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
