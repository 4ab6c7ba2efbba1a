"""The course as a static site: ``make site``, or

    python -m sphinx -W --keep-going -n -c docs . site/html

The source folder is the project's own, so that links and pictures lead where they lead on a code host.
Nothing is executed: the notebooks are shown with their stored outputs. Nothing is fetched: neither the build
nor a reader's browser needs a network.
"""

import inspect
import json
import posixpath
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import latex2mathml.converter as latex2mathml
import yaml
from docutils import nodes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import drs_lib  # noqa: E402

# ---- the project

GITHUB = "https://github.com/"
PACKAGES = ("drs_lib", "drs_course")


def repository_of(root):
    """Where the project is hosted, by pyproject.toml ([project.urls], Repository or Source) or CITATION.cff
    (repository-code); "" if neither says."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    found = urls.get("repository") or urls.get("source") or citation.get("repository-code") or ""
    return found.rstrip("/").removesuffix(".git")


def repository_options(url, branch="main"):
    """The theme's options for buttons to the repository, to Binder and to Colab; none without a repository.
    Colab opens notebooks that are on GitHub."""
    if not url:
        return {}
    launch = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
    if url.startswith(GITHUB):
        launch["colab_url"] = "https://colab.research.google.com"
    return {
        "repository_url": url,
        "repository_branch": branch,
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": launch,
    }


REPOSITORY = repository_of(ROOT)

project = "drs-course"
author = "drs-course contributors"
copyright = "drs-course contributors; text and figures CC BY 4.0, code MIT"
version = release = drs_lib.__version__

# ---- sources

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "docs/**.rst", "notebooks/*.ipynb", "CONTRIBUTING.md"]
# Only folders with pages are walked through: beside them lie environments, data and stored runs.
exclude_patterns = [
    *(p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("docs", "notebooks", "figures")),
    "**/.ipynb_checkpoints",
    "docs/slides.md",  # becomes the deck
]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the solution"
nb_code_prompt_hide = "Hide the solution"

# ---- the API, from docstrings

# A package documents what it defines, and each module its own: what is re-exported stands in one place.
autodoc_default_options = {"members": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autosummary_generate = False
add_module_names = False
default_role = "py:obj"
python_maximum_signature_line_length = 88
# Words in single backticks may be names of the library, of others, or of arguments: those that are none of
# the library's stay plain code. What the library doesn't own can't be looked up without a network.
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    (
        "py:.*",
        r"(torch|torchvision|numpy|np|pandas|pd|PIL|matplotlib|ipywidgets|traitlets|pathlib|os|collections|typing|types)\b.*",
    ),
]

# ---- the pages

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "Discriminative Region Suppression, rebuilt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_first_page.html"}
html_show_sphinx = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    **repository_options(REPOSITORY),
}


def adapt_markdown(app, docname, source):
    """The first page is README.md, whose links are relative to the project's folder, and the table of
    contents. Links to README.md elsewhere lead to it, links to docs/slides.md to the deck."""
    if docname == root_doc:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        app.env.note_dependency(ROOT / "README.md")
        source[0] = re.sub(r"\]\((?!\w+:|#)", "](../", readme) + "\n" + source[0]
    else:
        first = posixpath.relpath(f"{root_doc}.md", posixpath.dirname(docname) or ".")
        source[0] = re.sub(r"\]\((\.\./)*README\.md", f"]({first}", source[0])
    source[0] = _keep_percent(source[0])
    deck = posixpath.relpath("slides/index.html", posixpath.dirname(docname) or ".")
    link = r"\[([^\]]+)\]\([^()\s]*\bslides\.md\)"
    source[0] = re.sub(link, rf'<a class="reference" href="{deck}">\1</a>', source[0])


def complete_notebook(app, docname, source):
    """What a notebook's page needs and its file doesn't have: a note that the page is a still, for every
    picture among the outputs what it shows, from the caption under it, and solutions that are folded."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    cells = notebook["cells"]
    heading = ""
    for number, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.+)$", text, re.M) or [heading])[-1]
        elif "### BEGIN SOLUTION" in text:
            cell["metadata"].setdefault("tags", []).append("hide-cell")
        cell["source"] = _without_marks(text, cell["cell_type"])
        if cell["cell_type"] == "markdown":
            cell["source"] = _keep_percent(cell["source"])
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                alt = (
                    _lab(output)
                    or _caption(cells[number + 1 :])
                    or f"Figure in the section: {_plain(heading)}"
                )
                cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": alt}
    has_labs = any("drs_course.labs" in "".join(cell["source"]) for cell in cells)
    note = {"cell_type": "markdown", "metadata": {}, "source": _note(Path(docname).name, has_labs)}
    if "id" in cells[0]:
        note["id"] = "about-this-page"
    cells.insert(1, note)
    source[0] = json.dumps(notebook)


def _keep_percent(text):
    """A line that begins with a percent sign is a comment to MyST, and text to everybody else."""
    return re.sub(r"^( *)%", r"\1\\%", text, flags=re.M)


def _without_marks(text, kind):
    """A cell as readers see it: without nbval's mark and delimiters; in a text, the solution is folded."""
    if kind == "code":
        return re.sub(
            r"^[ \t]*(# NBVAL_CHECK_OUTPUT|### (BEGIN|END) SOLUTION)[ \t]*(\n|$)", "", text, flags=re.M
        )
    text = re.sub(
        r"^(<!-- )?### BEGIN SOLUTION( -->)?$", "<details><summary>Answer</summary>\n", text, flags=re.M
    )
    return re.sub(r"^(<!-- )?### END SOLUTION( -->)?$", "\n</details>", text, flags=re.M)


