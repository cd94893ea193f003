"""What of the site is made from the code and from the repository's other files, so that no page repeats them.

``docs/made`` mirrors files of the repository as pages (``MIRRORED``), and has parts that pages include in
``docs/made/parts``: the commands and their options, exit codes, errors, schemas, networks. Nothing of it is committed.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MADE = HERE / "made"
MIRRORED = ("benchmarks/results/*.md", "examples/*.py", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Files of the repository that are pages of the site: what a page links to and does not lie in ``docs``."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def mirrored() -> dict[str, str]:
    """Path in the repository -> name of the page."""
    paths = sorted(path.relative_to(ROOT) for pattern in MIRRORED for path in ROOT.glob(pattern))
    return {path.as_posix(): f"/made/{path.with_suffix('').as_posix()}" for path in paths}


def write() -> None:
    """Everything under ``docs/made``, anew."""
    shutil.rmtree(MADE, ignore_errors=True)
    for path, page in mirrored().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            text = f"# {path}\n\n```python\n{text}```\n"
        _written(HERE / f"{page[1:]}.md", text)
    for name, lines in PARTS.items():
        _written(MADE / "parts" / f"{name}.md", "\n".join(lines()) + "\n")


def _written(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def links(app: Any, docname: str, source: list[str]) -> None:
    """Links of a page to what lies outside of ``docs`` lead to its mirror; where it has none, only their text stays.

    A list of pages may leave room for some by a pattern; where there are none yet, it is taken out.
    """
    home = (ROOT / docname.removeprefix("made/") if docname.startswith("made/") else HERE / docname).parent
    pages = mirrored()

    def led(found: re.Match[str]) -> str:
        path = os.path.relpath(os.path.normpath(home / found["path"]), ROOT)
        target = pages.get(path)
        if target is None and docname.startswith("made/") and path.startswith("docs/"):
            target = path.removeprefix("docs").removesuffix(".md")
        if target is not None:
            return f"[{found['text']}]({target}.md{found['anchor'] or ''})"
        lies_outside = not path.startswith("docs/") and (ROOT / path).exists()
        return found["text"] if lies_outside else found[0]  # what is not there the build cannot find, and says so

    if not docname.endswith(".ipynb") and source[0].lstrip()[:1] != "{":
        source[0] = _LINK.sub(led, source[0])
        room = (line for line in source[0].splitlines() if re.fullmatch(r"[./\w]+\*", line))
        for pattern in [line for line in room if not list((HERE / docname).parent.glob(f"{line}.md"))]:
            source[0] = source[0].replace(f"{pattern}\n", "")


_ENTRY = re.compile(r"(?P<names>``[\w<>, `]+``(?: \([^)]*\))?)(?::\s| {2,})(?P<text>.*)")


def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lines of a docstring that begin with the name of an argument or field become the entries of a list."""
    told: list[str] = []
    listed = False
    for line in lines:
        entry = _ENTRY.match(line)
        if entry is not None:
            told += [""] * (not listed and bool(told and told[-1]))
            told.append(f"- {entry['names']}: {entry['text']}")
        else:
            told.append(f"  {line.strip()}" if listed and line else line)
        listed = entry is not None or (listed and bool(line))
    lines[:] = told


# -- parts ---------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in row)} |"


def commands() -> Iterator[str]:
    """Every command with its arguments and options, by topic, as ``dcafy COMMAND --help`` has them."""
    import typer

    import dcafy.cli
    from dcafy.cli.help import TOPICS

    group: Any = typer.main.get_command(dcafy.cli.app)
    topic_of = {name: topic for topic, names in TOPICS.items() for name in names}
    for name, command in sorted(group.commands.items()):
        context = command.make_context(name, [], resilient_parsing=True)
        yield f"## dcafy {name}\n"
        yield f"{_prose(command.help or '')}\n"
        yield f"```text\ndcafy {name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
        yield f"Example:\n\n```text\n{command.epilog}\n```\n"
        rows: dict[str, list[tuple[str, str, str]]] = {topic: [] for topic in ("Arguments", *TOPICS, "Options")}
        for parameter in command.get_params(context):
            told = parameter.get_help_record(context)
            if told is not None:
                argument = not parameter.opts[0].startswith("-")
                rows["Arguments" if argument else topic_of.get(parameter.name, "Options")].append(_row(*told))
        for topic, found in rows.items():
            if found:
                yield f"**{topic}**\n"
                yield from table(("option", "what it does", "default"), found)
                yield ""


