"""README's numbers are the committed reference results, its lists those of the folders; the page on VOC names
commands and figures that are there."""

import ast
import importlib
import json
import re
import runpy
from pathlib import Path

import pytest
from mutants import ANSWERS

import drs_doctor as doctor
from drs_course.__main__ import main
from drs_course.paper import NETWORKS
from drs_course.tables import reference_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cell(row, column="measured"):
    return f"{row[column]:.1f} ± {row[f'{column} sd' if column != 'measured' else 'sd']:.1f}"


def results():
    """The lines of README's table of results: what, paper, Critters."""
    one, two, three, four = (reference_table(number) for number in (1, 2, 3, 4))
    constant = one[one["delta"].notna()]
    best, paper_best = (constant.loc[constant[column].idxmax()] for column in ("measured", "paper"))
    rows = [
        ("Table 1: learnable controller", one.iloc[0], one.iloc[0].paper),
        (f"Table 1: best constant δ, {best.delta:.2f} here, 0.55 in the paper", best, paper_best.paper),
    ]
    rows += [(f"Table 2: {row.configuration}", row, row.paper) for _, row in two.iterrows()]
    rows += [(f"Table 3: {row.configuration}", row, row.paper) for _, row in three.iterrows()]
    lines = [f"| {what} | {paper:.1f} | {cell(row)} |" for what, row, paper in rows]
    for title in NETWORKS.values():
        for name in ("Ours (learnable)", "Ours (non-learnable)", "upper bound: fully supervised"):
            [(_, row)] = four[(four.network == title) & (four.configuration == name)].iterrows()
            paper = f"{row.paper:.1f}" if row.paper == row.paper else ""
            lines.append(
                f"| Table 4: {title}, {name.removeprefix('upper bound: ')} | {paper} | "
                f"{cell(row)} (with CRF {cell(row, 'with CRF')}) |"
            )
    return lines


@pytest.mark.parametrize("line", results())
def test_every_result_is_the_reference_s(line):
    assert line in README, f"README lacks the line\n{line}"


def test_no_other_result_is_listed():
    assert len(re.findall(r"^\| Table \d: ", README, re.M)) == len(results())


def test_every_notebook_is_listed_and_every_link_leads_somewhere():
    listed = re.findall(r"^\| \[\w+\]\((notebooks/\w+\.ipynb)\)", README, re.M)
    assert listed == sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "notebooks").glob("0*.ipynb"))
    for link in re.findall(r"\]\(([^)#\s]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_order_is_a_reader_s():
    picture, sentence = README.index("!["), README.index("A course of eight notebooks that rebuilds")
    headings = re.findall(r"^## (.+)$", README, re.M)
    assert 0 < picture < sentence < README.index(f"## {headings[0]}")
    wanted = ("Two commands", "The notebooks", "Results", "The path to PASCAL VOC 2012", "For lecturers")
    order = [headings.index(name) for name in (*wanted, "How to cite", "How to contribute")]
    assert order == sorted(order)


def test_exercises_and_mutants_are_counted():
    tool = runpy.run_path(str(ROOT / "tools" / "handout.py"))
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    handed = [tool["convert"](path.read_text(encoding="utf-8"), path.name) for path in notebooks]
    exercises = sum(name.startswith("Exercise") for one in handed for name in one.exercises)
    mutants = sum(len(answers.wrong) for answers in ANSWERS.values())
    assert sum(name.startswith("Project") for one in handed for name in one.exercises) == 3
    assert f"There are {exercises} exercises and three open projects" in README.replace("\n", " ")
    assert f"it rejects all of the {mutants} wrong answers" in README.replace("\n", " ")


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.M))
    assert named and named <= targets


def test_the_first_map_s_times_are_the_stored_ones():
    stored = json.loads((ROOT / "benchmarks" / "results" / "first_map.json").read_text(encoding="utf-8"))
    minutes, seconds = divmod(round(sum(stored["first_map"].values())), 60)
    environment = divmod(round(stored["first_map"]["make env"]), 60)
    text = README.replace("\n", " ")
    assert (
        f"it takes {minutes} minutes and {seconds} seconds, {environment[0]}:{environment[1]:02} of them"
        in text
    )
    torch, library = (f"{stored['imports'][name]:.1f}" for name in ("torch", "drs_lib"))
    assert f"`import drs_lib` takes {library} s besides torch's {torch}." in text


VOC = (ROOT / "docs" / "voc.md").read_text(encoding="utf-8")
COMMANDS = {
    "drs_course tables": lambda arguments: main(["tables", *arguments]),
    "drs_course download": lambda arguments: main(["download", *arguments]),
    "drs_course verify": lambda arguments: main(["verify", *arguments]),
    "drs_doctor": doctor.main,
}


def lines_of_code(text):
    """Commands: indented lines, and what is in backticks."""
    return re.findall(r"^    (\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_the_page_on_voc_names_exists(command, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[command](["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    used = set()
    for line in lines_of_code(VOC):
        if f"-m {command} " in line + " ":
            used |= set(re.findall(r"--[a-z-]+", line.split(f"-m {command}")[1]))
    assert used and used <= known


def test_the_page_on_voc_names_what_exists():
    for link in re.findall(r"\]\(([^)#\s]+)\)", VOC):
        assert link.startswith("http") or (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"`((?:tests|benchmarks|drs_lib)/[\w/]+\.\w+)`", VOC):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"^    make (.*)$", VOC, re.M):
        target, *settings = line.split()
        assert re.search(rf"^{target}:", makefile, re.M), target
        for setting in settings:
            assert re.search(rf"^{setting.split('=')[0]} *\?=", makefile, re.M), setting


def test_the_python_of_the_page_on_voc_imports_and_calls_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", VOC, re.S)
    assert len(blocks) >= 3
    for block in blocks:
        for statement in ast.parse(block).body:
            if isinstance(statement, ast.ImportFrom) and statement.module.startswith("drs_"):
                module = importlib.import_module(statement.module)
                assert all(hasattr(module, alias.name) for alias in statement.names), block


@pytest.mark.parametrize("budget", ["paper", "release"])
def test_hours_are_what_the_program_prints(budget, capsys):
    """A change of the trainings or of the tables changes them."""
    program = runpy.run_path(str(ROOT / "benchmarks" / "hours.py"))
    program["main"](["--budget", budget])
    *lines, total = capsys.readouterr().out.splitlines()
    if budget == "paper":
        assert all(line in VOC for line in (*lines, total))
    else:
        assert f"(`--budget release`) it is {total.split('|')[-3].strip()} hours" in VOC


def test_the_processor_s_figures_are_the_stored_ones():
    """Images per second by `benchmarks/pipeline.py`."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "pipeline-cpu.json").read_text(encoding="utf-8"))
    stages = {}
    for row in stored["rows"]:
        stages.setdefault(row["stage"], {})[row["path"]] = row
    found = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", VOC, re.M)
    assert [name for name, *_ in found] == [name for name, of in stages.items() if "plain" in of]
    for name, plain, ours, ratio in found:
        of = stages[name]
        figures = (of["plain"]["images_per_second"], of["ours"]["images_per_second"], of["ours"]["speedup"])
        assert (plain, ours, ratio) == tuple(f"{value:.2f}" for value in figures), name
