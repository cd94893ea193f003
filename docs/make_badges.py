"""The README's badges, as pictures of our own: they ask no host for anything.

python docs/make_badges.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def badges() -> dict[str, tuple[str, str, str]]:
    """Name -> what its two halves say, and the colour of the second, all from the project's own files."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.*)"$', (ROOT / "dcafy" / "version.py").read_text(encoding="utf-8"), re.M)
    return {
        "version": ("dcafy", version[0], "#1d4ed8"),
        "python": ("python", re.findall(r'^requires-python = ">=(.*)"$', project, re.M)[0] + "+", "#1d4ed8"),
        "torch": ("torch", re.findall(r'"torch>=(.*)"', project)[0] + "+", "#c2410c"),
        "license": ("license", re.findall(r'^license = "(.*)"$', project, re.M)[0], "#15803d"),
        "types": ("mypy", "strict", "#15803d"),
    }


def drawn(left: str, right: str, colour: str) -> str:
    """One badge as SVG; a letter of 11 px is taken to be 6.6 px wide."""
    first, second = (round(6.6 * len(text) + 14) for text in (left, right))
    width = first + second
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{left}: {right}">'
        f'<rect width="{width}" height="20" rx="4" fill="#374151"/>'
        f'<path d="M{first} 0h{second - 4}a4 4 0 0 1 4 4v12a4 4 0 0 1-4 4h-{second - 4}z" fill="{colour}"/>'
        '<g fill="#ffffff" text-anchor="middle" font-family="DejaVu Sans,Verdana,sans-serif" font-size="11">'
        f'<text x="{first / 2:g}" y="14">{left}</text><text x="{first + second / 2:g}" y="14">{right}</text>'
        "</g></svg>\n"
    )


def main() -> None:
    folder = ROOT / "docs" / "badges"
    folder.mkdir(exist_ok=True)
    for name, says in badges().items():
        (folder / f"{name}.svg").write_text(drawn(*says), encoding="utf-8")


if __name__ == "__main__":
    main()
