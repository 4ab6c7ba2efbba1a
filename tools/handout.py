"""Write what a class gets: student notebooks with blanks, the solutions apart, and a zip.

    python tools/handout.py [--notebooks 01 02] [--clear-outputs] [--out handout]

reads the notebooks of ``notebooks/``, the instructor's, and writes

* ``handout/drs-course-students.zip``: the student's folder, from which ``make lab`` works. Student
  notebooks, what they link to, figures, the library with its weights, and what makes the environment; all
  as git lists it, with a README of its own, ``tools/handout_readme.md``, and a shorter Makefile.
* ``handout/notebooks/``: the student notebooks, beside copies of the figures and pages that they link to.
* ``handout/solutions/``: the instructor's notebooks as they are.
* ``handout/source/drs-course/``: the instructor's notebooks for nbgrader, should you use it: with its
  metadata, and with what they link to beside them. In ``handout/``, ``nbgrader generate_assignment
  drs-course`` takes them.

Neither nbgrader nor otter is needed. Everything is checked before the first file is written; an error names
the notebook, the cell and the line.

The format of an exercise
-------------------------
An exercise starts a markdown cell: ``**2. Write.** ...`` or ``2. **Write** ...`` in a section whose ``##``
heading holds the word "Exercises" or "Projects", or, in any section, ``### Exercise 2 ...``, ``**Exercise
2. ...**`` or ``**Project 1. ...**``. A number (of exercises, of projects) occurs once in a notebook; those
that stand in the text before that section have a letter, ``**Exercise A. Write ...**``. All cells up to the
next exercise or the next heading of level 1 to 3 belong to it. They are of five kinds.

*Code to write.* What lies between the delimiters is the solution; the student gets a blank, and the rest as
it is::

    def suppress(x, delta):
        x = x.relu()
        # Hint: delta times the maximum bounds every value,
        # and torch.minimum broadcasts.
        ### BEGIN SOLUTION
        return torch.minimum(x, delta * x.amax((2, 3), keepdim=True))
        ### END SOLUTION

    suppress(torch.randn(1, 2, 3, 3), 0.5)

becomes ``raise NotImplementedError("Exercise 2: your code here. Hint: delta times ...")`` at the
indentation of the delimiter. A delimiter stands alone on its line. The hint is a comment directly above it,
over as many lines as it takes, and stays; of several regions in a cell the first must have one, and the
others repeat it or have their own. A region holds at least one statement, and the cell compiles with it and
without it: in a compound statement, the region is the whole of a body's end, not half an expression. "Run
All" stops at a blank on the top level. A blank in a function stops it where the function is called, so below
the region the cell calls it (or a later cell does, before a check, which would turn the message into
"Not yet: ..."). No ``except`` around a blank and no tag ``raises-exception`` may let it pass.

*Text to write.* A markdown cell with a region, here best as ``<!-- ### BEGIN SOLUTION -->``, ``<!-- ### END
SOLUTION -->``, which no page shows. The student reads "*Your answer here.*".

*A check.* A code cell with the tag ``check``, which calls ``drs_course.checks``, and has an ``assert`` (or
``raise``): whoever grades by machine gives the points to every cell that ends without an exception::

    verdict = checks.suppress(suppress)
    print(verdict)
    assert verdict.ok

*Code to run*, or a comment to work from, and *text to read*: all other cells stay as they are.

In the student's copy the code cells of exercises have no outputs (they would be the answers), all others
keep theirs (unless ``--clear-outputs``), and nothing is numbered. The marks for nbval are gone there and in
nbgrader's.

For nbgrader, a cell with a region is a solution cell named ``exercise-2`` (the next ones of the exercise:
``exercise-2-b``); checks are locked grade cells, ``check-2``. Where an exercise has no check cell, and always
where text is to be written, a human grades the solution cell. A graded cell has one point, or n points with
the tag ``points-n``. The instructor's notebook holds none of this metadata.
"""

