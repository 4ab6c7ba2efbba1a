"""Run the course's notebooks and keep them tidy.

    python tools/notebooks.py run [FILE ...]     run top to bottom in a fresh kernel and store the outputs
    python tools/notebooks.py clean [FILE ...]   only remove what changes from run to run
    python tools/notebooks.py new FILE           an empty notebook after the course's template

A notebook that fails is left as it was, and its error is shown. Settings: DRS_BUDGET and DRS_STORE.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from drs_lib.files import write_text

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
TIMEOUT = 3600  # seconds for one cell
# Solutions are folded in JupyterLab: who works alone tries first, then unfolds.
FOLDED = {"source_hidden": True, "outputs_hidden": True}
WIDGET = "application/vnd.jupyter.widget-view+json"

PARAMETERS = """\
DATA = "critters"  # or "voc"
BUDGET = None  # "laptop" on Critters, "paper" on VOC
VOC_ROOT = None  # the folder VOC 2012 is in"""
OPENING = """\
from drs_course.notebook import open_course

line = open_course(DATA, BUDGET, VOC_ROOT)"""
TEMPLATE = (
    ("markdown", "# NN Title\n\n**You will learn** ...\n\n**Time and needs:** ..."),
    ("markdown", "## The idea"),
    ("parameters", PARAMETERS),
    ("code", OPENING),
    ("markdown", "## Try it"),
    ("markdown", "## What to notice"),
    ("markdown", "## Exercises"),
    ("markdown", "## Summary, and the step to VOC"),
)


def clean(notebook):
    """Remove timings, widget states, colours' and processes' traces, join what was printed in pieces, number
    the cells, fold solutions."""
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.NotebookNode({"tags": tags} if tags else {})
        if "### BEGIN SOLUTION" in cell.source:
            cell.metadata["jupyter"] = nbformat.from_dict(FOLDED)
        if cell.cell_type == "code":
            outputs = enumerate(cell.outputs)
            cell.outputs = [o for k, o in outputs if _clean_output(o, f"T_{number:02d}{k:02d}") is not None]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    return notebook


def _clean_output(output, table):
    output.pop("transient", None)
    data = output.get("data")
    if data is not None:
        output.metadata = nbformat.NotebookNode()
        # The live display of a training leaves one line, with its seconds: nothing for the stored notebook.
        if set(data) <= {"text/html", "text/plain"} and " steps in " in data.get("text/html", ""):
            return None
        if data.get("text/html") == "" or 'class="drs-stored"' in data.get("text/html", ""):
            return None
        # A reader without a kernel has no use for a widget's number; a lab's bundle holds its picture too.
        data.pop(WIDGET, None)
        if "image/png" in data and data.get("text/plain", "<").startswith("<"):
            data["text/plain"] = "<Figure>"
        if "pandas.io.formats.style.Styler" in data.get("text/plain", ""):
            # A styled table is named at random.
            data["text/plain"] = "<Styler>"
            data["text/html"] = re.sub(r"\bT_[0-9a-f]{5}(?![0-9a-f])", table, data["text/html"])
    return output


def run(path):
    """Execute a notebook in its folder and write it back with its outputs."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    _write(clean(notebook), path)
    print(f"{path.name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def _write(notebook, path):
    nbformat.validate(notebook)
    write_text(path, nbformat.writes(notebook) + "\n")


def new(path):
    """Write a notebook after the template."""
    if path.exists():
        raise SystemExit(f"{path} is already there.")
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [make["code" if kind == "parameters" else kind](text) for kind, text in TEMPLATE]
    for cell, (kind, _) in zip(cells, TEMPLATE, strict=True):
        if kind == "parameters":
            cell.metadata["tags"] = ["parameters"]
    _write(clean(nbformat.v4.new_notebook(cells=cells)), path)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python tools/notebooks.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "clean", "new"))
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of notebooks/")
    options = parser.parse_args(arguments)
    files = options.files or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not files:
        parser.error(f"there is no notebook in {NOTEBOOKS}")
    failed = []
    for path in files:
        if options.command == "new":
            new(path)
        elif options.command == "clean":
            _write(clean(nbformat.read(path, as_version=4)), path)
        else:
            try:
                run(path)
            except Exception as error:  # whatever a cell raises; the next notebook may well run
                print(f"{path.name}: {error}", file=sys.stderr)
                failed.append(path.name)
    if failed:
        print(f"failed, and left as they were: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
