"""The notebooks as files: executed in order, complete, small, linked, on the template, and able to fail.

That they run is tested by running them: pytest collects ``notebooks/`` too, see ``conftest.py``.
"""

import ast
import base64
import io
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import scripts
from PIL import Image

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in FILES if re.match(r"\d\d_", path.name)]
NAMES = (
    "00_start_here",
    "01_cam_observation",
    "02_drs_module",
    "03_controller_ablation",
    "04_layer_ablation",
    "05_refinement",
    "06_deeplab",
    "07_what_came_after",
)
MARK = "NBVAL_CHECK_OUTPUT"
LARGEST = 1_500_000  # bytes of one notebook with its outputs
LONGEST_CELL = 20  # lines: what fits on a slide
tool = scripts.load("tools/notebooks.py")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def plain_text(output):
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def test_the_course_is_complete():
    assert tuple(path.stem for path in LESSONS) == NAMES


def test_executed_in_order_no_output_is_missing_and_none_is_a_warning(notebook):
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == number
        statements = ast.parse(re.sub(r"^[%!].*$", "pass", cell.source, flags=re.M)).body
        shows = bool(statements) and isinstance(statements[-1], ast.Expr) and cell.source.rstrip()[-1] != ";"
        assert cell.outputs or not shows, cell.source
        assert not {"error", "stderr"} & {o.get("name", o.output_type) for o in cell.outputs}, cell.source


def test_marked_cells_have_outputs_that_can_be_compared(notebook, path):
    cells = [cell for cell in code_cells(notebook) if MARK in cell.source]
    assert len(cells) >= (4 if path in LESSONS else 1)
    for cell in cells:
        text = "".join(map(plain_text, cell.outputs))
        assert text.strip(), cell.source
        assert not re.search(r"0x[0-9a-f]{6,}|/tmp/|/home/", text), "differs on every machine"
        assert not re.search(r"\d\.\d{7,}", text), f"too many digits to be the same everywhere: {text}"


def test_cells_fit_on_a_slide(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert max(lengths) <= LONGEST_CELL
    assert statistics.median(lengths) <= 8
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 40, cell.source[:80]


def test_small_and_without_what_changes_from_run_to_run(notebook, path):
    assert path.stat().st_size <= LARGEST
    cleaned = tool.clean(nbformat.read(path, as_version=4))
    same = nbformat.writes(cleaned) + "\n" == path.read_text(encoding="utf-8")
    assert same, "run 'python tools/notebooks.py clean'"
    for cell in code_cells(notebook):
        for output in cell.outputs:
            png = output.get("data", {}).get("image/png")
            if png:
                with Image.open(io.BytesIO(base64.b64decode(png))) as image:
                    assert image.width <= 1600, cell.source


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_one_template(path):
    notebook = nbformat.read(path, as_version=4)
    number = int(path.name[:2])
    first = notebook.cells[0].source
    assert first.startswith(f"# {path.name[:2]} ") and "You will learn" in first and "Time and needs" in first
    headings = re.findall(r"^## (.+)$", prose(notebook), re.M)
    for wanted in ("The idea", "Try it", "What to notice", "Exercises", "Summary"):
        assert any(wanted in heading for heading in headings), wanted
    parameters = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assigned = [line.split(" = ")[0] for line in parameters[0].source.splitlines()]
    assert assigned == ["DATA", "BUDGET", "VOC_ROOT"]
    exercises = prose(notebook).split("## Exercises")[1].split("\n## ")[0]
    assert 3 <= len(re.findall(r"^(?:###|\d+\.|\*\*\d+) ?", exercises, re.M)) <= 6
    if number < 7:
        assert f"({NAMES[number + 1]}.ipynb)" in prose(notebook)


def test_links_and_pictures_resolve(notebook, path):
    for link in re.findall(r"\]\(([^)\s]+)", prose(notebook)):
        if not re.match(r"https?://|#|attachment:", link):
            assert (path.parent / link.split("#")[0]).exists(), link


def test_nothing_is_left_to_fill_in(notebook):
    texts = [cell.source for cell in notebook.cells]
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    texts += [str({k: v for k, v in o.get("data", o).items() if "image" not in k}) for o in outputs]
    for token in ("@@", "TODO", "FIXME", "XXX", "widget-view", str(ROOT)):
        assert not [text for text in texts if token in text], token


def test_an_altered_number_fails(tmp_path):
    """Two real marked cells of 02, and what they need: nbval accepts the first and, a digit of its output
    altered, refuses the second."""
    source = nbformat.read(ROOT / "notebooks" / "02_drs_module.ipynb", as_version=4)
    cells = code_cells(source)
    with_numbers = [cell for cell in cells if MARK in cell.source and re.search(r"\d", str(cell.outputs))]
    cells = cells[: cells.index(with_numbers[1]) + 1]
    last = cells[-1].outputs[0]
    altered = re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), plain_text(last), count=1)
    if "text" in last:
        last.text = altered
    else:
        last.data["text/plain"] = altered
    small = nbformat.v4.new_notebook(cells=cells, metadata=source.metadata)
    nbformat.write(small, tmp_path / "altered.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q"]
    command += ["-p", "no:cacheprovider", "altered.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1 and f"1 failed, {len(cells) - 1} passed" in result.stdout, result.stdout


def test_a_failing_cell_leaves_the_notebook_as_it_was(tmp_path, capsys):
    path = tmp_path / "broken.ipynb"
    cells = [nbformat.v4.new_code_cell(code) for code in ("x = 1", "raise RuntimeError('on purpose')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    assert tool.main(["run", str(path)]) == 1
    assert path.read_bytes() == before and "on purpose" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_stores_outputs_and_nothing_volatile(tmp_path, capsys):
    path = tmp_path / "small.ipynb"
    tool.main(["new", str(path)])
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    live = "from IPython.display import HTML, display\nhandle = display(HTML(''), display_id=True)\n"
    code[-1].source = live + "40 + 2"
    nbformat.write(notebook, path)
    assert tool.main(["run", str(path)]) == 0
    first = path.read_bytes()
    assert tool.main(["run", str(path)]) == 0
    assert path.read_bytes() == first
    assert capsys.readouterr().out.count("small.ipynb") == 2
    outputs = code_cells(nbformat.read(path, as_version=4))[-1].outputs
    assert [o.data["text/plain"] for o in outputs if o.output_type == "execute_result"] == ["42"]
    with pytest.raises(SystemExit, match="already there"):
        tool.main(["new", str(path)])