import argparse
import ast
import copy
import io
import json
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from urllib.parse import unquote

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from drs_lib.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
ZIP = "drs-course-students.zip"
FOLDER = "drs-course"  # what the zip unpacks to, and nbgrader's name for the assignment
# The student's folder, besides notebooks and what they link to.
FILES = (
    "CITATION.cff",
    "LICENSE",
    "LICENSE-docs",
    "Makefile",
    "README.md",
    "drs_doctor.py",
    "environment.yml",
    "pyproject.toml",
    "tools/make_env.py",
)
STUDENTS_README = "tools/handout_readme.md"  # becomes README.md
STUDENTS_TARGETS = ("help", "course", "lab", "lab-page", "env", "crf", "clean-env")
TARGET = re.compile(r"([a-z-]+):.*## ")  # of the Makefile
FOLDERS = ("drs_course/", "drs_lib/", "figures/", "tools/jupyter/")
# Never the student's, even where a notebook links to it.
KEPT = ("tests/", "tools/handout.py", "docs/teaching")
LONGEST = 100  # characters of a blank's line
LEAK = 20  # a line of a solution that is longer may stand nowhere in the student's notebooks

TEXT_BLANK = "*Your answer here.*"
DELIMITER = re.compile(r"\s*(<!--\s*)?### (BEGIN|END) SOLUTION(?(1)\s*-->)\s*")
# What nbgrader would take for a delimiter, and what somebody will have meant as one.
MEANT = re.compile(
    r"\b(?:BEGIN|END)[ _-]*(?:SOLUTION|HIDDEN TESTS|MARK SCHEME)"
    r"|^\s*(?:#+|<!--)[\s#]*(?i:BEGIN|END)[ _-]*(?i:SOLUTION)"
)
HEADING = re.compile(r"(#{1,3})\s+(.*)")
NAMED = re.compile(r"(?:#{2,3}\s+|\*\*)(Exercise|Project)\s+(\d+|[A-Z])\b")
NUMBERED = re.compile(r"(?:#{3}\s+|\*\*)?(\d+)\.\s")
SECTION = re.compile(r"\b(Exercise|Project)s\b", re.I)
LINK = re.compile(
    r"""\]\(\s*<?([^)>\s]+)|\b(?:src|href)=["']([^"']+)["']|^\[[^\]]+\]:\s*<?(\S+?)>?\s*$""", re.M
)
MARK = re.compile(r"^# NBVAL_CHECK_OUTPUT\n", re.M)  # for the course's own tests
POINTS = re.compile(r"points-(\d+)")


class HandoutError(ValueError):
    """A notebook that can't be handed out; the message names notebook, cell and line."""


@dataclass
class Handed:
    """One notebook, converted.

    Attributes:
        name: file name.
        student: the student's notebook.
        source: the instructor's with nbgrader's metadata.
        exercises: labels in order, such as "Exercise 2".
        solutions: (label, line) of every line in a region.
        outside: the instructor's sources without the regions.
        links: (target in the repository, where) of the student's relative links.
        blanks, checks: how many there are.
    """

    name: str
    student: nbformat.NotebookNode = None
    source: nbformat.NotebookNode = None
    exercises: list = field(default_factory=list)
    solutions: list = field(default_factory=list)
    outside: str = ""
    links: list = field(default_factory=list)
    blanks: int = 0
    checks: int = 0


