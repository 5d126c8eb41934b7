"""All five stages on one page, with outputs and pictures, for a reader who has only a browser.

    python docs/lab/notebook.py            runs docs/tour.py cell by cell, writes docs/tour.ipynb

Needs nbclient, ipykernel and matplotlib. A cell of tour.py starts with a line "# %%"; one of text
with "# %% [markdown]". The models stay in out/tour.
"""
import argparse
import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]


def cells_of(source):
    """The text of tour.py -> a list of (is it code, text)."""
    cells = []
    for part in source.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        lines, code = body.strip("\n").split("\n"), "[markdown]" not in head
        if not code:                                       # a comment there, a text here
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append((code, "\n".join(lines).strip("\n")))
    return cells


def notebook_of(source):
    """The text of tour.py -> a notebook without outputs, as nbformat 4.5 describes one."""
    cells = []
    for i, (code, text) in enumerate(cells_of(source)):
        cell = {"cell_type": "code" if code else "markdown", "id": f"cell{i}", "metadata": {},
                "source": text.splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if code else {}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def run(notebook, folder):
    """Executes it in a folder -> the notebook with its outputs; stops at a cell that fails."""
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError:
        raise SystemExit("this needs nbclient and ipykernel: pip install nbclient ipykernel "
                         "matplotlib") from None
    node = nbformat.reads(json.dumps(notebook), as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(node, timeout=None, kernel_name="python3", resources=resources).execute()
    for cell in node.cells:                                # when a cell ran is of no interest, and
        cell.metadata.pop("execution", None)               # would make every run another file
    return json.loads(nbformat.writes(node))               # plain, with lines in place of texts


def main(argv=None):
    p = argparse.ArgumentParser(description="Make docs/tour.ipynb from docs/tour.py.")
    p.add_argument("--source", default=str(DOCS / "tour.py"), help="a script in cells")
    p.add_argument("--to", default=str(DOCS / "tour.ipynb"), help="the notebook")
    args = p.parse_args(argv)
    source, target = Path(args.source).read_text(encoding="utf-8"), Path(args.to)
    done = run(notebook_of(source), target.resolve().parent)
    target.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
