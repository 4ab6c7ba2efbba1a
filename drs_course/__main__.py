"""The command line: ``python -m drs_course tables`` measures the paper's tables, ``reference`` keeps them;
``download`` fetches VOC and weights, ``verify`` measures the authors' released networks."""

import argparse
import hashlib
import sys
import time
from pathlib import Path

from drs_course.paper import table_rows
from drs_course.stages import Pipeline
from drs_course.store import RunStore, run_name
from drs_course.tables import (
    TABLES,
    RowsFailed,
    format_table,
    reference_path,
    run_tables,
    save_table,
)
from drs_lib.crf import ENGINES
from drs_lib.files import write_text
from drs_lib.recipes import BUDGETS, COMPILE, PRECISIONS, get_budget

# The keys of `drs_course.download.FILES`, which would load torch.
DOWNLOADS = ("vgg16", "resnet101", "drs", "refine", "coco", "deeplab", "voc", "aug", "saliency", "labels")


def _parser():
    parser = argparse.ArgumentParser(prog="python -m drs_course", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    course = commands.add_parser(
        "tables", help="run the tables, print them beside the paper's, write them and figures"
    )
    reference = commands.add_parser(
        "reference", help="run the tables and keep them as the course's reference results"
    )
    for command in (course, reference):
        command.add_argument("--data", choices=("critters", "voc"), default="critters")
        command.add_argument("--voc-root", metavar="DIR", help="the folder VOC 2012 is in")
        command.add_argument("--budget", choices=BUDGETS, help="default: laptop for critters, paper for voc")
        command.add_argument(
            "--precision", choices=PRECISIONS, help="default: bfloat16 for paper and release, else float32"
        )
        command.add_argument(
            "--compile", choices=COMPILE[1:], metavar="MODE", help="torch.compile's mode for the trainings"
        )
        command.add_argument(
            "--aspp-weights",
            metavar="W",
            help="initial weights of Table 4's ASPP: pretrained (ImageNet), coco, or a file, such as "
            "deeplabv1_resnet101-coco.pth",
        )
        command.add_argument(
            "--crf-engine",
            choices=ENGINES,
            help="default: lattice (pydensecrf, on the processor); attention is for a GPU",
        )
        command.add_argument("--seeds", type=_seed, nargs="+", default=[0], metavar="N")
        command.add_argument(
            "--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES), metavar="N"
        )
        command.add_argument(
            "--jobs", type=_positive, metavar="N", help="processes; default: one per physical core"
        )
        command.add_argument("--store", metavar="DIR", help="the run store; default: $DRS_STORE, else ./runs")
        command.add_argument(
            "--overwrite",
            nargs="?",
            const=True,
            metavar="RUN",
            help="train again what is in the store; RUN: go on with the run of that name that was stopped",
        )
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    fetch = commands.add_parser("download", help="fetch VOC, masks, saliency maps and weights")
    fetch.add_argument("--root", default="data", metavar="DIR", help="where VOC2012 is to be; default: data")
    fetch.add_argument("--only", nargs="+", metavar="WHAT", help=f"some of {' '.join(DOWNLOADS)}")
    fetch.add_argument(
        "--mirror", metavar="URL", help="another place of one file, or a folder with all of them"
    )
    fetch.add_argument(
        "--local", nargs="+", default=(), metavar="PATH",
        help="copies that you have, under their own names, or folders with such",
    )  # fmt: skip
    fetch.add_argument(
        "--sbd", action="store_true",
        help="make the augmented masks from the Semantic Boundaries Dataset; needs SciPy",
    )  # fmt: skip
    check = commands.add_parser("verify", help="measure the authors' released networks and labels on VOC")
    check.add_argument("--voc-root", default="data", metavar="DIR", help="default: data")
    check.add_argument("--limit", type=_positive, metavar="N", help="the first N images only, for a try")
    check.add_argument(
        "--jobs", type=_positive, metavar="N", help="processes for the CRF; default: all cores"
    )
    check.add_argument("--store", metavar="DIR", help="the run store; default: $DRS_STORE, else ./runs")
    course.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    course.add_argument("--no-figures", dest="figures", action="store_false", help="tables only")
    return parser


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seed(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return value


def _budget(options):
    budget = get_budget(options.budget, options.data)
    for name in ("precision", "compile"):
        if getattr(options, name):
            budget = budget.for_all(**{name: getattr(options, name)})
    if options.crf_engine:
        budget = budget.replace(crf_engine=options.crf_engine)
    if options.aspp_weights:
        if options.aspp_weights not in ("pretrained", "coco") and not Path(options.aspp_weights).is_file():
            from drs_course.download import weights_folder

            if (fetched := weights_folder() / options.aspp_weights).is_file():
                options.aspp_weights = str(fetched)
        aspp = budget.aspp.replace(weights=options.aspp_weights)
        budget = budget.replace(aspp=aspp)
        if options.aspp_weights not in ("pretrained", "coco"):
            from drs_lib.networks import deeplab

            # A file that doesn't fit is better noticed now than after the trainings before ASPP's.
            classes = {"voc": 21, "critters": 7}[options.data]
            deeplab(aspp.kind, aspp.backbone, classes, weights=aspp.weights)
    return budget


def _figures(options, store):
    """Draws the figures, unless they are there, drawn from the very same stages; returns their folder."""
    folder = options.out / "figures"
    choice = dict(data=options.data, budget=options.budget, voc_root=options.voc_root)
    code = sorted(Path(__file__).with_name("plots").glob("*.py"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in code))
    for seed in options.seeds:
        line = Pipeline(seed=seed, store=store, **choice)
        rows = [row for number in TABLES for row in table_rows(number)]
        for configuration in (row.configuration for row in rows if row.configuration is not None):
            for stage in line.stages(configuration):
                state.update(f"{stage.name} {stage.key} {store.made_at(stage.name, stage.key)}\n".encode())
    stamp = folder / "drawn-from.txt"
    if stamp.is_file() and stamp.read_text() == state.hexdigest():
        return folder
    from drs_course.plots import make_figures

    make_figures(folder, store=store, seed=options.seeds[0], seeds=options.seeds, **choice)
    write_text(stamp, state.hexdigest())
    return folder


def _on_voc(command, options):
    """The commands download and verify."""
    from drs_course.download import download
    from drs_course.verify import verify

    try:
        if command == "download":
            download(**options)
            return 0
        return int(None in verify(**options).values())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


def main(arguments=None):
    """Runs the command line; returns the exit status: 0, or 1 if anything failed."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without some character (Windows code pages lack delta) gets a question mark, no error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    if options.command in ("download", "verify"):
        given = vars(options)
        return _on_voc(given.pop("command"), given)
    began = time.perf_counter()
    store = RunStore(options.store)
    failed, run = None, run_name(options.overwrite)
    if run:
        print(f"This run trains again what is in the store. Stopped, --overwrite {run} goes on.", flush=True)
    try:
        options.budget = _budget(options)
        tables = run_tables(
            options.tables,
            data=options.data,
            budget=options.budget,
            seeds=options.seeds,
            voc_root=options.voc_root,
            store=store,
            jobs=options.jobs,
            overwrite=run,
            progress=not options.quiet,
        )
    except RowsFailed as error:
        tables, failed = error.tables, error
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = f"the same command{f' with --overwrite {run}' if run else ''} goes on from there"
        print(f"\nstopped; finished stages are kept, {again}", file=sys.stderr)
        return 130
    for table in tables.values():
        print("\n" + format_table(table))
    written = []
    try:
        if failed is None or options.command == "tables":
            for number, table in tables.items():
                if options.command == "reference":
                    path = reference_path(number, options.data)
                else:
                    path = options.out / f"table{number}.json"
                save_table(table, path)
                written.append(path)
        if options.command == "tables" and options.figures and failed is None:
            written.append(_figures(options, store))
    except OSError as error:
        print(
            f"error: not everything could be written: {error}. All results are kept in {store.root}: put "
            "that right, and the same command writes the rest in seconds.",
            file=sys.stderr,
        )
        return 1
    seconds = time.perf_counter() - began
    print(
        f"\n{seconds / 60:.1f} minutes. Stages: {store.root}. Written: {', '.join(map(str, written)) or '-'}."
    )
    if failed is not None:
        for trace in {error: trace for error, trace in failed.failures.values()}.values():
            print(f"\n{trace}", file=sys.stderr)
        print(f"error: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
