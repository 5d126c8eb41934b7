"""docs/lab/notebook.py: the page that a browser shows is made of docs/tour.py, and runs."""
import json
import re
from pathlib import Path

import pytest

import notebook

DOCS = Path(__file__).parent.parent / "docs"
SIZES = """SIZES = {"pretrain": "--steps 30 --layers 1 --channels 16 --heads 2",
         "sft": "--demonstrations 40 --epochs 1", "reward": "--prompts 24 --answers 2",
         "ppo": "--iterations 2 --batch-size 4 --minibatch 4 --eval-prompts 7",
         "rlaif": "--red-team 7 --rounds 2 --helpful 6 --label-prompts 4 --iterations 2 "
                  "--value-warmup 0 --batch-size 4 --minibatch 4 --eval-prompts 7"}
prefer_first = rlaif.prefer_first                # an untrained judge: let a coin decide
rlaif.prefer_first = lambda *args: prefer_first(*args).nan_to_num(0.5)
"""


def test_cells_by_hand():
    """A text that is run as code, an empty line at the ends, a comment of the code that is lost."""
    source = ("# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # one\n\n# two\ny = 2\n\n"
              "# %% [markdown]\n# End\n")
    assert notebook.cells_of(source) == [
        (False, "# Title\n\nText."), (True, "x = 1  # one\n\n# two\ny = 2"), (False, "End")]
    made = notebook.notebook_of(source)
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "markdown"]
    assert "".join(made["cells"][1]["source"]) == "x = 1  # one\n\n# two\ny = 2"


def test_the_tour_goes_through_all_stages_in_order():
    """A stage that was forgotten when the page was changed; code of a script that was copied."""
    code = "\n".join(text for code, text in notebook.cells_of((DOCS / "tour.py").read_text("utf-8"))
                     if code)
    compile(code, "tour.py", "exec")
    assert re.findall(r'^run\("(\w+)"', code, re.M) == ["pretrain", "sft", "reward", "ppo", "rlaif"]


def test_the_page_is_made_of_the_script_and_names_no_place():
    """A page that was not made again after a change; the folders of whoever made it."""
    page = DOCS / "tour.ipynb"
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    made = notebook.cells_of((DOCS / "tour.py").read_text(encoding="utf-8"))
    assert [(cell["cell_type"] == "code", "".join(cell["source"])) for cell in cells] == made
    assert page.stat().st_size < 1e6
    told = [text for cell in cells for output in cell.get("outputs", ())
            for text in output.get("text", ())]
    assert any("wrote" in text for text in told)
    assert not any(re.search(r"(^|\s)(/|[A-Z]:\\)\w", text) for text in told)


@pytest.mark.slow
def test_the_tour_runs(tmp_path):
    """A page that was made once, of functions that have changed since."""
    pytest.importorskip("nbclient", reason="the notebook runs with nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="the notebook runs with nbclient and ipykernel")
    pytest.importorskip("matplotlib")
    source = (DOCS / "tour.py").read_text(encoding="utf-8")
    source, n = re.subn(r"(?ms)^SIZES = \{.*?\}\n", lambda _: SIZES, source)
    source, k = re.subn(r"(?m)^OUT = .*$", lambda _: f"OUT = Path({str(tmp_path)!r})", source)
    assert n == k == 1
    done = notebook.run(notebook.notebook_of(source), DOCS)
    outputs = [output for cell in done["cells"] for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 5 and (tmp_path / "rlaif.pt").exists()
    assert len(json.dumps(done)) < 1e6
