"""The handout: blanks where solutions were, nothing else lost, nothing told, and a folder that works."""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest
import scripts
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))

SQUARE = '''\
def square(x):
    """x times itself."""
    # Hint: multiply,
    # or use the "power".
    ### BEGIN SOLUTION
    secret_result_of_square = x * x
    return secret_result_of_square
    ### END SOLUTION
square(3)
'''
CHECK = 'verdict = drs_course.checks.square(square)\nprint(verdict)\nassert verdict == "correct"'
TWICE = """\
values = [1, 2]
for v in values:
    # Hint: add
    ### BEGIN SOLUTION
    twice_the_value_of_it = v + v
    ### END SOLUTION
print("between")
### BEGIN SOLUTION
total_of_all_the_values = sum(values)
### END SOLUTION
done = True"""
ANSWER = """\
Why?

<!-- ### BEGIN SOLUTION -->
Because the maximum bounds every position of the map.
<!-- ### END SOLUTION -->

(Two sentences.)"""
OPENING = """\
%matplotlib inline
import types, drs_course
drs_course.checks = types.SimpleNamespace(square=lambda f: "correct" if f(3) == 9 else "wrong")
print("opened")"""


@pytest.fixture(scope="module")
def tool():
    return scripts.load("tools/handout.py")


def code(source, tags=(), text=None):
    cell = nbformat.v4.new_code_cell(source, execution_count=7)
    if tags:
        cell.metadata["tags"] = list(tags)
    if text is not None:
        cell.outputs = [
            nbformat.v4.new_output("stream", text=text),
            nbformat.v4.new_output("execute_result", {"text/plain": text}, execution_count=7),
        ]
    return cell


def notebook(*cells):
    cells = [nbformat.v4.new_markdown_cell(c) if isinstance(c, str) else copy.deepcopy(c) for c in cells]
    for k, cell in enumerate(cells):
        cell["id"] = f"cell-{k:02d}"
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    made.nbformat_minor = 5
    return made


def small():
    return notebook(
        "# 02 Small\n\n[The page](../docs/voc.md#top), ![picture](../figures/x.png), [03](03_next.ipynb).",
        code(OPENING, text="opened\n"),
        "## Exercises\n\n**1. Write** a square.",
        code(SQUARE, text="solved\n"),
        code(CHECK, tags=["check", "points-3"], text="correct\n"),
        "2. **Write** more.\n\n```\n# A comment, not a heading.\n```",
        code(TWICE, text="between\n"),
        ANSWER,
        "## Summary\n\n1. Not an exercise.",
        code("len('kept')", text="4"),
    )


def convert(tool, made, **settings):
    return tool.convert(nbformat.writes(made), "02_small.ipynb", **settings)


def test_a_region_becomes_a_blank_and_the_rest_stays(tool):
    made = small()
    student = convert(tool, made).student
    square, twice, answer = (student.cells[k].source for k in (3, 6, 7))
    message = 'Exercise 1: your code here. Hint: multiply, or use the \\"power\\".'
    blank = f'    raise NotImplementedError("{message}")\nsquare(3)\n'
    assert square == SQUARE[: SQUARE.index("    ### BEGIN")] + blank
    with pytest.raises(NotImplementedError, match='^Exercise 1: your code here. Hint: .* use the "power".$'):
        exec(square, {})
    assert twice.split("\n") == [
        "values = [1, 2]",
        "for v in values:",
        "    # Hint: add",
        '    raise NotImplementedError("Exercise 2: your code here. Hint: add")',
        'print("between")',
        'raise NotImplementedError("Exercise 2: your code here. Hint: add")',
        "done = True",
    ]
    assert answer == "Why?\n\n*Your answer here.*\n\n(Two sentences.)"
    for k in (0, 1, 2, 4, 5, 8, 9):
        assert student.cells[k].source == made.cells[k].source
    assert [cell.id for cell in student.cells] == [cell.id for cell in made.cells]
    assert student.metadata == made.metadata
    nbformat.validate(student)


