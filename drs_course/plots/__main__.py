"""The command line: ``python -m drs_course.plots`` (part of `make figures`)."""

import argparse

from drs_course.plots import make_figures
from drs_course.stages import BUDGETS

parser = argparse.ArgumentParser(
    prog="python -m drs_course.plots", description="Draw the figures from the stored runs."
)
parser.add_argument("--out", default="figures", metavar="DIR", help="default: figures")
parser.add_argument("--store", metavar="DIR", help="the run store; default: $DRS_STORE, else ./runs")
parser.add_argument("--data", choices=("critters", "voc"), default="critters")
parser.add_argument("--voc-root", metavar="DIR", help="the folder VOC 2012 is in")
parser.add_argument("--budget", choices=BUDGETS, help="default: laptop; paper for voc")
parser.add_argument(
    "--seeds", type=int, nargs="+", default=[0], metavar="N", help="the networks shown are the first's"
)
options = vars(parser.parse_args())
for path in make_figures(options.pop("out"), seed=options["seeds"][0], **options):
    print(path)
