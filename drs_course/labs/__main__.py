"""Draws a lab for the README from the stored runs: ``python -m drs_course.labs`` (part of `make figures`)."""

import argparse
from pathlib import Path

from drs_course.labs import DeltaLab
from drs_course.labs.networks import PLAIN
from drs_course.notebook import open_course
from drs_course.paper import Configuration
from drs_course.plots.stored import first_of_each_class
from drs_lib.files import atomic_path

DELTA = 0.4  # of Table 1: the strongest suppression there


def main(arguments=None):
    """Writes delta_lab.png: the lab in its mode "trained", on the first validation image of one class."""
    parser = argparse.ArgumentParser(prog="python -m drs_course.labs", description=__doc__)
    parser.add_argument("--out", default="figures", metavar="DIR", type=Path, help="default: figures")
    options = parser.parse_args(arguments)
    line = open_course("critters")
    if not all(line.has("classify", c) for c in (PLAIN, Configuration(delta=DELTA))):
        print("delta_lab is left out: the run store has no classifiers for it. `make course` makes them.")
        return
    [image] = first_of_each_class(line.data.val, 1)
    lab = DeltaLab(line, image=image).set(mode="trained", trained=DELTA)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out / "delta_lab.png") as temporary:
        temporary.write_bytes(lab.snapshot())
    print(options.out / "delta_lab.png")


if __name__ == "__main__":
    main()
