"""The course's command line: Tables 1 to 4 and their figures, the reference results, what VOC needs, the
authors' released networks measured, the shipped weights."""

import argparse
import hashlib
import sys
import time
from pathlib import Path

from drs_course import plots
from drs_course.download import FILES, download, weights_folder
from drs_course.labs import DeltaLab
from drs_course.paper import Configuration, table_rows
from drs_course.plots.stored import first_of_each_class
from drs_course.pretrain import NETWORKS, pretrain
from drs_course.stages import Pipeline
from drs_course.store import RunStore, run_name
from drs_course.tables import TABLES, RowsFailed, format_table, reference_path, run_tables, save_table
from drs_course.verify import verify
from drs_lib.files import atomic_path, write_text
from drs_lib.networks import deeplab
from drs_lib.recipes import BUDGETS, PRECISIONS, get_budget
from drs_lib.weights import SHIPPED

LAB_DELTA = 0.4  # of Table 1: the strongest suppression there


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m drs_course",
        description=__doc__,
        epilog="'python -m drs_doctor' says what is missing here and how to mend it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, about, run, *parents):
        found = commands.add_parser(name, help=about, parents=parents)
        found.set_defaults(run=run)
        return found.add_argument

    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("--store", metavar="DIR", help="the run store; default: $DRS_STORE, else ./runs")
    runs = argparse.ArgumentParser(add_help=False, parents=[store])
    runs.add_argument("--data", choices=("critters", "voc"), default="critters")
    runs.add_argument("--voc-root", metavar="DIR", help="the folder VOC 2012 is in")
    runs.add_argument("--budget", choices=BUDGETS, help="default: laptop for critters, paper for voc")
    runs.add_argument("--seeds", type=_seed, nargs="+", default=[0], metavar="N")
    rows = argparse.ArgumentParser(add_help=False, parents=[runs])
    _add_rows(rows.add_argument)

    add = command(
        "tables", "run the tables, print them beside the paper's, write them and figures", _tables, rows
    )
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--no-figures", dest="figures", action="store_false", help="tables only")
    command("reference", "run the tables and keep them as the course's reference results", _tables, rows)
    add = command("figures", "draw the figures from the stored runs", _figures, runs)
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures")
    add = command("download", "fetch VOC, masks, saliency maps and weights", _download)
    add("--root", default="data", metavar="DIR", help="where VOC2012 is to be; default: data")
    add("--only", nargs="+", metavar="WHAT", help=f"some of {' '.join(FILES)}")
    add("--mirror", metavar="URL", help="another place of one file, or a folder with all of them")
    copies = "copies that you have, under their own names, or folders with such"
    add("--local", nargs="+", default=(), metavar="PATH", help=copies)
    add = command("verify", "measure the authors' released networks and labels on VOC", _verify, store)
    add("--voc-root", default="data", metavar="DIR", help="default: data")
    add("--limit", type=_positive, metavar="N", help="the first N images only, for a try")
    add("--jobs", type=_positive, metavar="N", help="processes for the CRF; default: all cores")
    add = command("pretrain", "train the weights of Critters that the library ships", _pretrain)
    add("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--out", type=Path, default=SHIPPED, metavar="DIR", help="default: the library's folder of weights")
    return parser


def _add_rows(add):
    add("--precision", choices=PRECISIONS, help="default: float32; bfloat16 is faster on a GPU")
    weights = "pretrained (ImageNet), coco, or a file, such as deeplabv1_resnet101-coco.pth"
    add("--aspp-weights", metavar="W", help=f"initial weights of Table 4's ASPP: {weights}")
    add("--tables", type=int, nargs="+", choices=TABLES, default=list(TABLES), metavar="N")
    add("--jobs", type=_positive, metavar="N", help="processes; default: one per physical core")
    again = "train again what is in the store; RUN: go on with the run of that name that was stopped"
    add("--overwrite", nargs="?", const=True, metavar="RUN", help=again)
    add("--quiet", action="store_true", help="no progress bar")