def convert(text, name, clear_outputs=False):
    """The student's version of an instructor's notebook.

    Args:
        text: the notebook, JSON of nbformat 4.5.
        name: its file name, for messages.
        clear_outputs: leave no outputs at all, not only none of exercises.

    Returns:
        A `Handed`.

    Raises:
        HandoutError: delimiters that don't pair, an exercise without a hint, a cell that doesn't compile, and
            whatever else would hand out a notebook that is broken or that tells the solution.
    """
    original = _read(text, name)
    handed = Handed(name, student=copy.deepcopy(original), source=copy.deepcopy(original))
    modules = _checks_modules(original)
    label, section, outside, unused = None, None, [], {}
    graded = []  # (index of cell, label, kind, where)
    for index, cell in enumerate(handed.student.cells):
        where = f"{name}, cell {cell.id!r} ({index + 1} of {len(original.cells)})"
        lines = cell.source.split("\n")
        regions = _regions(lines, cell.cell_type, where)
        inside = {k for first, last in regions for k in range(first, last + 1)}
        kept = [(k, line) for k, line in enumerate(lines) if k not in inside]
        outside.append("\n".join(line for _, line in kept))
        if cell.cell_type == "markdown":
            label, section = _label(kept, label, section, handed.exercises, where)
        if regions:
            if label is None:
                raise HandoutError(
                    f"{where}, line {regions[0][0] + 1}: a solution that belongs to no exercise. Start one "
                    "in a markdown cell: '**2. Write.** ...' in a section 'Exercises', or '### Exercise 2'."
                )
            handed.solutions += [(label, lines[k]) for first, last in regions for k in range(first + 1, last)]
            blank = _blank_code if cell.cell_type == "code" else _blank_text
            cell.source = blank(lines, regions, label, where)
            if "raises-exception" in cell.metadata.get("tags", []):
                raise HandoutError(
                    f"{where}, line {regions[0][0] + 1}: Run All does not stop at a cell that is tagged "
                    "'raises-exception'. Remove the tag, or the region."
                )
            handed.blanks += len(regions)
            graded.append((index, label, cell.cell_type, where))
        if cell.cell_type == "code":
            tree = _compiled(cell.source, where)
            if regions:
                functions = _functions(tree, label)
                unused.update(dict.fromkeys(functions, f"{where}, line {regions[0][0] + 1}"))
            used, handed_in = _used(tree, modules)
            for function in used:
                unused.pop(function, None)
            if _is_check(cell, tree, modules, label, bool(regions), where):
                for function in sorted(handed_in & set(unused)):
                    raise HandoutError(_not_called(function, unused[function]))
                handed.checks += 1
                graded.append((index, label, "check", where))
            if label or clear_outputs:
                cell.outputs = []
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
        elif cell.cell_type == "markdown":
            handed.links += [(link, f"{where}, line {k}") for link, k in _links(cell.source)]
    for function, where in unused.items():
        raise HandoutError(_not_called(function, where))
    handed.outside = "\n".join(outside)
    for cell in (*handed.student.cells, *handed.source.cells):
        if cell.cell_type == "code":
            cell.source = MARK.sub("", cell.source)
    _add_metadata(handed, graded)
    for notebook in (handed.student, handed.source):
        nbformat.validate(notebook)
    return handed


def _read(text, name):
    try:
        raw = json.loads(text)
        cells = raw["cells"]
        version = (raw["nbformat"], raw["nbformat_minor"])
    except (ValueError, KeyError, TypeError) as error:
        raise HandoutError(f"{name} is no notebook: {error!r}. Save it again in JupyterLab.") from None
    if version < (4, 5) or version[0] != 4:
        raise HandoutError(
            f"{name} has nbformat {version[0]}.{version[1]}, and 4.5 is expected, whose cells have ids: run "
            "`python tools/notebooks.py clean` on it."
        )
    seen = {}
    for index, cell in enumerate(cells):
        first = seen.setdefault(cell.get("id"), index)
        if first != index:
            raise HandoutError(
                f"{name}, cell {cell.get('id')!r} ({index + 1} of {len(cells)}), line 1: cell {first + 1} "
                "has the same id. Run `python tools/notebooks.py clean` on the notebook."
            )
    notebook = nbformat.reads(text, as_version=4)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise HandoutError(
            f"{name} is no valid notebook: {error.message}. Save it again in JupyterLab."
        ) from None
    return notebook


