"""The site: built from the stored outputs with warnings as errors, then read as files and in a browser."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
import scripts
from browser import serving

import drs_lib

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
WIDTHS = (1280, 390)  # pixels: a desktop's window, a phone's

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}. `pip install -e '.[docs]'` provides them."
)


check_links = scripts.load("docs/check_links.py")


def build(project, folder, *options):
    # The folder is another one than the pages', and what lies there counts as the project.
    command = [sys.executable, "-m", "sphinx", "-q", "-n", *options, "-c", project / "docs"]
    command += ["-d", folder / "doctrees", project, folder / "html"]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("site"), "-W", "--keep-going")


@pytest.fixture(scope="module")
def pages(site):
    """Pages by name, without those of the library's source text."""
    paths = [site / "index.html", *site.glob("docs/**/*.html"), *site.glob("notebooks/*.html")]
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def text_of(page):
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def article(page):
    return re.search(r"<article.*?</article>", page, re.S)[0]


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_no_link_is_broken(site):
    report = check_links.check(site)
    assert not report.broken, "\n".join(report.broken)
    assert report.pages >= 25 and report.links > 1000
    assert all(link.startswith("https://") for link in report.outside), report.outside


def test_the_checker_of_links_can_say_no(tmp_path, capsys):
    page = '<a href="b.html#here"></a><a href="{}"></a><img src="p.png"><a href="https://example.org/x">o</a>'
    (tmp_path / "p.png").touch()
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="#here"></a><a href="?q=1"></a>')
    for link, reason in {
        "b.html": "",
        "c.html": "no such file",
        "b.html#there": "no such place",
        "#top": "no such place",
        "../other/b.html": "leads out",
    }.items():
        (tmp_path / "a.html").write_text(page.format(link))
        report = check_links.check(tmp_path)
        assert (report.pages, report.links, len(report.broken)) == (2, 5, bool(reason))
        assert reason in "".join(report.broken) and report.outside == ["https://example.org/x"]
        assert check_links.main([str(tmp_path)]) == bool(reason)
    assert "leads out of the site" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="make site"):
        check_links.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_a_page_and_stands_in_the_table_of_contents(pages, path):
    title = cells(path, "markdown")[0].source.splitlines()[0].removeprefix("# ")
    page = pages[f"notebooks/{path.stem}.html"]
    assert text_of(re.search(r"<h1>.*?</h1>", article(page))[0]) == f"{title}#"
    first = re.search(
        rf'<a[^>]*href="\.\./notebooks/{path.stem}\.html"[^>]*>(.*?)</a>', pages["docs/index.html"], re.S
    )
    assert text_of(first[1]).strip() == title


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pages_show_the_stored_outputs_and_say_so(pages, path):
    page = article(pages[f"notebooks/{path.stem}.html"])
    text = text_of(page)
    assert "This page is a still" in text
    labs = any("drs_course.labs" in cell.source for cell in cells(path, "code"))
    assert ("sliders" in text[text.index("This page is a still") :][:200]) == labs
    outputs = [output for cell in cells(path, "code") for output in cell.outputs]
    printed = [output.text for output in outputs if output.output_type == "stream"]
    assert printed and all(part.strip() in text for part in printed)
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    included = sum(cell.source.count("![") for cell in cells(path, "markdown"))
    assert len(re.findall(r"<img ", page)) == len(drawn) + included


def test_every_picture_says_what_it_shows(pages):
    for name, page in pages.items():
        for image in re.findall(r"<img [^>]*>", article(page) if "<article" in page else ""):
            alt = re.search(r'alt="([^"]*)"', image)
            assert alt and len(alt[1]) > 10 and not alt[1].endswith(".png"), (name, image)
            assert not alt[1].startswith("Figure in the section"), f"{name}: no caption below {alt[1]}"


def test_every_formula_is_drawn_by_the_browser_itself(pages):
    formulas = [found for page in pages.values() for found in re.findall(r"<math.*?</math>", page, re.S)]
    assert len(formulas) > 200
    # A command that the converter doesn't know stays as it was.
    assert not [formula for formula in formulas if "\\" in text_of(formula)]