def _row(names: str, text: str) -> tuple[str, str, str]:
    """An argument or option: how it is written, its help, its default."""
    default = re.search(r"\s*\[default: (.*?)\]$", text.strip())
    return (
        f"`{names}`",
        _prose(text if default is None else text.strip()[: default.start()]),
        "" if default is None else _prose(default[1]),
    )


def _prose(text: str) -> str:
    """Help as Markdown: what would be markup there is text here."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"([*_<>\[\]])", r"\\\1", text)


def configurations() -> Iterator[str]:
    """Every frozen dataclass of options: field, type with its choices, default and meaning."""
    from dcafy.choices import CHOICES
    from dcafy.images.options import DataOptions
    from dcafy.plan.options import Conversion, Linking
    from dcafy.training.options import TrainingConfig

    for kind in (Linking, Conversion, TrainingConfig, DataOptions):
        yield f"### {kind.__name__}\n"
        yield f"{inspect.cleandoc(kind.__doc__ or '').splitlines()[0].replace(':func:', '')}\n"
        rows = []
        for item in dataclasses.fields(kind):
            choices = item.metadata.get("choices") or CHOICES.get(item.name, ())
            among = ", ".join(f"`{choice!r}`" for choice in choices) or f"`{item.type}`"
            rows.append((f"`{item.name}`", among, f"`{item.default!r}`", _prose(item.metadata.get("help", ""))))
        yield from table(("field", "values", "default", "what it is"), rows)
        yield ""


def exit_codes() -> Iterator[str]:
    """Error -> exit code, as the command has them."""
    from dcafy import errors
    from dcafy.cli.app import exit_code

    rows = []
    for name in errors.__all__:
        kind = getattr(errors, name)
        code = "130, 143" if kind is errors.Interrupted else str(exit_code(kind("")))
        rows.append((f"`dcafy.{name}`", code, (kind.__doc__ or "").splitlines()[0].replace(":func:", "")))
    yield from table(("error", "exit code", "what happened"), rows)


def schemas() -> Iterator[str]:
    """The tables of names that options choose from."""
    from dcafy.choices import CHOICES
    from dcafy.plan.options import Conversion

    fields = {item.name: item for item in dataclasses.fields(Conversion)}
    rows = []
    for name, item in fields.items():
        choices = item.metadata["choices"] or CHOICES.get(name, ())
        rows.append(
            (f"`{name}`", ", ".join(f"`{choice}`" for choice in choices) or f"`{item.type}`", f"`{item.default}`")
        )
    yield from table(("option of `convert`", "values", "default"), rows)


def networks() -> Iterator[str]:
    """The networks with attention, in a table that a field searches; the others as a list of names."""
    found = json.loads((HERE / "reference" / "networks.json").read_text(encoding="utf-8"))
    having = {name: row for name, row in found["networks"].items() if row["attention"]}
    connectable = sum(row["connections"] > 0 for row in having.values())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield (
        f"{len(found['networks']):,} networks of {versions}: {len(having):,} have attention blocks, and in "
        f"{connectable:,} of them there is something to connect."
    )
    yield ""
    yield '<p><label>Search: <input id="networks-search" type="search" placeholder="seresnet, eca, mobilenet ...">'
    yield '</label> <span id="networks-count"></span></p><table id="networks" class="docutils">'
    yield "<thead><tr><th>network</th><th>attention</th><th>connections</th></tr></thead><tbody>"
    for name, row in having.items():
        has = ", ".join(f"{count} {kind}" for kind, count in row["attention"].items())
        cells = (f"<code>{html.escape(name)}</code>", html.escape(has), str(row["connections"]))
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</tbody></table>"
    yield ""
    yield "## Without attention of their own\n"
    yield (
        "`--attention se` (or another kind) puts attention into those that have residual units: "
        "[Add attention](../howto/add_attention.md).\n"
    )
    others = [html.escape(name) for name, row in found["networks"].items() if not row["attention"]]
    yield f"<details><summary>{len(others):,} networks</summary><p>"
    yield "\n".join(f"<code>{name}</code>" for name in others)
    yield "</p></details>"


PARTS = {
    "commands": commands,
    "configurations": configurations,
    "exit_codes": exit_codes,
    "options": schemas,
    "networks": networks,
}
"""Name of a part -> what yields its lines."""