def _regions(lines, kind, where):
    """(index of the first delimiter, index of the second) of each region."""
    found, begin = [], None
    for k, line in enumerate(lines):
        at = f"{where}, line {k + 1}"
        match = DELIMITER.fullmatch(line)
        if not match or (kind == "code" and match[1]) or kind == "raw":
            if MEANT.search(line):
                raise HandoutError(
                    f"{at}: {line.strip()!r} is no delimiter. Expected, alone on a line of a code or "
                    "markdown cell: ### BEGIN SOLUTION or ### END SOLUTION (in markdown also as a comment, "
                    "<!-- ### BEGIN SOLUTION -->)."
                )
        elif match[2] == "BEGIN":
            if begin is not None:
                raise HandoutError(
                    f"{at}: a region begins inside the one of line {begin + 1}. Regions can't be nested: end "
                    "that one first."
                )
            begin = k
        elif begin is None:
            raise HandoutError(f"{at}: END SOLUTION without a BEGIN SOLUTION above it in this cell.")
        else:
            if not any(line.strip() and (kind == "markdown" or not line.strip().startswith("#"))
                       for line in lines[begin + 1 : k]):  # fmt: skip
                raise HandoutError(
                    f"{where}, line {begin + 1}: the region holds no "
                    f"{'statement' if kind == 'code' else 'text'}. Write the solution between the delimiters."
                )
            found.append((begin, k))
            begin = None
    if begin is not None:
        raise HandoutError(f"{where}, line {begin + 1}: BEGIN SOLUTION without an END SOLUTION in this cell.")
    return found


def _label(kept, label, section, exercises, where):
    """The exercise, and the kind of section ("Exercise", "Project", None), after a markdown cell."""
    opens, fenced = True, False
    for k, line in kept:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or not line.strip():
            continue
        heading, named = HEADING.match(line), NAMED.match(line)
        numbered = NUMBERED.match(line) if section and opens else None
        if named or numbered:
            label = f"{named[1]} {named[2]}" if named else f"{section} {numbered[1]}"
            if label in exercises:
                raise HandoutError(
                    f"{where}, line {k + 1}: {label} is in this notebook twice. Number exercises, and "
                    "projects, from 1; an exercise starts its own markdown cell."
                )
            exercises.append(label)
        elif heading:
            label = None
            word = SECTION.search(heading[2])
            if word or len(heading[1]) <= 2:
                section = word and word[1].capitalize()
        opens = bool(heading) and not numbered
    return label, section


def _blank_code(lines, regions, label, where):
    """The source of a code cell with its regions blank."""
    _compiled("\n".join(lines), where)
    new, messages, at, hint = [], [], 0, ""
    for first, last in regions:
        hint = _hint(lines, first) or hint
        if not hint:
            raise HandoutError(
                f"{where}, line {first + 1}: {label} has no hint. Put a comment '# Hint: ...' directly above "
                "### BEGIN SOLUTION."
            )
        messages.append(f"{label}: your code here. Hint: {hint}")
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        new += lines[at:first] + _raise(messages[-1], indent)
        at = last + 1
    source = "\n".join(new + lines[at:])
    span = f"{where}, line {regions[0][0] + 1}"
    try:
        tree = _parse(source)
    except SyntaxError as error:
        raise HandoutError(
            f"{span}: with the solution blank the cell does not compile ({error.msg}). Let a region hold "
            "whole statements, at the indentation of its delimiters."
        ) from None
    if [_message(node) for node, _ in _raises(tree, messages)] != messages:
        raise HandoutError(
            f"{span}: the blank would not raise, because the region is in a string or under a cell "
            "magic (%%). Take it out of there."
        )
    for node, around in _raises(tree, messages):
        for outer, inner in zip(around, [*around[1:], node], strict=True):
            if isinstance(outer, ast.Try) and inner in outer.body and any(map(_catches, outer.handlers)):
                raise HandoutError(
                    f"{span}: the blank stands in a try whose except catches NotImplementedError, so Run All "
                    "would not stop. Catch only the errors that you mean."
                )
    return source