def test_a_long_hint_is_broken_between_words(tool):
    hint = "torch.where(a < b, a, b) " * 12
    cell = code(f"if 1:\n    # Hint: {hint}\n    ### BEGIN SOLUTION\n    x = 1\n    ### END SOLUTION")
    source = convert(tool, notebook("### Exercise 9 Long", cell)).student.cells[1].source
    assert max(map(len, source.split("\n")[2:])) <= 100
    with pytest.raises(NotImplementedError) as error:
        exec(source, {})
    assert str(error.value) == f"Exercise 9: your code here. Hint: {hint.strip()}"


def test_outputs_of_exercises_go_and_the_others_stay(tool):
    made = small()
    student = convert(tool, made).student
    for k in (3, 4, 6):
        assert student.cells[k].outputs == []
    for k in (1, 9):
        stream, result = student.cells[k].outputs
        assert stream == made.cells[k].outputs[0] and result.data == made.cells[k].outputs[1].data
        assert result.execution_count is None
    assert {cell.execution_count for cell in student.cells if cell.cell_type == "code"} == {None}
    cleared = convert(tool, made, clear_outputs=True).student
    assert not [cell for cell in cleared.cells if cell.get("outputs")]


def test_nbgrader_finds_its_metadata(tool):
    handed = convert(tool, small())
    common = {"schema_version": 3, "task": False}
    by_hand = {"grade": True, "solution": True, "locked": False, "points": 1, **common}
    wanted = {
        3: {"grade": False, "solution": True, "locked": False, "grade_id": "exercise-1", **common},
        4: {"grade": True, "solution": False, "locked": True, "grade_id": "check-1", "points": 3, **common},
        6: {"grade_id": "exercise-2", **by_hand},
        7: {"grade_id": "exercise-2-b", **by_hand},
    }
    for version in (handed.student, handed.source):
        found = {k: c.metadata.nbgrader for k, c in enumerate(version.cells) if "nbgrader" in c.metadata}
        assert found == wanted
    assert handed.student.cells[4].metadata["editable"] is False
    assert handed.student.cells[4].metadata["tags"] == ["check", "points-3"]
    assert [cell.source for cell in handed.source.cells] == [cell.source for cell in small().cells]
    assert (handed.exercises, handed.blanks, handed.checks) == (["Exercise 1", "Exercise 2"], 4, 1)


REGION = "### BEGIN SOLUTION\nx = 1\n### END SOLUTION"
HINTED = "# Hint: one\n" + REGION
UNCALLED = SQUARE.removesuffix("square(3)\n")
CAUGHT = """\
try:
    # Hint: a
    ### BEGIN SOLUTION
    x = 1
    ### END SOLUTION
except (ValueError, Exception):
    pass"""


