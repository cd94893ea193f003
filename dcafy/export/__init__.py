"""A network as a file that runs without dcafy: ONNX, or a program of ``torch.export``.

``writing``   the file, with what is known of the network in it, checked before it is there
``detectors`` that of a detector
``examples``  real pictures to check it on
``options``   what is asked for, as frozen data
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcafy.fronts import front

if TYPE_CHECKING:
    from dcafy.export.options import ExportOptions
    from dcafy.export.writing import Exported, export

_HOME = {"ExportOptions": "options", "Exported": "writing", "export": "writing"}

__all__ = ["ExportOptions", "Exported", "export"]


__getattr__, __dir__ = front(__name__, _HOME)
