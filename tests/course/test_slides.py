"""The deck: twenty minutes, made of what the notebooks stored, in one file that fits the projector."""

import html as entities
import re
from pathlib import Path

import nbformat
import pytest
import scripts
from browser import serving

ROOT = Path(__file__).parents[2]
DECK = (ROOT / "docs" / "slides.md").read_text(encoding="utf-8")
pytest.importorskip("sphinx_revealjs", reason="sphinx-revealjs is not installed")


@pytest.fixture(scope="module")
def tool():
    return scripts.load("tools/slides.py")


@pytest.fixture(scope="module")
def page(tool, tmp_path_factory):
    return tool.write(tmp_path_factory.mktemp("slides") / "new")


def small(root, deck, rows=("| Table 1: mine | 1.0 | 2.0 |",)):
    """A course of one notebook."""
    cells = [
        nbformat.v4.new_markdown_cell("## The idea\n\ntext"),
        nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint('a < b')"),
        nbformat.v4.new_markdown_cell("### Next"),
        nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", text="next")]),
    ]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="a < b\n")]
    for folder in ("notebooks", "docs"):
        (root / folder).mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / "notebooks" / "09_small.ipynb")
    (root / "README.md").write_text("\n".join(["| | paper | Critters |", "|---|---|---|", *rows, ""]))
    (root / "docs" / "slides.md").write_text(deck)
    return root


def test_twenty_minutes_and_a_note_for_every_slide(tool):
    found = tool.slides(DECK)
    assert 12 <= len(found) <= 20
    assert sum(minutes for _, _, minutes in found) == 20 and all(minutes for _, _, minutes in found)
    assert all(len(note) > 5 for _, note, _ in found)


def test_results_are_taken_from_notebooks_and_readme(tool):
    places = tool.PLACE.findall(DECK)
    assert len(places) >= 12 and {source for source, _, _ in places} >= {"README", "02_drs_module"}
    made = re.sub(r"base64,[^\"]*", "", "\n".join(cell.source for cell in tool.deck(DECK).cells))
    assert "{{" not in made and "|||" not in made and "+++" not in made and "](" not in made
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for table in (2, 3, 4):
        for row in re.findall(rf"^\| Table {table}: (.+)$", readme, re.M):
            assert f"| {row}" in made
    assert "numbers to write down: 6 for the label, 16,384 for the mask" in made  # the title of the slide


def test_a_small_deck(tool, tmp_path):
    deck = (
        "<!-- Note (9 min): no slide -->\n# T\n{{ 09_small > The idea > text }}\n|||\n"
        "before\n+++\n{{ README > Table 1 }}\nNote (2 min): say\n---\n"
        "## U\n{{ 09_small > Next > text 1 }}\nNote (1 min): more\n"
    )
    root = small(tmp_path, deck)
    first, note, second, _ = tool.deck(deck, root).cells
    assert "<pre>a &lt; b</pre>" in first.source and "| mine | 1.0 | 2.0 |" in first.source
    assert first.source.count("<div>") == 2 and note.source == "say"
    assert (
        first.source.index("before") < first.source.index('class="fragment"') < first.source.index("| mine")
    )
    assert "<pre>next</pre>" in second.source and "print" not in second.source
    kinds = [cell.metadata.slideshow.slide_type for cell in tool.deck(deck, root).cells]
    assert kinds == ["slide", "notes"] * 2
    text = tool.write(tmp_path / "out", root).read_text(encoding="utf-8")
    assert "<title>T</title>" in text and entities.escape("a < b") in text and text.count("<aside") == 2


@pytest.mark.parametrize(
    ("slide", "message"),
    [
        ("{{ 08_none > The idea > text }}", "08_none.ipynb, which isn't in notebooks"),
        (
            "{{ 09_small > Another > text }}",
            "'text' of 09_small.ipynb, section 'Another', which has 0 of kind",
        ),
        ("{{ 09_small > The idea > text 2 }}", "has 1 of kind 'text'"),
        ("{{ 09_small > The idea > picture }}", "kinds: figure, table, text"),
        ("{{ README > Table 9 }}", "no rows of 'Table 9'"),
        ("![a](../figures/none.png)", "figures/none.png, which isn't there"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_written(tool, tmp_path, slide, message):
    root = small(tmp_path, f"# T\n{slide}\nNote (1 min): x")
    with pytest.raises(tool.SlidesError, match=re.escape(message)):
        tool.write(tmp_path / "out", root)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "deck", ["# T\nwithout a note", "no heading\nNote (1 min): x", "# T\nNote: no minutes"]
)
def test_a_slide_has_a_heading_and_a_note(tool, deck):
    with pytest.raises(tool.SlidesError, match="slide 1 of the deck begins .* Expected a heading"):
        tool.slides(deck)


def test_without_reveal_a_message_says_what_brings_it(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    assert tool.main(["--out", str(tmp_path / "out")]) == 1
    assert "pip install sphinx-revealjs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert list(page.parent.iterdir()) == [page]
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:|#)[^"']*""", text[: text.rindex("<script>")].split("</style>")[-1]
    )
    assert "cdn" not in re.sub(r"base64,[^\"]*", "", text).lower()


def test_every_slide_fits_and_nothing_is_fetched(page):
    missing = serving.missing()
    if missing:
        pytest.skip(missing)
    with serving.chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 720})
        fetched, errors = [], []
        tab.on("request", lambda request: fetched.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page.as_uri())
        tab.wait_for_function("window.Reveal && Reveal.isReady()")
        slides = tab.evaluate("Reveal.getTotalSlides()")
        too_large, seen = [], set()
        for number in range(slides):
            tab.evaluate(f"Reveal.slide({number})")
            slide = tab.evaluate(
                "(() => { const s = Reveal.getCurrentSlide(); return "
                "[s.querySelector('h1, h2').innerText, s.scrollHeight, s.scrollWidth, s.clientWidth] })()"
            )
            seen.add(slide[0])
            if slide[1] > 720 or slide[2] > slide[3]:
                too_large.append(slide)
        tab.close()
    assert not errors and not too_large
    assert len(seen) == slides == DECK.count("\n---\n") + 1
    assert not [url for url in fetched if not url.startswith(("file:", "data:"))]