@pytest.mark.parametrize(
    ("cells", "cell", "line", "message"),
    [
        ([code("# Hint: a\n### BEGIN SOLUTION\nx = 1")], 1, 2, "without an END SOLUTION"),
        ([code("x = 1\n### END SOLUTION")], 1, 2, "without a BEGIN SOLUTION"),
        (["Text\n### END SOLUTION"], 1, 2, "without a BEGIN SOLUTION"),
        ([code("### BEGIN SOLUTION\n" + REGION)], 1, 2, "inside the one of line 1"),
        ([code("x = 0\n" + REGION)], 1, 2, "Exercise 1 has no hint"),
        ([code("# Hint: far\n\n" + REGION)], 1, 3, "Exercise 1 has no hint"),
        ([code("# Hint: a\n### BEGIN SOLUTION\n# x\n\n### END SOLUTION")], 1, 2, "holds no statement"),
        (["### BEGIN SOLUTION\n\n### END SOLUTION"], 1, 1, "holds no text"),
        ([code("# Hint: a\n## BEGIN SOLUTION\nx = 1")], 1, 2, "'## BEGIN SOLUTION' is no delimiter"),
        ([code("# Hint: a\nx = 1  ### BEGIN SOLUTION")], 1, 2, "is no delimiter"),
        ([code("# Hint: a\n# Begin solution\nx = 1")], 1, 2, "is no delimiter"),
        ([code("### BEGIN HIDDEN TESTS\nx = 1")], 1, 1, "is no delimiter"),
        ([code("x = 1\ny = (")], 1, 2, "does not compile"),
        ([code("y = (\n# Hint: a\n### BEGIN SOLUTION\n1\n### END SOLUTION\n)")], 1, 3, "solution blank"),
        ([code("# Hint: a\n### BEGIN SOLUTION\nif 1:\n### END SOLUTION\n    x = 1")], 1, 2, "solution blank"),
        ([code(f'y = """\n{HINTED}\n"""')], 1, 3, "would not raise"),
        ([code("%%time\n" + HINTED)], 1, 3, "would not raise"),
        ([code(HINTED, tags=["raises-exception"])], 1, 2, "'raises-exception'"),
        ([code(CAUGHT)], 1, 3, "catches NotImplementedError"),
        ([code(UNCALLED), code("print(1)")], 1, 5, "not stop at the blank in 'square'"),
        ([code(UNCALLED), code(CHECK, tags=["check"]), code("square(1)")], 1, 5, "before a check does"),
        ([code(UNCALLED + "drs_course.checks.square(square)")], 1, 5, "not stop at the blank in 'square'"),
        (["## Summary", code(HINTED)], 2, 2, "belongs to no exercise"),
        (["**1. Again.**"], 1, 1, "Exercise 1 is in this notebook twice"),
        ([code("drs_course.checks.a(1)\nassert 1")], 1, 1, "not tagged 'check'"),
        ([code("from drs_course.checks import a as b\nb(1)")], 1, 1, "not tagged 'check'"),
        ([code("assert 1", tags=["check"])], 1, 1, "calls nothing of drs_course.checks"),
        ([code("drs_course.checks.a(1)", tags=["check"])], 1, 1, "can't fail"),
        ([code(HINTED, tags=["check"])], 1, 1, "split the cell"),
        (["## Summary", code(CHECK, tags=["check"])], 2, 1, "belongs to no exercise"),
        ([code(HINTED, tags=["points-x"])], 1, 1, "expected one such as 'points-3'"),
        ([code("y = 1\n" + HINTED, tags=["points-2"]), code(CHECK, tags=["check"])], 1, 1, "check has the"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_place(tool, cells, cell, line, message):
    with pytest.raises(tool.HandoutError) as error:
        convert(tool, notebook("## Exercises\n\n**1. Write.**", *cells))
    place, _, rest = str(error.value).partition(": ")
    assert place == f"02_small.ipynb, cell 'cell-{cell:02d}' ({cell + 1} of {len(cells) + 1}), line {line}"
    assert message in rest


def test_files_that_are_no_good_notebooks_are_refused(tool):
    made = json.loads(nbformat.writes(small()))
    made["cells"][4]["id"] = "cell-03"
    with pytest.raises(tool.HandoutError, match=r"02.ipynb, cell 'cell-03' \(5 of 10\), line 1: cell 4 has"):
        tool.convert(json.dumps(made), "02.ipynb")
    made["nbformat_minor"] = 4
    with pytest.raises(tool.HandoutError, match="02.ipynb has nbformat 4.4, and 4.5 is expected"):
        tool.convert(json.dumps(made), "02.ipynb")
    with pytest.raises(tool.HandoutError, match="02.ipynb is no notebook"):
        tool.convert("{", "02.ipynb")


def test_a_function_may_be_called_in_a_later_cell(tool):
    cells = [code(UNCALLED), code("list(map(square, [1]))"), code(CHECK, tags=["check"])]
    assert convert(tool, notebook("### Exercise 1", *cells)).blanks == 1


def test_a_blank_in_a_class_may_be_used_later(tool):
    cell = code(
        "class A:\n  def f(self):\n    # Hint: a\n    ### BEGIN SOLUTION\n    x = 1\n    ### END SOLUTION"
    )
    handed = convert(tool, notebook("## Open projects", "**1. Go.**", cell, code("A().f()")))
    assert handed.exercises == ["Project 1"] and handed.blanks == 1
    assert handed.source.cells[2].metadata.nbgrader.grade_id == "project-1"


def test_an_exercise_in_the_text_has_a_letter_and_ends_at_the_next_heading(tool):
    below = code("len('kept')", text="4")
    handed = convert(
        tool, notebook("## The idea", "**Exercise A. Write** it.", code(SQUARE), "### Next", below)
    )
    assert handed.exercises == ["Exercise A"]
    assert handed.source.cells[2].metadata.nbgrader.grade_id == "exercise-a"
    assert handed.student.cells[2].source.count("Exercise A: your code here.") == 1
    assert handed.student.cells[4].outputs


def test_marks_for_the_tests_are_not_the_student_s(tool):
    marked = code("# NBVAL_CHECK_OUTPUT\nprint('# NBVAL_CHECK_OUTPUT')")
    handed = convert(tool, notebook("## The idea", marked))
    assert handed.student.cells[1].source == "print('# NBVAL_CHECK_OUTPUT')"
    assert handed.source.cells[1].source == handed.student.cells[1].source


def test_solutions_are_folded_and_blanks_are_not(tool):
    made = scripts.load("tools/notebooks.py").clean(small())
    folded = [k for k, cell in enumerate(made.cells) if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert folded == [3, 6, 7]
    handed = convert(tool, made)
    assert not [c for c in (*handed.student.cells, *handed.source.cells) if "jupyter" in c.metadata]


# The folder and the zip, of a small course under git.


@pytest.fixture
def course(tmp_path, tool):
    root = tmp_path / "course"
    files = dict.fromkeys(tool.FILES, "x\n")
    files |= {
        "docs/voc.md": "# VOC\n",
        "docs/teaching.md": "answers\n",
        "figures/x.png": "picture",
        "figures/y.png": "another",
        "drs_course/__init__.py": "",
        "drs_lib/__init__.py": "",
        "drs_lib/shipped/mini.safetensors": "weights",
        "tests/course/test_solutions.py": "secret_result_of_square = 1",
        "tools/handout.py": "",
        tool.STUDENTS_README: "for students\n",
        ".gitignore": "/handout/\n/runs/\n",
        "notebooks/02_small.ipynb": nbformat.writes(small()),
        "notebooks/03_next.ipynb": nbformat.writes(notebook("# 03 Next")),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    run_git(root, "init", "-q")
    run_git(root, "add", "-A")
    (root / "drs_lib" / "private.py").write_text("untracked")
    (root / "runs").mkdir()
    return root


def run_git(root, *arguments):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    subprocess.run(["git", *arguments], cwd=root, check=True)


def names(path):
    with zipfile.ZipFile(path) as archive:
        return {name.removeprefix("drs-course/") for name in archive.namelist()}


def rewrite(course, change):
    made = small()
    change(made)
    (course / "notebooks" / "02_small.ipynb").write_text(nbformat.writes(made), encoding="utf-8")


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_and_the_zip(tool, course):
    tool.handout(course)
    out = course / "handout"
    both = {"02_small.ipynb", "03_next.ipynb"}
    linked = {"docs/voc.md", "figures/x.png"}
    assert everything(out) == {
        tool.ZIP,
        *linked,
        *(f"{folder}/{name}" for folder in ("notebooks", "solutions", "source/drs-course") for name in both),
        *(f"source/drs-course/{name}" for name in linked),
    }
    assert names(out / tool.ZIP) == {
        *tool.FILES,
        *linked,
        *(f"notebooks/{name}" for name in both),
        "figures/y.png",
        "drs_course/__init__.py",
        "drs_lib/__init__.py",
        "drs_lib/shipped/mini.safetensors",
    }
    instructor = course / "notebooks" / "02_small.ipynb"
    assert (out / "solutions" / instructor.name).read_text() == instructor.read_text()
    with zipfile.ZipFile(out / tool.ZIP) as archive:
        student = archive.read("drs-course/notebooks/02_small.ipynb")
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.namelist() == sorted(archive.namelist())
    assert student == (out / "notebooks" / instructor.name).read_bytes()
    source = nbformat.read(out / "source" / "drs-course" / instructor.name, as_version=4)
    assert "](docs/voc.md#top)" in source.cells[0].source and "](figures/x.png)" in source.cells[0].source


def test_the_same_files_give_the_same_bytes(tool, course, tmp_path):
    tool.handout(course)
    path = course / "handout" / tool.ZIP
    first = path.read_bytes()
    for file in (course / "README.md", course / "notebooks" / "02_small.ipynb"):
        os.utime(file, (1_600_000_000, 1_600_000_000))
    tool.handout(course, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / tool.ZIP).read_bytes() == first


def test_some_notebooks_and_again(tool, course):
    out = course / "handout"
    tool.handout(course)
    (out / "gradebook.db").write_text("nbgrader's")
    tool.handout(course, notebooks=["03"])
    for folder in ("notebooks", "solutions", "source/drs-course"):
        assert {path.name for path in (out / folder).glob("*.ipynb")} == {"03_next.ipynb"}
    assert "notebooks/02_small.ipynb" not in names(out / tool.ZIP)
    assert (out / "gradebook.db").exists()
    tool.handout(course, notebooks=["notebooks/02_small.ipynb", "03_next"])
    assert {path.name for path in (out / "solutions").iterdir()} == {"02_small.ipynb", "03_next.ipynb"}
    with pytest.raises(tool.HandoutError, match="found 0 notebooks for '04'.*: 02_small, 03_next"):
        tool.handout(course, notebooks=["04"])


SECRET = "    secret_result_of_square = x * x"


def leak_in_output(made):
    made.cells[1].outputs[0].text = f"def square(x):\n{SECRET}\n"


LEAKS = {
    "output": leak_in_output,
    "html": lambda made: made.cells[9].outputs[1].data.update({"text/html": f"<pre>{SECRET}</pre>"}),
    "metadata": lambda made: made.metadata.update(answers=[SECRET]),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_solution_that_would_leak_stops_the_handout(tool, course, leak):
    rewrite(course, leak)
    with pytest.raises(tool.HandoutError, match="02_small.ipynb, Exercise 1: .*secret_result_of_square = x"):
        tool.handout(course)
    assert not (course / "handout").exists()


def test_a_line_that_students_read_anyway_is_no_leak(tool, course):
    def change(made):
        leak_in_output(made)
        made.cells[9].source += f"\ndef other(x):\n{SECRET}"

    rewrite(course, change)
    tool.handout(course)


def test_links_that_break_are_refused(tool, course):
    def change(made):
        made.cells[5].source += "\n\n[Answers](../docs/teaching.md)"

    rewrite(course, change)
    with pytest.raises(
        tool.HandoutError, match=r"'cell-05' \(6 of 10\), line 7: .*teaching.md, which is kept"
    ):
        tool.handout(course)
    rewrite(course, lambda made: made.cells[0].update(source='<img src="../figures/z.png">'))
    with pytest.raises(tool.HandoutError, match=r"'cell-00' .*figures/z.png, which git does not list"):
        tool.handout(course)


def test_nothing_of_others_is_overwritten(tool, course, tmp_path):
    for out in (course, course / "notebooks", tmp_path):
        with pytest.raises(tool.HandoutError, match="holds files of the course"):
            tool.handout(course, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notebooks").mkdir()
    with pytest.raises(tool.HandoutError, match="is no handout"):
        tool.handout(course, tmp_path / "mine")
    (course / "LICENSE").unlink()
    with pytest.raises(tool.HandoutError, match="git lists LICENSE, and the file is not there"):
        tool.handout(course)
    shutil.rmtree(course / ".git")
    with pytest.raises(tool.HandoutError, match="git lists no files.*clone"):
        tool.handout(course)


def test_the_command_says_what_it_did(tool, course, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", course)
    assert tool.main(["--notebooks", "02", "--clear-outputs"]) == 0
    assert "02_small.ipynb: 2 exercises and projects, 4 blanks, 1 checks" in capsys.readouterr().out
    student = nbformat.read(course / "handout" / "notebooks" / "02_small.ipynb", as_version=4)
    assert not [cell for cell in student.cells if cell.get("outputs")]
    assert tool.main(["--notebooks", "99"]) == 1
    assert "handout: found 0 notebooks for '99'" in capsys.readouterr().err


# The course's own notebooks.


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_notebooks_convert_and_compile(tool, path):
    handed = tool.convert(path.read_text(encoding="utf-8"), path.name)
    assert bool(handed.exercises) == bool(re.match(r"\d\d_", path.name))
    nbformat.validate(handed.student)
    for cell in handed.student.cells:
        assert not re.search(r"(BEGIN|END) SOLUTION", cell.source)
        if cell.cell_type == "code":
            ast.parse(TransformerManager().transform_cell(cell.source))


@pytest.fixture(scope="module")
def real(tool, tmp_path_factory):
    """What students unpack, and the folder it came from."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the handout holds what git lists, and this is no clone")
    folder = tmp_path_factory.mktemp("handout")
    tool.handout(ROOT, folder / "out")
    with zipfile.ZipFile(folder / "out" / tool.ZIP) as archive:
        archive.extractall(folder / "student")
    return folder / "student" / "drs-course", folder / "out"


def test_no_solution_is_in_the_students_folder(real):
    student, _ = real
    assert not [
        name for name in everything(student) if re.match(r"tests/|solutions/|source/|\.|tools/h", name)
    ]
    solutions, outside = [], []
    for path in FILES:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            inside = False
            for line in "".join(cell["source"]).split("\n"):
                if "BEGIN SOLUTION" in line or "END SOLUTION" in line:
                    inside = "BEGIN" in line
                else:
                    (solutions if inside else outside).append(line.strip())
    files = [path for path in student.rglob("*") if path.is_file()]
    library = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md", ".toml")]
    elsewhere = "\n".join([*outside, *library])
    secret = {line for line in solutions if len(line) > 20 and line not in elsewhere}
    assert len(secret) > 300
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if path.suffix == ".ipynb":
            text += text.replace('\\"', '"').replace("\\\\", "\\")
        assert not [line for line in secret if line in text], path.name


def test_links_work_from_the_students_folders(real):
    for folder in (real[0] / "notebooks", real[1] / "notebooks", real[1] / "source" / "drs-course"):
        for path in folder.glob("*.ipynb"):
            for cell in nbformat.read(path, as_version=4).cells:
                if cell.cell_type == "markdown":
                    for link in re.findall(r"\]\(([^)\s]+)", cell.source):
                        if not re.match(r"https?://|#|attachment:", link):
                            assert (folder / link.split("#")[0]).exists(), f"{path}: {link}"


def test_the_students_readme_is_theirs(real):
    readme = (real[0] / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# drs-course, for students") and "teaching" not in readme
    for name in re.findall(r"`((?:notebooks/)?[\w-]+\.\w+)`", readme):
        assert (real[0] / name).is_file() or (real[0] / "notebooks" / name).is_file(), name
    assert not (real[0] / "tools" / "handout_readme.md").exists()


def test_run_all_stops_at_a_blank_of_the_students_notebook(real, tmp_path):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    path = real[0] / "notebooks" / "02_drs_module.ipynb"
    student = nbformat.read(path, as_version=4)
    client = NotebookClient(
        student, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    environment = os.environ | {"DRS_BUDGET": "ci", "DRS_STORE": str(tmp_path)}
    with pytest.raises(CellExecutionError) as error:
        client.execute(env=environment)
    assert error.value.ename == "NotImplementedError"
    assert error.value.evalue.startswith("Exercise A: your code here. Hint: ")


def test_the_students_makefile_names_only_what_works_there(real):
    text = (real[0] / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", text, re.M))
    assert {"lab", "lab-page", "course", "env", "crf", "help"} <= targets
    assert not {"handout", "slides", "site", "test", "bench"} & targets
    for name in re.findall(r"\b(?:tools|docs|benchmarks|notebooks)/[\w./]+\w", text):
        assert (real[0] / name).exists(), name
    whole = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(block in whole for block in text.split("\n\n"))


PACKAGES = ("drs_course/", "drs_lib/")


def test_the_students_library_is_whole(real):
    listed = subprocess.check_output(["git", "ls-files", *PACKAGES], cwd=ROOT, text=True).split()
    assert {name for name in everything(real[0]) if name.startswith(PACKAGES)} == set(listed)
