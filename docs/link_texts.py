"""Gives links without a text, ``[](page.md#heading)``, the title of what they lead to.

    python docs/link_texts.py

Sphinx would write the title there by itself; where the repository is shown, nothing would stand there.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def title(page: Path, heading: str) -> str:
    """The heading of that anchor, or the page's own title."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-"): one for one in headings}
    return anchors.get(heading, headings[0])


def filled(page: Path) -> str:
    """The text of a page with every link told."""

    def told(found: re.Match[str]) -> str:
        path, _, heading = found[1].partition("#")
        return f"[{title((page.parent / path) if path else page, heading)}]({found[1]})"

    return re.sub(r"\[\]\(([^)\s]+\.md(?:#[^)\s]*)?)\)", told, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in HERE.rglob("*.md"):
        if not page.is_relative_to(HERE / "made") and filled(page) != page.read_text(encoding="utf-8"):
            page.write_text(filled(page), encoding="utf-8")
            print(page.relative_to(HERE.parent))
