"""The report: what the attention of a network does, on one page.

``making``      the whole path: a network and images in, findings and a page out
``findings``    everything that is computed, as frozen data
``pictures``    the user's images; ``epochs`` the log of a fine-tuning
``page``        findings -> HTML, with ``figures`` (plots), ``thumbnails`` and ``downloads`` in it
``text``        findings -> a terminal
"""

from dcafy.report.epochs import EpochLog, RunLog, read_epochs, read_run
from dcafy.report.findings import Findings
from dcafy.report.making import make_report, prepared_for, run_in
from dcafy.report.text import print_findings

__all__ = [
    "EpochLog",
    "Findings",
    "RunLog",
    "make_report",
    "prepared_for",
    "print_findings",
    "read_epochs",
    "read_run",
    "run_in",
]
