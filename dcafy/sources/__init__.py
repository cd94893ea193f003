"""From what a user can name to a network: a spec, a file or a folder is opened, safely.

``opening``   the one door
``options``   what a user says about a file
``files``     what a file is, told by its first bytes, and opening it
``archives``  what torch.save writes
``pickles``   a pickle machine that calls nothing which a file chooses
``values``    what the names in a pickle may stand for; ``tensors``, ``classes``: the two large kinds of them
``insides``   whether a network from a file has what one has inside
``contents``  the network or the weights in what was saved
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcafy.fronts import front

if TYPE_CHECKING:
    from dcafy.sources.opening import Source, open_model
    from dcafy.sources.options import FileOptions
    from dcafy.zoos.specs import build_architecture

_HOME = {
    "FileOptions": "options",
    "Source": "opening",
    "build_architecture": "dcafy.zoos.specs",
    "open_model": "opening",
}
"""Public name -> the module it lives in."""

__all__ = ["FileOptions", "Source", "build_architecture", "open_model"]


__getattr__, __dir__ = front(__name__, _HOME)
