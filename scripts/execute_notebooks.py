"""Execute the notebooks: `examples/notebooks/NAME.md` -> `NAME.ipynb` beside it, with the outputs.

    python -m scripts.execute_notebooks [NAME ...]      or: make notebooks

The Markdown is what is edited. Neither times nor random ids are stored, so a second execution changes only its findings.
The real base and the headlines are unpacked below .cache/ first (see `benchmarks.quality.real.packages`).
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from benchmarks.quality.real.packages import EVALS, fetched
from benchmarks.quality.real.weights import base_folder

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
HEADLINES = "evals/registry/data/sarcasm/samples.jsonl"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
NOISE = re.compile("Failed to load CPU gemm_4bit_forward|IProgress not found")
"""What bitsandbytes says without its kernels, and tqdm without widgets: they are of the environment, not of the notebook."""


def names() -> list[str]:
    """The notebooks there are."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.md"))


def unexecuted(name: str) -> NotebookNode:
    """The notebook as its Markdown says, without outputs, and with ids that are always the same."""
    notebook = jupytext.read(NOTEBOOKS / f"{name}.md")
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", NotebookNode()
    return notebook


def execute(notebook: NotebookNode) -> NotebookNode:
    """Execute every cell in order; an error in a cell is raised."""
    NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": NOTEBOOKS}}).execute()
    notebook.metadata.pop("language_info", None)  # the version of one Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not NOISE.search(output.get("text", ""))]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    asked = parser.parse_args().names or names()
    unknown = sorted(set(asked) - set(names()))
    if unknown:
        parser.error(f"there is no notebook {', '.join(unknown)}; there are {', '.join(names())}")
    os.environ["SHADOW_PEFT_BASE"] = str(base_folder())
    os.environ["SHADOW_PEFT_HEADLINES"] = str(fetched(EVALS) / HEADLINES)
    for name in asked:
        nbformat.write(execute(unexecuted(name)), NOTEBOOKS / f"{name}.ipynb")
        print(NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
