"""README's numbers are the committed reference results, and its lists are those of the folders."""

import re
from pathlib import Path

import pytest

from drs_lib.experiments import reference_table
from drs_lib.paper import NETWORKS

ROOT = Path(__file__).parents[1]
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


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.M))
    assert named and named <= targets