def _lab(output):
    """What a lab says of its own picture."""
    text = "".join(output["data"].get("text/plain", ""))
    return re.sub(r" \(run the cell.*", "", text) if ": " in text else ""


def _caption(cells):
    """The first sentence of the caption below a picture; several in a row may share one."""
    for cell in cells:
        text = "".join(cell["source"])
        found = re.match(r"\*(?!\*)(.+?)(?:\.\s|\.?\*(?!\*))", text, re.S)
        if cell["cell_type"] == "markdown" and (found or re.match("#", text)):
            return _plain(found[1]) if found else ""
    return ""


def _plain(text):
    return re.sub(r"\s+", " ", re.sub(r"[*`$\\]", "", text)).strip()


def _note(name, has_labs):
    lines = [
        "```{note}",
        "This page is a still: the outputs are those stored in the notebook"
        + (", and the sliders of its labs, shown as pictures, don't move here." if has_labs else "."),
        f"To run it, give `make lab` in the course's folder and open `notebooks/{name}.ipynb`.",
    ]
    if REPOSITORY:
        lines.append("The rocket above opens it in the browser.")
    if REPOSITORY.startswith(GITHUB):
        lines.append(f"On Colab, give `!pip install git+{REPOSITORY}` in a cell of its own first.")
    return "\n".join([*lines, "```"])


def adapt_docstring(app, what, name, obj, options, lines):
    """Docstrings are written to be read in a terminal. Some of their habits are other things to
    reStructuredText or to Napoleon, which gets what is made here:

    an indented block is preformatted; bars and final underscores are what they are; ``name: text`` in a
    paragraph, with an argument's name, explains the argument; a line of *Args:* or *Raises:* without a name
    at its beginning belongs to the entry above; a property's docstring begins with a sentence, not with a
    type.
    """
    if what in ("property", "attribute", "data"):
        lines.insert(0, "\\ ")  # nothing, but a first line without a colon
    names = "|".join(map(re.escape, _arguments(obj)))
    explained = re.compile(rf"(?<![\w`.*(])((?:(?:{names}), )*(?:{names}))(?=: )") if names else None
    adapted, block, section = [], "", ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line and not indent:
            block, section = "text", line if line in SECTIONS else ""
        elif line and block == "text" and not section and adapted and not adapted[-1]:
            above = next((text for text in reversed(adapted) if text), "")
            block = "preformatted"
            if not above.endswith("::") and not above.startswith(MARKERS):
                adapted += [".. code-block:: text", ""]
        if block != "preformatted":
            line = "".join(
                part if part.startswith(("`", ":")) else _escape(part) for part in CODE.split(line)
            )
            if explained and not section:
                line = explained.sub(r"**\1**", line)
            if section in ("Args:", "Raises:") and indent == 4 and not ENTRY.match(line):
                line = "    " + line
        adapted.append(line)
    lines[:] = adapted


SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")
MARKERS = ("..", "- ", "* ", "=")
CODE = re.compile(r"(``.+?``|(?::\w+:)?`[^`]+`)")
ENTRY = re.compile(r" {4}[\w.*`]+(, [\w.*`]+)*: ")


def _arguments(obj):
    try:
        return [name for name in inspect.signature(obj).parameters if name != "self"]
    except (TypeError, ValueError):
        return []


def _escape(text):
    return re.sub(r"(\||(?<=\w)_(?!\w))", r"\\\1", text)


def skip_fields(app, what, name, obj, skip, options):
    """The fields of a NamedTuple: its class's docstring says more than "Alias for field number 0"."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def resolve_alias(app, env, node, contnode):
    """A name of the two packages under which a docstring or a page refers to something that is documented
    elsewhere: ``drs_lib.suppress`` is ``drs_lib.drs.suppress``, `VOC2012` in `drs_lib.data` is of its module
    `voc`."""
    if node.get("refdomain") != "py":
        return None
    target, module = node["reftarget"], node.get("py:module")
    for name in (target, f"{module}.{target}"):
        found = _find(name)
        home = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
        if all(home) and str(home[0]).startswith(PACKAGES) and ".".join(home) != name:
            domain = env.get_domain("py")
            to, kind = ".".join(home), node["reftype"]
            return domain.resolve_xref(env, node["refdoc"], app.builder, kind, to, node, contnode)
    return None


def _find(name):
    """The object of a dotted name of the two packages, or None."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    for split in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found
    return None


def write_math(translator, node):
    """A formula as MathML, which browsers draw by themselves: MathJax would be fetched from elsewhere."""
    block = isinstance(node, nodes.math_block)
    formula = latex2mathml.convert(node.astext(), display="block" if block else "inline")
    if block:
        formula = translator.starttag(node, "div", CLASS="formula") + formula + "</div>"
    translator.body.append(formula)
    raise nodes.SkipNode


def write_slides(app, error):
    """The deck, beside the pages."""
    tool = ROOT / "tools" / "slides.py"
    if app.builder.name == "html" and error is None and tool.is_file():
        runpy.run_path(str(tool))["write"](Path(app.outdir) / "slides")


def setup(app):
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("source-read", adapt_markdown)
    app.connect("source-read", complete_notebook)
    app.connect("autodoc-process-docstring", adapt_docstring, priority=400)  # before Napoleon
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", resolve_alias)
    app.connect("build-finished", write_slides)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