def test_every_public_name_is_documented(site):
    first = check_links.Page(site / "docs" / "api" / "index.html").links
    for name in drs_lib.__all__:
        home = getattr(drs_lib, name)
        anchor = f"{home.__module__}.{home.__qualname__}"
        (link,) = {link for link in first if link.endswith(f"#{anchor}")}
        assert anchor in check_links.Page(site / "docs" / "api" / link.split("#")[0]).names


def test_every_module_of_the_library_has_its_section(site):
    documented = {
        name.removeprefix("module-")
        for path in (site / "docs" / "api").glob("*.html")
        for name in check_links.Page(path).names
        if name and name.startswith("module-")
    }
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("drs_lib", "drs_course")
        for path in (ROOT / package).rglob("*.py")
    }
    # The package's own names have a table.
    assert modules - {"drs_lib"} | {"drs_doctor"} == documented


def test_docstrings_are_read_as_they_are_meant(pages):
    drs = article(pages["docs/api/drs.html"])
    suppress = re.search(r'id="drs_lib\.drs\.suppress">.*?</dl>\s*</dd></dl>', drs, re.S)[0]
    assert all(f"<strong>{name}</strong>" in suppress for name in ("x", "control", "ValueError"))
    # A line of Raises that begins in the middle of a sentence is no further exception.
    raised = re.findall(
        r"<strong>([^<]*)</strong>", re.search(r'id="drs_lib\.drs\.DRS">.*?<dt class="sig', drs, re.S)[0]
    )
    assert raised == ["ValueError"]
    maps = article(pages["docs/api/maps.html"])
    assert re.search(r"<pre>(<span></span>)?M\^c = ReLU\(F\^c\) / max F\^c  ", maps)
    training = text_of(article(pages["docs/api/training.html"]))
    assert "crf_…: the CRF of each" in training or "crf_...: the CRF of each" in training


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The site of a copy with a repository's address, two more pages, and one notebook, whose stored output
    was altered and which has a solution."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "docs", copy / "docs", ignore=shutil.ignore_patterns("api", "voc.md", "__pycache__")
    )
    for name in ("README.md", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for package in ("drs_lib", "drs_course"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "pyproject.toml", "a", encoding="utf-8") as stream:
        stream.write('\n[project.urls]\nRepository = "https://github.com/OWNER/NAME.git"\n')
    (copy / "docs" / "teaching.md").write_text(
        "# For lecturers\n\nOf these, 20\n% are kept.\n\n[README](../README.md#results)\n"
    )
    (copy / "CONTRIBUTING.md").write_text(
        "# How to contribute\n\n[README](README.md), [VOC](docs/teaching.md)\n"
    )
    (copy / "notebooks").mkdir()
    notebook = json.loads((ROOT / "notebooks" / "lab.ipynb").read_text(encoding="utf-8"))
    output = next(o for cell in notebook["cells"] for o in cell.get("outputs", []) if "text" in o)
    output["text"] = ["no cell printed this: 31.41592\n"]
    solution = ["x = 1\n", "### BEGIN SOLUTION\n", "answer = {}\n", "### END SOLUTION"]
    solved = deepcopy(notebook["cells"][-1])
    solved["source"] = [line.format(42) for line in solution]
    lines = [
        "**1. Why?**\n",
        "\n",
        "<!-- ### BEGIN SOLUTION -->\n",
        "Because *of it*.\n",
        "<!-- ### END SOLUTION -->",
    ]
    texts = [
        {"cell_type": "markdown", "metadata": {}, "source": text}
        for text in (["## Exercises\n\nOf these, 20\n% are kept."], lines)
    ]
    notebook["cells"] += [texts[0], solved, texts[1]]
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{number}"
    (copy / "notebooks" / "lab.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    return build(copy, tmp_path_factory.mktemp("elsewhere"))


def test_nothing_is_executed(elsewhere):
    page = (elsewhere / "notebooks" / "lab.html").read_text(encoding="utf-8")
    assert "no cell printed this: 31.41592" in text_of(page)


def test_the_guides_have_their_place(elsewhere):
    contents = (elsewhere / "docs" / "index.html").read_text(encoding="utf-8")
    assert 'href="teaching.html"' in contents and 'href="../CONTRIBUTING.html"' in contents
    assert "index.html#results" in check_links.Page(elsewhere / "docs" / "teaching.html").links
    assert {"docs/index.html", "docs/teaching.html"} <= set(
        check_links.Page(elsewhere / "CONTRIBUTING.html").links
    )


def test_solutions_are_folded(elsewhere):
    page = (elsewhere / "notebooks" / "lab.html").read_text(encoding="utf-8")
    code, text = re.findall(r"<details.*?</details>", article(page), re.S)
    assert "answer = 42" in text_of(code) and "Show the solution" in text_of(code)
    assert "Because" in text_of(text) and "<em>of it</em>" in text
    assert not any("open" in folded[: folded.index(">")] for folded in (code, text))
    assert "SOLUTION" not in page and "NBVAL" not in page


def test_with_a_repository_notebooks_have_buttons(elsewhere):
    page = (elsewhere / "notebooks" / "lab.html").read_text(encoding="utf-8")
    assert "https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/lab.ipynb" in page
    assert "https://mybinder.org/v2/gh/OWNER/NAME/main?urlpath=lab/tree/notebooks/lab.ipynb" in page
    assert "pip install git+https://github.com/OWNER/NAME" in text_of(page)


def test_buttons_are_there_if_the_project_names_its_repository(pages):
    conf = scripts.load("docs/conf.py")
    assert conf.repository_options("") == {}
    assert "colab_url" not in conf.repository_options("https://gitlab.com/OWNER/NAME")["launch_buttons"]
    for name, page in pages.items():
        buttons = [
            host for host in ("mybinder.org", "colab.research.google.com") if f'"https://{host}' in page
        ]
        wanted = bool(conf.REPOSITORY) and name.startswith("notebooks/")
        assert bool(buttons) == wanted, (name, conf.REPOSITORY)


@pytest.fixture(scope="module")
def chromium():
    missing = serving.missing()
    if missing:
        pytest.skip(missing)
    with serving.chromium() as browser:
        yield browser


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_window_and_fetch_nothing(site, pages, chromium, width):
    fetched = []
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.on("request", lambda request: fetched.append(request.url))
    too_wide = {}
    for name in pages:
        if name == "index.html":  # which leads on to docs/index.html
            continue
        page.goto((site / name).as_uri())
        widest = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        if widest > width:
            too_wide[name] = widest
    page.close()
    assert not too_wide
    assert not [url for url in fetched if not url.startswith(("file:", "data:"))]


def test_the_site_begins_with_the_readme(site, chromium):
    page = chromium.new_page()
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")
    assert page.locator("h1").first.inner_text().startswith("drs-course")
    assert page.locator("article img").first.evaluate("image => image.complete && image.naturalWidth > 0")
    page.close()


def test_search_finds_notebooks_and_the_library(site, chromium):
    assert (site / "searchindex.js").stat().st_size > 10_000
    page = chromium.new_page()
    page.goto((site / "search.html").as_uri() + "?q=pseudo_labels")
    page.wait_for_selector("#search-results a")
    page.wait_for_function("document.querySelectorAll('#search-results li').length >= 4")
    found = page.eval_on_selector_all(
        "#search-results a", "links => links.map(link => link.getAttribute('href'))"
    )
    assert any("notebooks/" in link for link in found) and any("docs/api/" in link for link in found), found
    page.close()


def test_lines_that_begin_with_a_percent_sign_are_there(elsewhere):
    for name in ("docs/teaching.html", "notebooks/lab.html"):
        text = " ".join(text_of((elsewhere / name).read_text(encoding="utf-8")).split())
        assert "Of these, 20 % are kept." in text, name


def test_no_delimiter_of_a_solution_became_a_heading(site):
    found = [path for path in site.rglob("*.html") if "_modules" not in path.parts]
    assert site / "CONTRIBUTING.html" in found
    for path in found:
        headings = re.findall(r"<h[1-6]>[^<]*", path.read_text(encoding="utf-8"))
        assert not [text for text in headings if "SOLUTION" in text], path
