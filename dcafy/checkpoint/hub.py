"""Folders on the Hugging Face Hub: ``hf://user/name[@revision]``.

Three files are asked for by names of dcafy's own (``dcafy.json`` and the tensors that it may name); what else is in a
repository is not looked at, and no name from there becomes a path here. Nothing that comes is unpickled or run: it is
read as every folder from a stranger is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dcafy.checkpoint.card import CARD, without_folders
from dcafy.checkpoint.description import FILES, Description, described, read
from dcafy.checkpoint.folder import MARKER, Folder
from dcafy.disk import content
from dcafy.errors import CheckpointError, SourceError, UsageError
from dcafy.wording import needing, one_line, printable, quoted

_SCHEME = "hf://"

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_-])?"
_REPOSITORY = re.compile(rf"(?P<name>{_PART}/{_PART})")
_ADDRESS = re.compile(rf"hf://{_REPOSITORY.pattern}(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9_./-]{{0,199}}))?")


@dataclass(frozen=True)
class Address:
    """A repository, ``user/name``, and a branch, tag or commit of it."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{_SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_address(spec: str) -> bool:
    """Whether the spec names something on the Hub.

    >>> is_address("hf://user/name@v2"), is_address("runs/flowers")
    (True, False)
    """
    return spec.startswith(_SCHEME)


def parsed(spec: str) -> Address:
    """The address that a spec means; ``UsageError`` where it means none."""
    found = _ADDRESS.fullmatch(spec)
    if found is None or ".." in spec or "--" in spec:
        raise UsageError(
            f"{quoted(spec, 200)} names nothing on the Hub. Write hf://user/name, or hf://user/name@revision."
        )
    return Address(found["name"], found["revision"])


def fetched(spec: str) -> Folder:
    """The folder that lies at ``hf://user/name[@revision]``, in the Hub's own cache on this disk.

    What is in the cache already is not fetched again; where there is no network, that is what is taken.

    Raises ``UsageError`` for an address that is none and where ``huggingface_hub`` is missing, ``SourceError`` where
    there is no such repository or it cannot be reached, ``CheckpointError`` where what lies there is no folder of
    dcafy's.
    """
    address = parsed(spec)
    marker = _file(address, MARKER)
    commit = marker.parent.name
    pinned = dataclasses.replace(address, revision=commit if re.fullmatch("[0-9a-f]{40}", commit) else address.revision)
    description = read(_text(marker, address), str(address))
    tensors = _file(pinned, description.weights.file)  # of the same commit, whoever pushes meanwhile
    if tensors.parent != marker.parent:
        raise CheckpointError(f"{address} changed while it was fetched. Try again.")
    return Folder(marker.parent, named=str(address))


def _text(marker: Path, address: Address) -> bytes:
    try:
        return content(marker, 2**24)
    except OSError as error:
        raise CheckpointError(f"{address} could not be read: {one_line(error)}.") from error


def _file(address: Address, name: str) -> Path:
    """Where the file of that name lies in the cache, once it is there."""
    with needing("The Hub", "hub", "huggingface_hub"):
        import huggingface_hub
    with _explained(address, name):
        path = Path(huggingface_hub.hf_hub_download(address.name, name, revision=address.revision))
    # The file is a link into a folder beside; a link to elsewhere was not made by the Hub's library.
    home = path.parents[2]
    inside = any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place)) for place in (home, home.parent))
    if path.name != name or not inside:
        raise CheckpointError(f"{name} of {address} leads out of the Hub's cache, so it is not read. Clear that cache.")
    return path


@contextlib.contextmanager
def _explained(address: Address, name: str | None = None) -> Iterator[None]:
    """Inside it what the Hub answers becomes an error that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{address} is open to some only. Ask for access there, then log in: hf auth login."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"There is no {address} on the Hub, or it is private: then log in, with hf auth login."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{address.name} has no revision {quoted(str(address.revision))}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"The Hub cannot be reached, and {address} is not in its cache here. Check the connection."
        ) from error
    except errors.EntryNotFoundError as error:
        hint = ""
        if address.name.startswith("timm/"):
            hint = f" It is timm's own: name it timm:{address.name.partition('/')[2]}@DEFAULT."
        raise CheckpointError(f"{address} has no {name}, so dcafy did not write it.{hint}") from error
    except Exception as error:  # its own errors, those of what it asks with, and RuntimeErrors of its uploads
        raise SourceError(f"{address} could not be reached ({printable(one_line(error)[:200])}).") from error


# --- there ------------------------------------------------------------------------------------------------


def push_to_hub(
    model: nn.Module | str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    message: str = "Saved with dcafy",
    revision: str | None = None,
) -> str:
    """The address ``hf://user/name[@revision]`` at which :func:`dcafy.load` finds ``model`` from now on.

    ``model``: a connected network, or a folder that dcafy wrote. Its description, its tensors and its card go there
    (``dcafy.json``, ``model.safetensors``, ``README.md``) and nothing else of a run; of the data that it was trained on
    the name and not the path. ``private``: whether the repository, where it is new, is for you alone. ``revision``: the
    branch. Needs ``huggingface_hub`` (``pip install 'dcafy[hub]'``) and a login (``hf auth login``).

    Raises ``UsageError`` for a name that is none, ``CheckpointError`` for a folder that is none or damaged,
    ``SourceError`` where the Hub refuses or cannot be reached.
    """
    name = name.removeprefix(_SCHEME)
    address = parsed(f"{_SCHEME}{name}" + (f"@{revision}" if revision else ""))
    with needing("The Hub", "hub", "huggingface_hub"):
        import huggingface_hub
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / "model"
        _staged(model, staged)
        with _explained(address):
            hub: Any = huggingface_hub.HfApi()
            hub.create_repo(address.name, private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=address.name,
                folder_path=str(staged),
                commit_message=message,
                revision=address.revision,
                allow_patterns=[MARKER, *FILES.values(), CARD],
                delete_patterns=[*FILES.values()],  # of another model that was there; what is uploaded stays
            )
    return str(address)


def _staged(model: nn.Module | str | os.PathLike[str], place: Path) -> None:
    """What goes to the Hub, in a folder of its own."""
    if isinstance(model, nn.Module):
        from dcafy.checkpoint.saving import save

        save(model, place)
        description, _ = Folder(place).read()
    else:
        folder = Folder(model)
        description, _ = folder.read()  # damaged ones are told now
        place.mkdir()
        for name in (description.weights.file, CARD):
            if (folder.path / name).is_file():
                shutil.copyfile(folder.path / name, place / name)
    (place / MARKER).write_text(described(_without_paths(description)), encoding="utf-8")


def _without_paths(description: Description) -> Description:
    about = description.about
    if about is None or about.trained is None:
        return description
    trained = dataclasses.replace(about.trained, data=without_folders(about.trained.data))
    return dataclasses.replace(description, about=dataclasses.replace(about, trained=trained))
