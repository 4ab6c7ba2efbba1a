"""How quickly the labs answer, in the kernel and in the browser, and what 2,000 moves leave in memory.

    python benchmarks/labs.py
    python benchmarks/labs.py --parts kernel --moves 50 --json labs.json

kernel: from the change of a control to the picture's new bytes, with the pause in which a lab collects
changes.
browser: from the key's event in the page to the new picture, decoded, in JupyterLab and Chromium on this
machine; one move at a time. The baseline, in the same page, is a bare slider whose value the kernel writes
into a label.
memory: of the kernel and the page, before and after 2,000 moves of a lab without a pause.

The networks come from the run store; what is not in it is trained first. The browser's parts need what
tests/browser needs. benchmarks/results/labs.json is such a run, on the processor that it names.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import processor

from drs_course.labs import CueLab
from drs_course.paper import Configuration
from drs_course.stages import Pipeline
from drs_course.store import RunStore, course_store
from drs_lib.crf import available
from drs_lib.files import write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import serving  # noqa: E402
from browser.pages import MAIN, LabOnPage, Notebook, write_notebook  # noqa: E402

BASELINE = "bare label"
BASELINE_CELL = f"""import ipywidgets
from IPython.display import display
bare = ipywidgets.IntSlider(50, 0, 100, description={BASELINE!r})
shown = ipywidgets.Label("50")
shown.add_class("bare-label")
bare.observe(lambda change: setattr(shown, "value", str(change["new"])), "value")
display(bare, shown)"""
# Arms a stop watch: it starts with the next key and stops when the element's picture or text is another.
WATCH = """(element, patience) => {
    let begun;
    const start = event => { begun = event.timeStamp; };
    addEventListener("keydown", start, {capture: true, once: true});
    window.drsTime = new Promise(done => {
        const observer = new MutationObserver(async () => {
            observer.disconnect();
            if (element.decode) await element.decode().catch(() => element.decode());
            done(performance.now() - begun);
        });
        observer.observe(element, {
            attributes: true, attributeFilter: ["src"], childList: true, characterData: true, subtree: true,
        });
        setTimeout(() => { observer.disconnect(); done(null); }, patience);
    });
}"""


def main():
    options = arguments()
    budget = options.budget
    store = RunStore(options.store or course_store())
    pipeline = Pipeline("critters", budget, store=store)
    for configuration in (Configuration(drs_layers=()), Configuration()):
        pipeline.classifier(configuration)
    rows, memory = [], None
    print(f"{processor()}, {os.cpu_count()} processors, budget {budget!r}")
    if "kernel" in options.parts:
        rows += report("in the kernel", kernel_rows(pipeline, options.moves))
    if {"browser", "memory"} & set(options.parts):
        if serving.missing():
            sys.exit(serving.missing())
        found, memory = asyncio_free(in_browser, store.root, options)
        rows += report("in the browser", found)
        if memory:
            print_memory(memory)
    if options.json:
        conditions = {"processor": processor(), "cpus": os.cpu_count(), "budget": budget}
        write_text(options.json, json.dumps({**conditions, "rows": rows, "memory": memory}, indent=2) + "\n")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("kernel", "browser", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--moves", type=int, default=200, help="of each slider in the kernel")
    parser.add_argument("--keys", type=int, default=100, help="moves of each slider in the browser")
    parser.add_argument("--memory-moves", type=int, default=2000, help="of each lab")
    parser.add_argument("--budget", default="laptop")
    parser.add_argument("--store", type=Path, help="run store (default: $DRS_STORE, else the course's runs)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def summary(lab, control, milliseconds):
    return {
        "lab": lab,
        "control": control,
        "moves": len(milliseconds),
        "median_ms": round(statistics.median(milliseconds), 1),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 1),
    }


def report(where, rows):
    if not rows:
        return []
    print(f"\n{where:32s}{'control':18s}{'moves':>6s}{'median ms':>11s}{'95 % ms':>9s}{'to label':>10s}")
    for row in rows:
        ratio = f"{row['ratio']:10.2f}" if "ratio" in row else ""
        print(
            f"{row['lab']:32s}{row['control']:18s}{row['moves']:6d}{row['median_ms']:11.1f}"
            f"{row['p95_ms']:9.1f}{ratio}"
        )
    return [{"where": where, **row} for row in rows]


def kernel_rows(pipeline, moves):
    rows = []
    for kind, main in MAIN.items():
        lab = kind(pipeline)
        for control in dict.fromkeys((main, "image")):
            times = asyncio.run(kernel_times(lab, control, moves))
            rows.append(summary(kind.title, control, times))
        if kind is CueLab and available():
            lab.set(crf=True)
            rows.append(summary(kind.title, "CRF", asyncio.run(kernel_times(lab, main, moves))))
        lab.close()
    return rows


async def kernel_times(lab, control, moves):
    """Milliseconds of each move of a control to a random other value."""
    control = lab.controls[control]
    rng, times = np.random.default_rng(0), []
    for number in range(-5, moves):  # the first ones load and compile
        count = round((control.max - control.min) / control.step) + 1
        values = [control.min + control.step * k for k in range(count)]
        value = rng.choice([v for v in values if abs(v - control.value) > control.step / 2]).item()
        before, begun = lab.drawings, time.perf_counter()
        control.value = value
        while lab.drawings == before:
            await asyncio.sleep(0)
        if number >= 0:
            times.append(1000 * (time.perf_counter() - begun))
    return times


def asyncio_free(function, *args):
    """Calls a function in a thread of its own: Playwright refuses one in which an event loop has been set."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def in_browser(store, options):
    """The rows of the browser and the memory's figures (None if not asked for)."""
    with tempfile.TemporaryDirectory() as folder, serving.chromium("--enable-precise-memory-info") as browser:
        pages = Path(folder, "pages")
        pages.mkdir()
        names = [kind.__name__ for kind in MAIN]
        write_notebook(
            pages / "labs.ipynb",
            f"from drs_course.notebook import open_course\nfrom drs_course.labs import {', '.join(names)}\n"
            "pipeline = open_course()",
            *(f"{name.lower()} = {name}(pipeline)\n{name.lower()}" for name in names),
            BASELINE_CELL,
        )
        with serving.jupyterlab(Path(folder, "jupyter"), pages, store.resolve(), options.budget) as server:
            notebook = Notebook(browser, server, "labs.ipynb")
            notebook.run_all(len(MAIN))
            rows = browser_rows(notebook.page, options.keys) if "browser" in options.parts else []
            memory = measure_memory(notebook, options.memory_moves) if "memory" in options.parts else None
            notebook.close()
    return rows, memory


