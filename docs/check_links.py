"""Check the built site: ``python docs/check_links.py site/html`` (part of ``make check-links``).

Every relative link leads to a file, and every fragment to an element. Links to other sites are listed, not
fetched.
"""

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Report(NamedTuple):
    """pages and links: how many; broken: sentences; outside: addresses on other sites, sorted."""

    pages: int
    links: int
    broken: list
    outside: list


class Page(HTMLParser):
    """What a page links to, and the names of its elements that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src", "data", "poster") and value:
                self.links.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.names.add(value)


def check(folder):
    """The `Report` of a folder of pages.

    Raises:
        FileNotFoundError: there is no page in it.
    """
    folder = Path(folder).resolve()
    # Under _static lie the theme's templates, which are no pages.
    paths = sorted(path for path in folder.rglob("*.html") if "_static" not in path.parts)
    pages = {path: Page(path) for path in paths}
    if not pages:
        raise FileNotFoundError(f"there is no page in {folder}; `make site` builds them into site/html.")
    links, broken, outside = 0, [], set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or parts.netloc:
                outside.add(link)
            elif not parts.scheme:
                links += 1
                reason = _why_broken(pages, folder, path, unquote(parts.path), unquote(parts.fragment))
                if reason:
                    broken.append(f"{path.relative_to(folder).as_posix()}: {link}: {reason}")
    return Report(len(pages), links, broken, sorted(outside))


def _why_broken(pages, folder, path, target, fragment):
    to = (path.parent / target).resolve() if target else path
    if folder not in to.parents:
        return "leads out of the site"
    if not to.is_file():
        return "no such file"
    if fragment and to in pages and fragment not in pages[to].names:
        return "no such place on the page"
    return ""


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Check the links of the built site.")
    parser.add_argument("folder", nargs="?", default="site/html", help="the pages (default: site/html)")
    try:
        report = check(parser.parse_args(arguments).folder)
    except FileNotFoundError as error:
        sys.exit(f"check_links: {error}")
    for link in report.outside:
        print(f"not checked: {link}")
    for sentence in report.broken:
        print(f"broken: {sentence}")
    print(f"{report.pages} pages, {report.links} links within the site, {len(report.broken)} broken")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
