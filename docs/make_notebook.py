"""Executes the notebooks of the documentation, in place: their outputs are committed with them.

    pip install 'dcafy[docs]' && python docs/make_notebook.py

To change one, open it in Jupyter, save it, and run this: it executes every cell in a new kernel, and leaves out what
differs from run to run (times, widgets, counts of cells).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def executed(path: Path) -> None:
    """The notebook with the outputs that it has now."""
    os.environ.setdefault("PYTHONHASHSEED", "0")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False, resources={}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if _says_something(out)]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, path)


def _says_something(output: Any) -> bool:
    data = output.get("data", {})
    return output.get("name") != "stderr" and (not data or any(str(shown).strip("\n") for shown in data.values()))


if __name__ == "__main__":
    for notebook in sorted(HERE.glob("tutorials/*.ipynb")):
        executed(notebook)
        print(notebook.relative_to(HERE.parent))
