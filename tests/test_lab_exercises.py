"""docs/lab/exercises.py: what the chapters tell is what its commands wrote."""
import json
import re
from pathlib import Path

import pytest

import exercises

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}


def test_each_exercise_stands_in_a_chapter_with_its_command():
    """An answer to another question than the one that is asked; a mark that no exercise fills."""
    text = "\n".join(PAGES.values())
    assert sorted(re.findall(r"<!-- measured (\S+) -->", text)) == sorted(exercises.EXERCISES)
    for name, command in exercises.EXERCISES.items():
        before = text.split(f"<!-- measured {name} -->")[0]
        if ".py" in command or command == "steps-500":
            asked = re.findall(r"`python ([^`]+)`|<code>python ([^<]+)</code>", before)[-1]
            assert command in asked, name


def test_an_exercise_runs_once_and_starts_from_the_models_named(tmp_path, monkeypatch):
    commands = []

    class Done:
        returncode = 0

    def run(command):
        commands.append(command[1:])
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ppo.json").write_text('{"kl": 1}', encoding="utf-8")
        return Done

    monkeypatch.setattr(exercises.subprocess, "run", run)
    for _ in range(2):
        figures = exercises.measure("ppo.py --epochs 1", tmp_path / "in", tmp_path / "a")
        assert figures == {"kl": 1}
    exercises.measure("docs/lab/own_reward.py gold", tmp_path / "in", tmp_path / "b")
    inputs = str(tmp_path / "in")
    assert [[word.replace(inputs, "IN") for word in words[1:]] for words in commands] == [
        ["--epochs", "1", "--init", str(Path("IN", "sft.pt")), "--reward-model",
         str(Path("IN", "reward.pt")), "--out", str(tmp_path / "a")],
        ["gold", "--init", str(Path("IN", "sft.pt")), "--out", str(tmp_path / "b")]]
    monkeypatch.setattr(exercises.subprocess, "run", lambda command: Done)
    with pytest.raises(SystemExit, match="failed: see above"):
        exercises.measure("sft.py --epochs 1", tmp_path, tmp_path / "c")


def test_the_chapters_hold_what_was_measured(tmp_path):
    """Figures that were changed by hand, or are of an older run."""
    results = json.loads((ROOT / "docs/results/exercises.json").read_text(encoding="utf-8"))
    assert set(results) == set(exercises.EXERCISES)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs/results/exercises.json").write_text(json.dumps(results), encoding="utf-8")
    for name, text in PAGES.items():
        (tmp_path / "docs" / f"{name}.md").write_text(text, encoding="utf-8", newline="\n")
    exercises.write(tmp_path)
    for name, text in PAGES.items():
        assert (tmp_path / "docs" / f"{name}.md").read_text(encoding="utf-8") == text, name
