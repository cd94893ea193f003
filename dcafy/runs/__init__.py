"""``dcafy finetune`` as a folder: what was asked for, where it stands, what it has measured, and the model."""

from typing import TYPE_CHECKING

from dcafy.fronts import front

if TYPE_CHECKING:
    from dcafy.runs.compare import Comparison, compare
    from dcafy.runs.options import RunOptions
    from dcafy.runs.request import Request, read_request, write_request

__all__ = ["Comparison", "Request", "RunOptions", "compare", "read_request", "write_request"]

_HOME = {
    "Comparison": "compare",
    "Request": "request",
    "RunOptions": "options",
    "compare": "compare",
    "read_request": "request",
    "write_request": "request",
}

__getattr__, __dir__ = front(__name__, _HOME)
