"""Make the deck of docs/slides.md from the notebooks' stored cells, by nbconvert.

    python tools/slides.py [--out site/html/slides]

writes ``index.html``: one file with its pictures, fonts of the system, and reveal.js, so that it needs no
network. Arrow keys turn the slides, S opens the speaker's view with the notes; with ``?print-pdf`` behind its
name the page prints. docs/slides.md says how a slide takes an output, or rows of README's table.
"""

import argparse
import base64
import re
import sys
from html import escape
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbconvert.exporters import SlidesExporter
from nbformat.v4 import new_markdown_cell, new_notebook

from drs_lib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent
PLACE = re.compile(r"\{\{ *([^>{}]+?) *(?:> *([^>{}]+?) *)?> *([^>{}]+?) *\}\}")
NOTE = re.compile(r"^Note \((\d+) min\): ", re.M)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
COLUMN = "\n|||\n"  # what follows stands to the right
STEP = "\n+++\n"  # what follows appears with the next key


class SlidesError(ValueError):
    """A slide that can't be made; the message names it."""


def slides(text):
    """The slides of a deck: a list of (Markdown, the speaker's note, its minutes).

    Raises:
        SlidesError: a slide without a heading or without a note.
    """
    found = []
    for number, part in enumerate(
        re.split(r"^---$", re.sub(r"<!--.*?-->", "", text, flags=re.S), flags=re.M), 1
    ):
        shown, *note = NOTE.split(part)
        if len(note) != 2 or not re.match(r"\s*##? ", shown):
            raise SlidesError(
                f"slide {number} of the deck begins {shown.strip()[:40]!r}. Expected a heading, # or ##, and "
                "at the end one note, 'Note (2 min): ...'."
            )
        found.append((shown.strip(), note[1].strip(), int(note[0])))
    return found


def deck(text, root=ROOT):
    """The deck as a notebook, with the metadata that nbconvert's slides go by.

    Args:
        text: docs/slides.md.
        root: the course; notebooks, README and figures are read from there.

    Raises:
        SlidesError: a slide asks for something that isn't there; nothing is guessed.
    """
    cells = []
    for shown, note, _ in slides(text):
        shown = PICTURE.sub(lambda match: _picture(root, match[2], match[1]), shown)
        shown = PLACE.sub(lambda match: _taken(root, *match.groups()), shown)
        heading, body = shown.split("\n", 1)
        columns = [_stepwise(column) for column in body.split(COLUMN)]
        if len(columns) > 1:
            columns = ['<div class="columns"><div>', "\n\n</div><div>\n\n".join(columns), "</div></div>"]
        shown = "\n\n".join([heading, *columns])
        for kind, source in (("slide", shown), ("notes", note)):
            cells.append(new_markdown_cell(source, metadata={"slideshow": {"slide_type": kind}}))
    return new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def _stepwise(text):
    first, *later = text.split(STEP)
    return "\n\n".join([first, *(f'<div class="fragment">\n\n{part}\n\n</div>' for part in later), ""])


def _picture(root, link, alt):
    path = root / "docs" / link
    if not path.is_file():
        raise SlidesError(f"the deck shows {link}, which isn't there. `make figures` draws figures/.")
    return _image(base64.b64encode(path.read_bytes()).decode(), alt)


def _image(png, alt):
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{png}">'


def _taken(root, source, heading, wanted):
    """What a line in double braces stands for, as Markdown or HTML."""
    if source == "README":
        return _rows(root, wanted)
    path = root / "notebooks" / f"{source}.ipynb"
    if not path.is_file():
        raise SlidesError(f"the deck takes a cell of {path.name}, which isn't in notebooks/.")
    kind, _, number = wanted.partition(" ")
    found = _section(nbformat.read(path, as_version=4), heading, kind)
    if not 0 < int(number or 1) <= len(found):
        raise SlidesError(
            f"the deck asks for {wanted!r} of {path.name}, section {heading!r}, which has {len(found)} of "
            f"kind {kind!r} (kinds: figure, table, text)."
        )
    return found[int(number or 1) - 1]


def _rows(root, table):
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(f"| {table}: ")]
    if not rows:
        raise SlidesError(f"README has no rows of {table!r} in its table of results.")
    start = lines.index(rows[0])
    while not lines[start].startswith("|---"):
        start -= 1
    return "\n".join([lines[start - 1], lines[start], *(row.replace(f"{table}: ", "") for row in rows)])


def _section(notebook, heading, kind):
    """What a section has of one kind."""
    found, inside = [], False
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type == "markdown":
            for title in re.findall(r"^#{1,3} (.+)$", cell.source, re.M):
                inside = title == heading
        elif inside:
            shown = (_shown(output, kind, following) for output in cell.outputs)
            found += [text for text in shown if text]
    return found


def _shown(output, kind, following):
    data = output.get("data", {})
    if kind == "figure" and "image/png" in data:
        caption = re.match(r"\*Figure: (.+?)[.:*]", following.source if following else "", re.S)
        return _image(
            data["image/png"].replace("\n", ""), " ".join(caption[1].split()) if caption else "figure"
        )
    if kind == "table" and "text/html" in data:
        return re.sub(r"\n\s*", " ", data["text/html"])  # a blank line would end the HTML
    if kind == "text" and "text" in output:
        return f"<pre>{escape(output.text.rstrip())}</pre>"
    return ""


def html(text, root=ROOT):
    """The deck as one HTML page.

    Raises:
        SlidesError: as `deck`; also if reveal.js is not installed.
    """
    spec = find_spec("sphinx_revealjs")  # brings reveal.js; nbconvert's own way fetches it from the network
    if spec is None:
        raise SlidesError(
            "reveal.js is missing, which sphinx-revealjs brings: python -m pip install sphinx-revealjs"
        )
    package = Path(spec.origin).parent
    reveal = next(package.rglob("dist/reveal.js")).parents[1]

    def read(*names):
        return "\n".join((reveal / name).read_text(encoding="utf-8") for name in names)

    exporter = SlidesExporter(extra_template_basedirs=[str(TEMPLATES)], template_name="slides")
    resources = {
        "deck": {
            "title": slides(text)[0][0].splitlines()[0].lstrip("# "),
            "css": read("dist/reset.css", "dist/reveal.css"),
            "own_css": (TEMPLATES / "slides" / "deck.css").read_text(encoding="utf-8"),
            "js": read("dist/reveal.js", "plugin/notes/notes.js"),
        }
    }
    page, _ = exporter.from_notebook_node(deck(text, root), resources)
    return page


def write(out, root=ROOT):
    """Writes the deck into a folder, which is made, and returns its path.

    Raises:
        SlidesError: as `html`; nothing is written then.
    """
    page = html((root / "docs" / "slides.md").read_text(encoding="utf-8"), root)
    Path(out).mkdir(parents=True, exist_ok=True)
    path = Path(out) / "index.html"
    write_text(path, page)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python tools/slides.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site" / "html" / "slides", metavar="FOLDER")
    try:
        print(f"Open {write(parser.parse_args(arguments).out)}.")
    except SlidesError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
