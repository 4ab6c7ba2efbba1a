"""What a newcomer waits for: the imports, and the way from `git clone` to the first DRS map on the screen.

    python benchmarks/first_map.py
    python benchmarks/first_map.py --parts imports
    python benchmarks/first_map.py --python python3.12 --json first_map.json

imports: seconds for torch, the baseline, and then for drs_lib; in a fresh process each time.
first map: clone this checkout into an empty folder, make the environment, and run the notebook 02 from its
top, with an empty run store, until a map of a network that was trained with DRS stands below a cell. Its
download depends on the network, and the part for the environment with it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import processor

from drs_lib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = """
import time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import drs_lib
times.append(time.perf_counter())
print(*[after - before for before, after in zip(times, times[1:])])
"""
NOTEBOOK, HEADING = "02_drs_module", "A real feature map in profile"
# Runs a notebook from its top, in its folder, until a picture of a map stands below a cell of a section.
FIRST_MAP = f"""
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read("{NOTEBOOK}.ipynb", as_version=4)
client = NotebookClient(notebook, timeout=3600, kernel_name="python3")
inside = False
with client.setup_kernel():
    for index, cell in enumerate(notebook.cells):
        inside = inside or cell.source.startswith("## {HEADING}")
        if cell.cell_type == "code":
            cell.outputs = []
            client.execute_cell(cell, index)
            after = notebook.cells[index + 1].source
            if inside and after.startswith("*Figure: the image, and the map"):
                assert any("image/png" in output.get("data", {{}}) for output in cell.outputs)
                break
    else:
        raise SystemExit("no cell of '{HEADING}' showed the map: has the notebook or its caption changed?")
"""


def main():
    options = arguments()
    result = {"processor": processor(), "cores": os.cpu_count()}
    result["python"] = platform.python_version()
    print(f"{result['cores']} processors, Python {result['python']}")
    if "imports" in options.parts:
        result["imports"] = imports(options.repeats)
        torch = result["imports"]["torch"]
        for name, seconds in result["imports"].items():
            print(f"import {name:24} {seconds:6.2f} s, {seconds / torch:5.2f} of torch's")
    if "first map" in options.parts:
        result["first_map"] = first_map(options.python)
        total = sum(result["first_map"].values())
        for name, seconds in result["first_map"].items():
            print(f"{name:31} {seconds:6.0f} s, {100 * seconds / total:3.0f} %")
        print(f"{'from git clone to the first map':31} {total:6.0f} s")
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")


def imports(repeats):
    """Median seconds over fresh processes."""
    rows = []
    for _ in range(repeats + 1):  # the first fills the file cache
        run = subprocess.run(
            [sys.executable, "-c", IMPORTS],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append([float(value) for value in run.stdout.split()])
    torch, library = map(statistics.median, zip(*rows[1:], strict=True))
    return {"torch": torch, "drs_lib": library}


def first_map(python):
    """Seconds of each step."""
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "drs-course"
        interpreter = clone / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        commands = {
            "git clone": (folder, ["git", "clone", "-q", str(ROOT), str(clone)]),
            "make env": (clone, ["make", "env", *([f"PYTHON={python}"] if python else [])]),
            "notebook 02 to the first map": (clone / "notebooks", [str(interpreter), "-c", FIRST_MAP]),
        }
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("DRS_", "MAKE", "MFLAGS"))}
        for name, (where, command) in commands.items():
            began = time.perf_counter()
            run = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
            steps[name] = time.perf_counter() - began
            if run.returncode:
                raise SystemExit(f"{name} failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return steps


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=("imports", "first map"), default=["imports", "first map"]
    )
    parser.add_argument("--repeats", type=int, default=5, help="processes that import (default 5)")
    parser.add_argument("--python", help="the Python to make the environment with (default: make's choice)")
    parser.add_argument("--json", type=Path, help="also write the seconds there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