def _blank_text(lines, regions, label, where):
    new, at = [], 0
    for first, last in regions:
        new += [*lines[at:first], TEXT_BLANK]
        at = last + 1
    return "\n".join(new + lines[at:])


def _hint(lines, begin):
    top = begin
    while top and lines[top - 1].lstrip().startswith("#") and not DELIMITER.fullmatch(lines[top - 1]):
        top -= 1
    comments = [line.strip().lstrip("#").strip() for line in lines[top:begin]]
    starts = [k for k, line in enumerate(comments) if line.lower().startswith("hint:")]
    if not starts:
        return ""
    return " ".join(" ".join(re.sub(r"(?i)^hint:", "", line) for line in comments[starts[0] :]).split())


def _raise(message, indent):
    """The lines of a raise statement; a long message is broken between words."""
    line = f"{indent}raise NotImplementedError({json.dumps(message, ensure_ascii=False)})"
    if len(line) <= LONGEST:
        return [line]
    width = max(40, LONGEST - len(indent) - 8)
    parts = textwrap.wrap(message, width, break_long_words=False, break_on_hyphens=False)
    parts = [part + " " for part in parts[:-1]] + parts[-1:]
    inner = [f"{indent}    {json.dumps(part, ensure_ascii=False)}" for part in parts]
    return [f"{indent}raise NotImplementedError(", *inner, f"{indent})"]


def _raises(tree, messages):
    """(raise statement, the nodes around it from the outside in) for each blank, in order."""
    found = []

    def visit(node, around):
        if isinstance(node, ast.Raise) and _message(node) in messages:
            found.append((node, around))
        for child in ast.iter_child_nodes(node):
            visit(child, [*around, node])

    visit(tree, [])
    return found


def _message(node):
    call = node.exc
    if isinstance(call, ast.Call) and len(call.args) == 1 and isinstance(call.args[0], ast.Constant):
        return call.args[0].value
    return None


def _catches(handler):
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {"NotImplementedError", "RuntimeError", "Exception", "BaseException"}
    return any(kind is None or isinstance(kind, ast.Name) and kind.id in names for kind in kinds)


