"""From what a user can name to a network: a spec, a file or a folder is opened, safely.

``opening``   the one door
``files``     what a file is, told by its first bytes, and what it holds
``pickles``   which pickles may be opened, and opening them
``contents``  the network or the weights in what was saved
"""

from dcafy.sources.opening import Source, open_model
from dcafy.zoos.specs import build_architecture

__all__ = ["Source", "build_architecture", "open_model"]
