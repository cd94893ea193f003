"""Builds the documentation into ``site/``: warnings are errors, and what was built is looked over.

    pip install 'dcafy[docs]' && python docs/build.py [-o site]

``bash .ci/site`` does both in a fresh clone.

Sphinx holds links between pages, their anchors and the names of the code; this file then holds the HTML itself: every
link inside of the site has a target, and no page asks the network for anything.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent

FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
"""Tag -> the attribute by which a browser fetches something without being asked."""


class Page(HTMLParser):
    """What a page links to, what it fetches, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if FETCHED.get(tag) in given:
            self.fetched.append(given[FETCHED[tag]])


def faults(site: Path) -> Iterator[str]:
    """What is wrong with a built site, one line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        where = path.relative_to(site)
        for target in (*page.fetched, *page.links):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.fetched and parts.scheme != "data":
                    yield f"{where} asks the network for {target}"
                continue
            found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not found.is_file():
                yield f"{where} leads to {target}, which is not there"
            elif parts.fragment and found in pages and unquote(parts.fragment) not in pages[found].anchors:
                yield f"{where} leads to {target}, an anchor that is not there"
    for path in (*site.rglob("*.css"), *site.rglob("*.js")):
        text = path.read_text(encoding="utf-8")
        if "url(http" in text.replace('"', "").replace("'", "") or "@import" in text:
            yield f"{path.relative_to(site)} asks the network for something"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=HERE.parent / "site", help="the folder of the site")
    site = parser.parse_args().output
    with tempfile.TemporaryDirectory() as place:
        built = Path(place) / "site"
        command = [sys.executable, "-m", "sphinx", "-qEaW", "--keep-going", "-b", "html", str(HERE), str(built)]
        if subprocess.run([*command, "-d", f"{place}/trees"], check=False).returncode:
            sys.exit("docs/build.py: the site has not been built; the warnings above are errors")
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(built, site, ignore=shutil.ignore_patterns(".buildinfo"))
    wrong = list(faults(site.resolve()))
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{site}: {len(list(site.rglob('*.html')))} pages. Open {site / 'index.html'}.")


if __name__ == "__main__":
    main()
