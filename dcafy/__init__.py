"""Model surgery for convolutional attention: connect the attention blocks of a trained network.

The packages, in the order in which a network passes them::

    zoos, sources        what the user names          ->  a network
    trace                a network                    ->  a recording (in the terms of graph)
    find                 a recording                  ->  its attention blocks
    link                 blocks                       ->  a plan of who hears whom, and what
    emit                 a plan                       ->  the connected network
    attention            a network without attention  ->  one with it
    checkpoint           a connected network         <->  a folder
    images, training     a network and data           ->  a better network
    detection, runs      the same for boxes; a training as a folder
    analysis, report     what its attention does, as data and on a page
    cli                  all of it on the command line

``survey`` takes trace, find and link in one go, ``conversion`` the whole path; ``plan`` has the words, ``converted``
what a user does with the result. Names are resolved when they are first used, so that ``dcafy --help`` does not wait
for torch.
"""

from __future__ import annotations

from dcafy.fronts import front
from dcafy.version import __version__

TYPE_CHECKING = False  # and not from typing: ``python -m dcafy`` has the working folder on its path until __main__ runs
if TYPE_CHECKING:
    from dcafy.analysis.overview import summary
    from dcafy.analysis.usage import usage
    from dcafy.attention.insertion import insert
    from dcafy.checkpoint import load, push_to_hub, save
    from dcafy.conversion import convert, inspect
    from dcafy.converted import drop, freeze_base, parameter_groups, revert
    from dcafy.emit.connection import Connection
    from dcafy.emit.dca import connections
    from dcafy.emit.whole import flat
    from dcafy.emit.wire import run
    from dcafy.errors import (
        CheckpointError,
        DcafyError,
        InputError,
        Interrupted,
        NoAttentionError,
        PlanError,
        SourceError,
        TracingError,
        TrainingError,
        UsageError,
        VerificationError,
    )
    from dcafy.images.about import about, transforms
    from dcafy.plan.blocks import AttentionBlock, Chain, Link, Skipped
    from dcafy.plan.plan import Plan

_HOME = {
    "AttentionBlock": "plan.blocks",
    "Chain": "plan.blocks",
    "CheckpointError": "errors",
    "Connection": "emit.connection",
    "DcafyError": "errors",
    "InputError": "errors",
    "Interrupted": "errors",
    "Link": "plan.blocks",
    "NoAttentionError": "errors",
    "Plan": "plan.plan",
    "PlanError": "errors",
    "Skipped": "plan.blocks",
    "SourceError": "errors",
    "TracingError": "errors",
    "TrainingError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "about": "images.about",
    "connections": "emit.dca",
    "convert": "conversion",
    "drop": "converted",
    "flat": "emit.whole",
    "freeze_base": "converted",
    "insert": "attention.insertion",
    "inspect": "conversion",
    "load": "checkpoint",
    "parameter_groups": "converted",
    "push_to_hub": "checkpoint",
    "revert": "converted",
    "run": "emit.wire",
    "save": "checkpoint",
    "summary": "analysis.overview",
    "transforms": "images.about",
    "usage": "analysis.usage",
}
"""Public name -> the module it lives in."""

__all__ = [
    "AttentionBlock",
    "Chain",
    "CheckpointError",
    "Connection",
    "DcafyError",
    "InputError",
    "Interrupted",
    "Link",
    "NoAttentionError",
    "Plan",
    "PlanError",
    "Skipped",
    "SourceError",
    "TracingError",
    "TrainingError",
    "UsageError",
    "VerificationError",
    "__version__",
    "about",
    "connections",
    "convert",
    "drop",
    "flat",
    "freeze_base",
    "insert",
    "inspect",
    "load",
    "parameter_groups",
    "push_to_hub",
    "revert",
    "run",
    "save",
    "summary",
    "transforms",
    "usage",
]


__getattr__, __dir__ = front(__name__, _HOME)