def browser_rows(page, keys):
    bare = page.locator(".widget-slider", has=page.get_by_text(BASELINE, exact=True)).get_by_role("slider")
    rows = [summary(BASELINE, "", key_times(page, bare, page.locator(".bare-label"), keys))]
    for kind, control in MAIN.items():
        lab = LabOnPage(page, kind.title)
        handle = lab.handle(labels(kind)[control])
        rows.append(summary(kind.title, control, key_times(page, handle, lab.root.locator("img"), keys)))
    for row in rows:
        row["ratio"] = round(row["median_ms"] / rows[0]["median_ms"], 2)
    return rows


def key_times(page, handle, shows, keys):
    """Milliseconds from each key to what it shows. Keys that change nothing are left out."""
    handle.scroll_into_view_if_needed()
    handle.focus()
    times = []
    for number in range(-4, keys):
        shows.evaluate(WATCH, 1500)
        page.keyboard.press("ArrowRight" if number % 50 < 25 else "ArrowLeft")
        milliseconds = page.evaluate("window.drsTime")
        if number >= 0 and milliseconds is not None:
            times.append(milliseconds)
    return times


def labels(kind):
    """The labels of a lab's main sliders as they stand on the page."""
    return {"delta": "δ", "alpha": "threshold α", "image": "image"}


def measure_memory(notebook, moves):
    """Kernel and page before and after so many moves of each lab, without a pause between them.

    The lab's cell is JupyterLab's active one before the first look: JupyterLab itself keeps something of
    every change from one cell to another.
    """
    kernel, rows = notebook.kernel(), []
    for kind, control in MAIN.items():
        lab, label = LabOnPage(notebook.page, kind.title), labels(kind)[control]
        press(lab, label, 40)
        before = memory_now(notebook.page, kernel)
        press(lab, label, moves)
        after = memory_now(notebook.page, kernel)
        rows.append({"lab": kind.title, "moves": moves, "before": before, "after": after})
    kernel.close()
    return rows


def press(lab, label, moves):
    """Moves in bursts of 20, there and back, after each of which the page has caught up."""
    for burst in range(max(1, moves // 20)):
        before = lab.settled_picture()
        lab.press(label, "ArrowLeft" if burst % 2 else "ArrowRight", 20)
        lab.changes_from(before)


def memory_now(page, kernel):
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    for _ in range(2):
        session.send("HeapProfiler.collectGarbage")
    found = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    kernel.run("import gc; gc.collect()")
    return {
        "kernel_rss_mb": round(kernel.ask("__import__('psutil').Process().memory_info().rss") / 1e6, 1),
        "page_heap_mb": round(found["JSHeapUsedSize"] / 1e6, 1),
        "page_nodes": int(found["Nodes"]),
        "page_elements": page.evaluate("document.getElementsByTagName('*').length"),
        "page_listeners": int(found["JSEventListeners"]),
    }


def print_memory(rows):
    print(
        f"\n{'memory, before and after':32s}{'moves':>6s}"
        + "".join(f"{name:>20s}" for name in rows[0]["before"])
    )
    for row in rows:
        values = [f"{value:g} {row['after'][name]:g}" for name, value in row["before"].items()]
        print(f"{row['lab']:32s}{row['moves']:6d}" + "".join(f"{value:>20s}" for value in values))


if __name__ == "__main__":
    main()
