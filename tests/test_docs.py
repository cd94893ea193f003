"""The pages of the documentation are true: their code runs, their links lead somewhere, their commands are there.

``docs/build.py`` builds the site from them, with warnings as errors; ``.ci/run`` does.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pages
import pytest
from pages import NOTEBOOKS, PAGES, PROSE, ROOT

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (*PROSE,)}
SHOWN = {"", "python", "console", "bash", "text", "{toctree}", "{include}", "{eval-rst}"}
ELSEWHERE = {"docs/in_place.md"}
"""Its one block has a test of its own, in ``test_clients.py``."""
SLOW = {"docs/howto/detectors.md", "docs/howto/export.md", "docs/howto/train_command.md"}
"""Pages with quick siblings: what they show is tried on smaller networks by the tests of its packages."""


def of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def with_language(language: str) -> list[str]:
    return [of(path) for path in PAGES if any(b.language == language for b in pages.blocks(TEXTS[of(path)]))]


def marked(names: list[str]) -> list[Any]:
    """Pages that are about a library of somebody else's take seconds to import it: those are slow, and some more."""
    slow = [name in SLOW or bool(pages.needs(TEXTS[name])) for name in names]
    return [pytest.param(name, marks=[pytest.mark.slow] * late) for name, late in zip(names, slow, strict=True)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_has_a_language(name: str) -> None:
    text = TEXTS[name]
    found = list(pages.blocks(text))
    if name.startswith("docs/"):
        assert {block.language for block in found} <= SHOWN
    # A fence that the pattern misses would hide its block from every test here.
    assert text.count("\n```") == 2 * len(found)


@pytest.mark.parametrize("name", marked([name for name in with_language("python") if name not in ELSEWHERE]))
@pytest.mark.filterwarnings("ignore:::(lightning|transformers|accelerate|peft|segmentation_models_pytorch)")
@pytest.mark.filterwarnings("ignore:The TorchScript type system")
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in pages.needs(TEXTS[name]):
        pytest.importorskip(package)
    found = list(pages.blocks(TEXTS[name]))
    # Where a command makes what the Python behind it reads, all of it runs below.
    first = next((n for n, block in enumerate(found) if block.language == "console"), len(found))
    pages.run(ROOT / name, found[:first], {"python"}, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", with_language("console"))
def test_commands_print_what_is_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(pages.blocks(TEXTS[name]))
    assert all(command.printed.strip() for b in found if b.language == "console" for command in pages.commands(b.text))
    pages.run(ROOT / name, found, {"python", "console"}, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python docs/make_notebook.py`` runs them, on less."""
    block = pages.Block("python", pages.cells(path, EPOCHS=1, IMAGES=128), 1)
    pages.run(path, [block], {"python"}, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", PROSE, ids=of)
def test_links_lead_somewhere(path: Path) -> None:
    assert pages.dead_links(path) == []
    assert "[](" not in pages.prose(path.read_text(encoding="utf-8")), "python docs/link_texts.py gives it its text"


# -- commands ------------------------------------------------------------------------------------------------------


def dcafy_lines(text: str) -> list[list[str]]:
    """The arguments of every ``dcafy ...`` that a block shows, and of those behind ``-m dcafy``."""
    found = []
    for block in pages.blocks(text):
        if block.language in ("bash", "console", "text"):
            for line in block.text.replace("\\\n", " ").splitlines():
                command = re.match(r"(?:\$ )?(?:.*-m )?dcafy (?!\w+:)(.*?)(?:\s+#.*| 2>&1.*| \| .*)?$", line)
                if command and command[1][:1].islower():
                    found.append(shlex.split(command[1]))
    return found


def commands_of_pages() -> list[Any]:
    return [
        pytest.param(words, id=" ".join(words)[:60])
        for name, text in TEXTS.items()
        if name != "CHANGELOG.md"
        for words in dcafy_lines(text)
    ]


@pytest.mark.parametrize("words", commands_of_pages())
def test_commands_and_their_options_are_there(words: list[str]) -> None:
    """Each is read as the command reads it, and not run: an option that there is not ends here."""
    import typer

    from dcafy.cli import app

    group: Any = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])


def unknown(text: str) -> list[str]:
    """Commands and options that prose names in passing (`` `dcafy finetune --resume` ``) and that there are not."""
    import typer

    from dcafy.cli import app

    group: Any = typer.main.get_command(app)
    found = []
    for code in re.findall(r"`dcafy ([^`]+)`", pages.prose(text)):
        name, *words = code.split()
        if name.isupper() or name.startswith("-"):  # any command, or an option of none
            continue
        known = {option for p in group.commands[name].params for option in (*p.opts, *p.secondary_opts)}
        found += [f"{name} {word}" for word in words if word.startswith("--") and word not in known | {"--help"}]
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_options_that_are_named_in_passing_are_there(name: str) -> None:
    assert unknown(TEXTS[name]) == []


def test_an_option_that_is_not_there_ends_the_test() -> None:
    with pytest.raises(Exception, match="--bogus"):
        test_commands_and_their_options_are_there(["inspect", "timm:seresnet50", "--bogus"])
    assert unknown("as `dcafy inspect --bogus x` does, or `dcafy list --json`") == ["inspect --bogus"]


# -- what is made --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Any:
    return pages.module("made")


def test_the_reference_has_every_option_with_its_help(made: Any) -> None:
    import typer

    from dcafy.cli import app

    text = "\n".join(made.commands())
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        section = text.partition(f"## dcafy {name}\n")[2].partition("\n## ")[0]
        rows = [row.split(" | ") for row in section.splitlines() if row.startswith("| `")]
        assert len(rows) >= len([parameter for parameter in command.params if not parameter.hidden])
        assert all(len(row) == 3 and row[1].strip() for row in rows), "an option without help"
        for parameter in command.params:
            assert parameter.hidden or parameter.opts[0] in section or parameter.metavar in section


def test_the_reference_has_every_error_with_its_exit_code(made: Any) -> None:
    from dcafy import errors

    rows = "\n".join(made.exit_codes())
    for name in errors.__all__:
        assert f"`dcafy.{name}`" in rows
    assert "| `dcafy.NoAttentionError` | 3 |" in rows


def test_every_public_name_is_in_the_reference(made: Any) -> None:
    import dcafy
    from dcafy import errors

    page = TEXTS["docs/reference/api.md"] + "\n".join(made.others())
    told = re.findall(r"auto(?:function|class):: dcafy\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(told) == sorted({*dcafy.__all__} - {*errors.__all__, "__version__"})


def test_every_choice_is_told_on_a_page() -> None:
    """A schema, topology or attention that a page does not name has been added without a word."""
    from dcafy.choices import CHOICES

    written = "".join(text for name, text in TEXTS.items() if name.startswith("docs/"))
    missing = [
        choice for choices in CHOICES.values() for choice in choices if not re.search(rf'[`"]{choice}["`]', written)
    ]
    assert missing == []


def test_the_table_of_networks_is_what_is_found_in_them(made: Any) -> None:
    import json

    from dcafy.sources.listing import listed

    table = json.loads((ROOT / "docs" / "reference" / "networks.json").read_text(encoding="utf-8"))["networks"]
    sample = [name for name in ("torchvision:mobilenet_v3_small", "timm:seresnet18", "timm:resnet10t") if name in table]
    assert sample
    for row in listed(sample, None, lambda: None):
        assert table[row.spec] == {"attention": row.attention, "connections": row.connections}


def test_pictures_are_those_that_the_script_makes_and_small() -> None:
    made = pages.module("screenshots")
    pictures = {path.stem: path.stat().st_size for path in (ROOT / "docs").glob("*.png")}
    assert pictures.keys() == made.PICTURES.keys()
    assert max(pictures.values()) <= made.LARGEST
    assert sum(pictures.values()) < 1_000_000
    written = "".join(text for name, text in TEXTS.items())
    unseen = {name for name in pictures if f"({name}.png)" not in written.replace("docs/", "")}
    assert unseen == {"report-1280-dark", "report-375-light"}  # the other scheme, to be looked at beside


def test_a_dead_link_and_a_dead_anchor_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading: *x*\n[a](#a-heading-x) [b](#nothing) [c](other.md) [d](page.md#a-heading-x)\n")
    assert pages.dead_links(page) == ["#nothing", "other.md"]


def test_a_site_with_dead_links_or_requests_is_told(tmp_path: Path) -> None:
    build = pages.module("build")
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="b.html#y">b</a><a href="#x">x</a><a href="c.html">c</a>')
    (tmp_path / "b.html").write_text('<script src="//host/a.js"></script><a href="a.html#x">a</a><img src="data:,">')
    (tmp_path / "s.css").write_text("p { background: url('https://host/a.png') }")
    assert list(build.faults(tmp_path)) == [
        "a.html leads to b.html#y, an anchor that is not there",
        "a.html leads to c.html, which is not there",
        "b.html asks the network for //host/a.js",
        "s.css asks the network for something",
    ]


def test_links_out_of_the_pages_lead_to_their_mirrors(made: Any) -> None:
    source = ["[a](../../benchmarks/results/zoo.md#x) [b](../finding.md) [c](../../tests/zoo.py) ![d](../report.png)"]
    made.links(None, "howto/page", source)
    assert source == ["[a](/made/benchmarks/results/zoo.md#x) [b](../finding.md) c ![d](../report.png)"]
    source = ["[a](docs/finding.md) [b](SECURITY.md)"]
    made.links(None, "made/CHANGELOG", source)
    assert source == ["[a](/finding.md) [b](/made/SECURITY.md)"]
