"""The table of networks behind ``docs/reference/networks.md``: what ``dcafy list --json`` finds in every one of them.

    python docs/make_networks.py              # looks at each network that the table has not; an hour for all of them
    python docs/make_networks.py --seconds 120    # stops after so long; the same command goes on
    python docs/make_networks.py --anew       # of new versions of torchvision and timm

Nothing is downloaded: networks are built without weights.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dcafy.disk import replace_file
from dcafy.sources.listing import listed, specs_that_match

TABLE = Path(__file__).parent / "reference" / "networks.json"


def read() -> dict[str, Any]:
    """The committed table: ``versions`` of the packages, and ``networks``, by their specs."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def write(table: dict[str, Any]) -> None:
    """One line for each network, sorted, so that a difference can be read."""
    head = json.dumps(table["versions"])
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table["networks"].items())]
    text = '{"versions": ' + head + ', "networks": {\n' + ",\n".join(rows) + "\n}}\n"
    replace_file(TABLE, lambda beside: beside.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="begin with an empty table")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()

    versions = {name: version(name).partition("+")[0] for name in ("torch", "torchvision", "timm")}
    table = read() if TABLE.exists() and not options.anew else {"networks": {}}
    table["versions"] = versions
    left = [spec for spec in specs_that_match("*") if spec not in table["networks"]]
    end = time.monotonic() + options.seconds
    for spec in left:
        for row in listed([spec], None, lambda: None):
            if row.failed:
                print(f"{spec}: {row.failed}")
            table["networks"][spec] = {"attention": row.attention, "connections": row.connections}
        if time.monotonic() > end:
            break
    write(table)
    print(f"{len(table['networks'])} networks, {len(specs_that_match('*')) - len(table['networks'])} to come")


if __name__ == "__main__":
    main()