def _functions(tree, label):
    """The outermost functions and classes of a student's cell that have blanks inside functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    blanks = {m for n in ast.walk(tree) if isinstance(n, ast.Raise) for m in [_message(n)]
              if isinstance(m, str) and m.startswith(f"{label}: ")}  # fmt: skip
    return [
        next(node.name for node in around if isinstance(node, (*kinds, ast.ClassDef)))
        for _, around in _raises(tree, blanks)
        if any(isinstance(node, kinds) for node in around)
    ]


def _parse(source):
    """The tree of a cell that compiles; raises SyntaxError for one that doesn't."""
    code = TransformerManager().transform_cell(source)
    compile(code, "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return ast.parse(code)


def _compiled(source, where):
    try:
        return _parse(source)
    except SyntaxError as error:
        line = (error.lineno or 1) + len(source) - len(source.lstrip("\n"))
        raise HandoutError(f"{where}, line {line}: the cell does not compile: {error.msg}.") from None


def _used(tree, modules):
    """Names that a cell uses outside of calls of checks, and names that it hands to checks."""
    calls = [node for node in ast.walk(tree) if _calls_check(node, modules)]
    handed_in = {inner for call in calls for inner in ast.walk(call)}
    names = {node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {node.id for node in names - handed_in}, {node.id for node in names & handed_in}


def _calls_check(node, modules):
    name = _dotted(node.func) if isinstance(node, ast.Call) else ""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _not_called(function, where):
    return (
        f"{where}: Run All would not stop at the blank in {function!r}. Call it below the region, at least "
        "once before a check does: checks catch NotImplementedError."
    )


def _checks_modules(notebook):
    """The names under which a notebook knows drs_course.checks, and functions of it."""
    names = {"drs_course.checks"}
    for cell in notebook.cells:
        if cell.cell_type != "code" or "checks" not in cell.source:
            continue
        try:
            tree = _parse(cell.source)
        except SyntaxError:
            continue  # reported in its turn
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "drs_course":
                names |= {a.asname or a.name for a in node.names if a.name == "checks"}
            elif isinstance(node, ast.ImportFrom) and node.module == "drs_course.checks":
                names |= {a.asname or a.name for a in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.asname for a in node.names if a.name == "drs_course.checks" and a.asname}
    return names


def _is_check(cell, tree, modules, label, solution, where):
    """Whether a code cell is a check; ``solution``: it has a region."""
    tagged = "check" in cell.metadata.get("tags", [])
    if solution:
        if tagged:
            raise HandoutError(
                f"{where}, line 1: a cell with a solution is tagged 'check'. A check is a cell of its own, "
                "which students can't edit: split the cell, or remove the tag."
            )
        return False
    calls = any(_calls_check(node, modules) for node in ast.walk(tree))
    if not tagged:
        if calls and label:
            raise HandoutError(
                f"{where}, line 1: the cell calls drs_course.checks and is not tagged 'check'. Add the tag "
                "(in JupyterLab: Property Inspector, Cell Tags)."
            )
        return False
    if not calls or label is None:
        raise HandoutError(
            f"{where}, line 1: a cell tagged 'check' "
            + ("that calls nothing of drs_course.checks." if label else "that belongs to no exercise.")
            + " Mend it or remove the tag."
        )
    if not any(isinstance(n, ast.Assert | ast.Raise) for n in ast.walk(tree)):
        raise HandoutError(
            f"{where}, line 1: this check can't fail: nbgrader gives the points to every cell that ends "
            "without an exception. End it with: assert verdict.ok"
        )
    return True


def _dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _points(cell, grade, where):
    tags = [tag for tag in cell.metadata.get("tags", []) if tag.startswith("points")]
    if tags and not grade:
        raise HandoutError(
            f"{where}, line 1: found the tag {tags[0]!r}, but the exercise's check has the points."
        )
    if not tags:
        return 1
    match = POINTS.fullmatch(tags[0])
    if len(tags) > 1 or not match:
        raise HandoutError(f"{where}, line 1: found the tags {tags}, expected one such as 'points-3'.")
    return int(match[1])


def _add_metadata(handed, graded):
    checked = {label for _, label, kind, _ in graded if kind == "check"}
    counts = {}
    for cell in (*handed.student.cells, *handed.source.cells):
        cell.metadata.pop("nbgrader", None)
        cell.metadata.pop("jupyter", None)  # solutions are folded, blanks are not
    for index, label, kind, where in graded:
        number = label.split()[1]
        name = f"check-{number}" if kind == "check" else label.lower().replace(" ", "-")
        if kind == "check" and label.startswith("Project"):
            name = f"check-project-{number}"
        counts[name] = counts.get(name, 0) + 1
        k = counts[name] - 1
        grade = kind != "code" or label not in checked
        points = _points(handed.student.cells[index], grade, where)
        entry = {
            "grade": grade,
            "grade_id": name + (f"-{ascii_lowercase[k] if k < 26 else k}" if k else ""),
            "locked": kind == "check",
            "schema_version": 3,
            "solution": kind != "check",
            "task": False,
            **({"points": points} if grade else {}),
        }
        for notebook in (handed.student, handed.source):
            notebook.cells[index].metadata["nbgrader"] = nbformat.from_dict(entry)
        # What nbgrader, too, does on the way to the student: a check can't be edited, neither can be deleted.
        handed.student.cells[index].metadata["deletable"] = False
        if kind == "check":
            handed.student.cells[index].metadata["editable"] = False


def _links(source):
    """(link, line from 1) of every link to a file."""
    for match in LINK.finditer(source):
        link = next(group for group in match.groups() if group)
        if not re.match(r"[a-zA-Z][\w+.-]*:|#|//", link):
            yield link, source.count("\n", 0, match.start()) + 1


# The folder and the zip.


def handout(root=ROOT, out=None, notebooks=(), clear_outputs=False):
    """Writes the folder that the module's docstring describes.

    Args:
        root: the course, a git checkout.
        out: folder to write, by default ``root / "handout"``. What an earlier run left in it is replaced.
        notebooks: names such as "01", "lab" or "01_cam_observation"; empty for all.
        clear_outputs: leave no outputs in the student's notebooks.

    Returns:
        A list of `Handed`, one for each notebook.

    Raises:
        HandoutError: a notebook that can't be handed out, a broken link, a solution that would leak, an
            unknown notebook, an ``out`` that holds other things. Nothing is written then.
    """
    root = Path(root)
    out = Path(out) if out else root / "handout"
    tracked = _tracked(root)
    _check_out(root, out, tracked)
    every = sorted(t for t in tracked if posixpath.dirname(t) == "notebooks" and t.endswith(".ipynb"))
    chosen = _choose(every, notebooks)
    texts = {t: (root / t).read_text(encoding="utf-8") for t in chosen}
    converted = [convert(text, posixpath.basename(t), clear_outputs) for t, text in texts.items()]
    linked = _linked(converted, tracked, every)
    files = {t for t in tracked if t in FILES or t.startswith(FOLDERS)} | linked
    missing = [t for t in (*FILES, STUDENTS_README) if t not in tracked]
    if missing:
        raise HandoutError(f"git does not list {', '.join(missing)}, which students need: `git add` them.")
    written = {}
    for t, h in zip(chosen, converted, strict=True):
        written[t] = _dump(h.student).encode()
        written[f"solutions/{h.name}"] = texts[t].encode()
        written[f"source/{FOLDER}/{h.name}"] = _dump(_beside(h.source)).encode()
    for t in linked:
        written[t] = written[f"source/{FOLDER}/{t}"] = (root / t).read_bytes()
    contents = {t: (root / t).read_bytes() for t in files} | {t: written[t] for t in chosen}
    own = {"README.md": (root / STUDENTS_README).read_bytes(), "Makefile": _makefile(contents["Makefile"])}
    packed = _zip(contents | own)
    found = leaks(io.BytesIO(packed), converted)
    if found:
        raise HandoutError("\n".join(found))
    for folder in ("notebooks", "solutions", f"source/{FOLDER}"):
        if (out / folder).exists():
            shutil.rmtree(out / folder)
    for name, content in {**written, ZIP: packed}.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return converted


def _tracked(root):
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
        names = [name for name in run.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = []
    if not names:
        raise HandoutError(
            f"git lists no files in {root}, and the handout holds what git lists. Run this in a clone of the "
            "course."
        )
    gone = [name for name in names if not (root / name).is_file()]
    if gone:
        raise HandoutError(f"git lists {gone[0]}, and the file is not there: restore it, or `git rm` it.")
    return set(names)


def _check_out(root, out, tracked):
    here, root = out.resolve(), root.resolve()
    if root.is_relative_to(here) or any((root / t).is_relative_to(here) for t in tracked):
        raise HandoutError(f"{out} holds files of the course, and would be overwritten. Name a new folder.")
    if here.is_file() or (here.is_dir() and any(here.iterdir()) and not (here / ZIP).exists()):
        raise HandoutError(
            f"{out} is there, and is no handout (it has no {ZIP}). Name a new or an empty folder."
        )


def _choose(every, wanted):
    if not wanted:
        return every
    chosen = set()
    for name in wanted:
        stem = Path(name).name.removesuffix(".ipynb")
        found = [t for t in every if Path(t).stem == stem or Path(t).stem.startswith(stem + "_")]
        if len(found) != 1:
            names = ", ".join(Path(t).stem for t in every)
            raise HandoutError(f"found {len(found)} notebooks for {name!r}, expected one of: {names}.")
        chosen |= set(found)
    return sorted(chosen)


def _linked(converted, tracked, every):
    """The files of the course that the students' notebooks link to, the notebooks themselves left out."""
    found = set()
    for link, where in (pair for handed in converted for pair in handed.links):
        target = posixpath.normpath(posixpath.join("notebooks", unquote(re.split("[#?]", link)[0])))
        if target in every:
            continue
        files = {t for t in tracked if t == target or t.startswith(target + "/")}
        if not files or any(t.startswith((*KEPT, "notebooks/")) for t in files):
            reason = "is kept from students" if files else "git does not list"
            raise HandoutError(f"{where}: the link {link!r} leads to {target}, which {reason}.")
        found |= files
    return found


def _beside(notebook):
    """nbgrader hands out the folder of a notebook alone, so what it links to has to be in there."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda match: match[0].replace("../", "", 1), cell.source)
    return notebook


def _makefile(content):
    """The Makefile without the targets that need what students don't have."""
    blocks = content.decode().split("\n\n")
    return "\n\n".join(
        block for block in blocks if (m := TARGET.match(block)) is None or m[1] in STUDENTS_TARGETS
    ).encode()


def _dump(notebook):
    return nbformat.writes(notebook) + "\n"


def _zip(files):
    """The bytes of a zip; they depend on nothing but the files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{FOLDER}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
    return packed.getvalue()


def leaks(path, converted):
    """Lines of solutions that a student's zip tells.

    A line counts that is longer than 20 characters and that the student reads in no other place by right: not
    in a file of the course, and not in a notebook's source outside the solutions.

    Args:
        path: the zip, a file or its name.
        converted: the `Handed` of its notebooks.

    Returns:
        Sentences, one for each such line and the first file it is in.
    """
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(name).decode("utf-8", "replace") for name in archive.namelist()}
    notebooks = {name: "\n".join(_strings(json.loads(texts.pop(name)))) for name in list(texts)
                 if name.endswith(".ipynb")}  # fmt: skip
    by_right = "\n".join([*texts.values(), *(handed.outside for handed in converted)])
    found = []
    for handed in converted:
        for label, line in dict.fromkeys((label, line.strip()) for label, line in handed.solutions):
            if len(line) <= LEAK or line in by_right:
                continue
            name = next((name for name, text in notebooks.items() if line in text), None)
            if name:
                found.append(
                    f"{handed.name}, {label}: the student's {name} would tell this line of the solution: "
                    f"{line!r}. Look for it in the outputs of other cells, clear them or change it."
                )
    return found


def _strings(node):
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        if node and all(isinstance(part, str) for part in node):
            yield "".join(node)
        else:
            for part in node:
                yield from _strings(part)
    elif isinstance(node, dict):
        for key, part in node.items():
            yield key
            if not key.startswith("image/") or key == "image/svg+xml":
                yield from _strings(part)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python tools/handout.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--notebooks", nargs="+", default=(), metavar="NAME", help="such as 01 02; default: all"
    )
    parser.add_argument(
        "--clear-outputs", action="store_true", help="no outputs at all in the student notebooks"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: handout/")
    options = parser.parse_args(arguments)
    try:
        converted = handout(ROOT, options.out, options.notebooks, options.clear_outputs)
    except HandoutError as error:
        print(f"handout: {error}", file=sys.stderr)
        return 1
    for handed in converted:
        print(
            f"{handed.name}: {len(handed.exercises)} exercises and projects, {handed.blanks} blanks, "
            f"{handed.checks} checks"
        )
    path = (options.out or ROOT / "handout") / ZIP
    print(
        f"Students get {path} ({path.stat().st_size / 1e6:.1f} MB). "
        f"Solutions are in {path.parent / 'solutions'}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