def _positive(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seed(text):
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return value


def _budget(options):
    budget = get_budget(options.budget, options.data)
    if options.precision:
        budget = budget.for_all(precision=options.precision)
    if (weights := options.aspp_weights) is None:
        return budget
    if weights in ("pretrained", "coco"):
        return budget.replace(aspp=budget.aspp.replace(weights=weights))
    if not Path(weights).is_file() and (fetched := weights_folder() / weights).is_file():
        weights = str(fetched)
    aspp = budget.aspp.replace(weights=weights)
    # A file that doesn't fit is better noticed now than after the trainings before ASPP's.
    deeplab(aspp.kind, aspp.backbone, {"voc": 21, "critters": 7}[options.data], weights=weights)
    return budget.replace(aspp=aspp)


def _choice(options):
    return {"data": options.data, "budget": options.budget, "voc_root": options.voc_root}


def _tables(options):
    """The commands tables and reference."""
    began, store = time.perf_counter(), RunStore(options.store)
    failed, options.overwrite = None, run_name(options.overwrite)
    if run := options.overwrite:
        print(f"This run trains again what is in the store. Stopped, --overwrite {run} goes on.", flush=True)
    options.budget = _budget(options)
    try:
        tables = run_tables(
            options.tables, **_choice(options), seeds=options.seeds, store=store, jobs=options.jobs,
            overwrite=run, progress=not options.quiet,
        )  # fmt: skip
    except RowsFailed as error:
        tables, failed = error.tables, error
    for table in tables.values():
        print("\n" + format_table(table))
    try:
        written = _written(options, tables, failed, store)
    except OSError as error:
        raise OSError(
            f"not everything could be written: {error}. All results are kept in {store.root}: put that "
            "right, and the same command writes the rest in seconds."
        ) from error
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{minutes:.1f} minutes. Stages: {store.root}. Written: {', '.join(map(str, written)) or '-'}.")
    if failed is not None:
        for trace in {error: trace for error, trace in failed.failures.values()}.values():
            print(f"\n{trace}", file=sys.stderr)
        raise failed


def _written(options, tables, failed, store):
    """Writes what the command is to write; returns the paths."""
    reference, written = options.command == "reference", []
    for number, table in tables.items():
        if not (reference and failed):
            path = (
                options.out / f"table{number}.json" if not reference else reference_path(number, options.data)
            )
            written.append(path)
            save_table(table, path)
    if not reference and options.figures and failed is None:
        written.append(_result_figures(options, store))
    return written


def _result_figures(options, store):
    """Draws the figures, unless they are there, drawn from the very same stages; returns their folder."""
    folder, choice, seeds = options.out / "figures", _choice(options), options.seeds
    code = sorted(Path(plots.__file__).parent.glob("*.py"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in code))
    configurations = [row.configuration for number in TABLES for row in table_rows(number)]
    for seed in seeds:
        pipeline = Pipeline(seed=seed, store=store, **choice)
        for configuration in filter(None, configurations):
            for stage in pipeline.stages(configuration):
                state.update(f"{stage.name} {stage.key} {store.made_at(stage.name, stage.key)}\n".encode())
    stamp = folder / "drawn-from.txt"
    if not stamp.is_file() or stamp.read_text() != state.hexdigest():
        plots.make_figures(folder, store=store, seed=seeds[0], seeds=seeds, **choice)
        write_text(stamp, state.hexdigest())
    return folder


def _figures(options):
    """The figures of README and notebooks, and the picture of a lab in README."""
    choice, seed, store = _choice(options), options.seeds[0], RunStore(options.store)
    for path in plots.make_figures(options.out, store=store, seed=seed, seeds=options.seeds, **choice):
        print(path)
    pipeline = Pipeline(seed=seed, store=store, **choice)
    cam, suppressed = Configuration(drs_layers=()), Configuration(delta=LAB_DELTA)
    if not all(pipeline.has("classify", configuration) for configuration in (cam, suppressed)):
        print("delta_lab is left out: the run store has no classifiers for it. `make course` makes them.")
        return
    [image] = first_of_each_class(pipeline.data.val, 1)
    lab = DeltaLab(pipeline, image=image).set(mode="trained", trained=LAB_DELTA)
    with atomic_path(options.out / "delta_lab.png") as temporary:
        temporary.write_bytes(lab.snapshot())
    print(options.out / "delta_lab.png")


def _download(options):
    download(options.root, only=options.only, mirror=options.mirror, local=options.local)


def _verify(options):
    scores = verify(options.voc_root, limit=options.limit, jobs=options.jobs, store=options.store)
    return int(None in scores.values())


def _pretrain(options):
    pretrain(options.only, options.out)


def main(arguments=None):
    """Runs the command line; returns the exit status: 0, or 1 if anything failed."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without some character (Windows code pages lack delta) gets a question mark, no error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        run = getattr(options, "overwrite", None)
        again = f"the same command{f' with --overwrite {run}' if run else ''} goes on from there"
        print(f"\nstopped; what is finished is kept, {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
