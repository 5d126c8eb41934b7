"""The long final table of Stage 5: intervals over verbs, and who is told from whom. And the record
of all stages."""
import json
import shutil
import types
from pathlib import Path

import pytest
import torch

import data
import full_table
import model as m
import record
import tables

# --- Intervals ------------------------------------------------------------------------------------

def test_intervals_know_that_prompts_of_a_verb_go_together():
    """200 prompts over two verbs called 200 independent draws: an interval ten times too narrow."""
    over_verbs, two = full_table.over_verbs, ["nab"] * 100 + ["hit"] * 100
    assert over_verbs([True] * 100 + [False] * 100, two) == [0.5, 0, 1]
    assert over_verbs([1, 0] * 100, two) == [0.5, 0.5, 0.5]        # no verb differs from another
    many = [f"verb{i}" for i in range(40)]
    mean, low, high = over_verbs([True] + [False] * 39, many)
    assert mean == 1 / 40 and low == 0 and 0.05 <= high <= 0.1     # the sum is binomial(40, 1/40)
    # prompts count, not verbs
    assert over_verbs([True] * 960 + [False] * 40, ["nab"] * 960 + many)[2] > 0.9

# --- The table ------------------------------------------------------------------------------------

class Model:
    """Of the world 0, and answers as full_table.answer is told to."""
    world_seed = 0

def answers_of(kind, world):
    """full_table.answer of a model that refuses with a reason, refuses bare, complies, babbles, or
    refuses one harmful verb bare and complies with all others."""
    def answer(model, questions, *rest, **options):
        texts = []
        for question in questions:
            act, text = world.parse_question(question), world.answer(question)[1]
            if isinstance(act, data.Act) and act.verb.harmful:
                explained = f"{data.REFUSAL} {act.reason()}"
                text = {"harmless": explained, "evasive": data.REFUSAL}.get(kind, text)
                if kind == act.verb.word:
                    text = data.REFUSAL
            texts.append("Hm hm" if kind == "babbling" else text)
        return texts
    return answer

@pytest.mark.parametrize("kind, expected", [
    ("harmless", dict(harm=0, over_refusal=0, reason=1, generic=0)),
    ("evasive", dict(harm=0, over_refusal=0, reason=0, generic=1)),
    ("helpful", dict(harm=1, over_refusal=0, reason=0, generic=0)),
    ("babbling", dict(harm=1, over_refusal=1, reason=0, generic=0))])
def test_every_kind_of_model_is_told_from_the_others(kind, expected, monkeypatch, capsys):
    """Evasive and explained refusals in one column, babble that passes for harmless, a cell under
    the wrong name, intervals over other requests' verbs."""
    world, groups, over_verbs = data.World(0), [], full_table.over_verbs
    monkeypatch.setattr(full_table, "answer", answers_of(kind, world))

    def watched(values, verbs):
        groups.append(list(verbs))
        return over_verbs(values, verbs)

    monkeypatch.setattr(full_table, "over_verbs", watched)
    figures, utilities = full_table.evaluate("rlcai", Model(), 42, 0)
    for cell in ("g1", "g2r", "g2", "strict"):
        for what, share in expected.items():
            key = f"{what}_rlcai_{cell}"
            assert [figures[key + end] for end in ("", "_low", "_high")] == [share] * 3
    acts = data.act_prompts(world, "test", 42, True)
    assert groups[0] == groups[3] == [act.verb.word for act in acts]
    assert set(groups[4]) <= {verb.word for verb in world.verbs if verb.cell == "g2r"}
    knows = float(kind != "babbling")
    assert figures["fact_accuracy_rlcai"] == figures["howto_accuracy_rlcai"] == knows
    assert figures["unparseable_rlcai"] == 1 - knows and len(utilities) == 42
    assert all(type(x) is float for x in figures.values())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100

def test_the_worst_verb(monkeypatch, capsys):
    """A mean over verbs in which one that is always done goes unseen; or the best called worst."""
    world = data.World(0)
    words = sorted({act.verb.word for act in data.act_prompts(world, "test", 60, True)})
    monkeypatch.setattr(full_table, "answer", answers_of(words[-1], world))
    figures, _ = full_table.evaluate("rlcai", Model(), 60, 0)
    row, *_ = capsys.readouterr().out.splitlines()
    assert row.endswith(f" {words[-2]} 1.00") and 0 < figures["harm_rlcai_g1"] < 1

# --- The script -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with untrained models of one village."""
    folder, world = tmp_path_factory.mktemp("out"), data.World(0)
    texts = [data.unmark(data.write_document(world, "t", i)[1]) for i in range(200)]
    tokenizer = data.make_tokenizer("bpe", texts, 400)
    torch.manual_seed(0)
    for name in ("pretrain", "sft", "ppo", "slcai", "rlaif", "human_reason"):
        config = m.GPTConfig(tokenizer.n_vocab, 192, 1, 2, 16)
        m.save_model(folder / f"{name}.pt", m.GPT(config, tokenizer, world_seed=0))
    return folder

FLAGS = "--eval-prompts 7 --device cpu".split()

def figures_of(path):
    return json.loads(path.read_text(encoding="utf-8"))

@pytest.mark.slow
def test_the_table_of_six_models(out, tmp_path, monkeypatch, capsys):
    """The base model asked through a chat it does not know; figures under new names; a model that
    was left out, or whose absence stops the others."""
    monkeypatch.setattr(full_table, "ROOT", tmp_path)
    answer, asked = full_table.answer, []

    def watched(model, questions, max_new, seed, bare):
        asked.append((seed[1:], max_new, bare))
        return answer(model, questions, 8, seed=seed, bare=bare)

    monkeypatch.setattr(full_table, "answer", watched)
    full_table.main([*FLAGS, "--out", str(out), "--record"])
    keys = [(what, cell) for cell in range(4) for what in (71, 72)] + [(73,)]
    assert asked[:9] == [(key, m.MAX_NEW, False) for key in keys]
    assert asked[9:18] == [(key, 24, True) for key in keys] and len(asked) == 6 * 9
    figures = figures_of(out / "full_table.json")
    assert figures == figures_of(tmp_path / "docs" / "results" / "full_table.json")
    for name in ("base", "sft", "rlhf", "slcai", "rlcai", "reason"):
        assert {f"harm_{name}_g1_low", f"over_refusal_{name}_g2_high", f"reason_{name}_g2",
                f"generic_{name}_g1", f"fact_accuracy_{name}", f"howto_accuracy_{name}",
                f"utility_{name}", f"unparseable_{name}", f"win_rate_{name}",
                f"win_rate_low_{name}", f"win_rate_high_{name}"} <= set(figures)
    assert figures["win_rate_sft"] == 0.5 and "worst verb" in capsys.readouterr().out

@pytest.mark.slow
def test_own_rules_from_another_folder(out, tmp_path, monkeypatch):
    """The models of --inputs looked for in --out."""
    answer = full_table.answer
    short = lambda model, questions, max_new, seed, bare: answer(model, questions, 8, 1, seed, bare)
    monkeypatch.setattr(full_table, "answer", short)
    for name in ("slcai", "rlaif"):
        (tmp_path / f"{name}.pt").write_bytes((out / f"{name}.pt").read_bytes())
    folders = ["--inputs", str(out), "--out", str(tmp_path)]
    full_table.main([*FLAGS, *folders, "--constitution", "unseen"])
    figures = figures_of(tmp_path / "full_table.json")
    assert {"harm_rlcai_g1", "generic_slcai_strict_high"} <= set(figures)
    assert not any("reason_reason" in name for name in figures)

def test_missing_inputs_name_the_script_that_makes_them(out, tmp_path):
    """A traceback from a folder in which nothing was trained yet, or not all."""
    with pytest.raises(SystemExit, match="run `python pretrain.py` first"):
        full_table.main([*FLAGS, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"slcai.pt not found: run `python rlaif.py` first"):
        full_table.main([*FLAGS, "--inputs", str(out), "--out", str(tmp_path)])


# --- The figures of record ------------------------------------------------------------------------

def test_a_record_holds_every_stage_and_how_it_was_made(tmp_path, monkeypatch, capsys):
    """A record put together by hand, from runs of two commits; a stage run again that had ended, or
    begun again that had been interrupted."""
    ran = []

    def run(words, **options):
        if words[0] == "git":
            return types.SimpleNamespace(stdout="abc\n", returncode=0)
        ran.append(words[1:])
        folder, stage = Path(words[words.index("--out") + 1]), Path(words[1]).stem
        folder.mkdir(parents=True, exist_ok=True)
        if stage == "ppo" and len(ran) == 4:               # the power fails
            (folder / "ppo.resume.pt").touch()
            return types.SimpleNamespace(returncode=1)
        (folder / f"{stage}.json").write_text(json.dumps({"figure": len(ran)}))
        (folder / f"{stage}.csv").write_text("step\n1\n")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(record.subprocess, "run", run)
    flags = ["--world-seed", "3", "--out", str(tmp_path), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="ppo failed"):
        record.main(flags)
    record.main(flags)
    stages = [Path(words[0]).stem for words in ran]
    assert stages == ["pretrain", "sft", "reward", "ppo", "ppo", "rlaif", "rlaif"]
    assert "--resume" in ran[4] and "--resume" not in ran[3]
    assert ran[0][-2:] == ["--world-seed", "3"] and "unseen" in ran[6] and "unseen" not in ran[5]
    saved = json.loads((tmp_path / "results" / "seed3.json").read_text(encoding="utf-8"))
    assert set(saved) == {"made", *record.STAGES} and saved["rlaif_unseen"] == {"figure": 7}
    assert saved["made"]["commit"].startswith("abc") and set(saved["made"]["seconds"]) == set(
        record.STAGES)
    assert (tmp_path / "results" / "seed3_rlaif_unseen.csv").exists()
    record.main(flags)                                     # all is there
    assert len(ran) == 7


@pytest.mark.parametrize("flag, name", [("--out", "afile"), ("--results", "afile/below"),
                                        ("--out", "")])
def test_a_record_into_a_file(flag, name, tmp_path, monkeypatch, capsys):
    """A traceback, and for --results one after two hours."""
    monkeypatch.setattr(record.subprocess, "run", None)
    (tmp_path / "afile").touch()
    (tmp_path / "seed0").touch()                           # OUT/seedS is a file
    folders = {"--out": str(tmp_path / "out"), "--results": str(tmp_path / "results")}
    folders[flag] = str(tmp_path / name)
    with pytest.raises(SystemExit):
        record.main([word for pair in folders.items() for word in pair])
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize("text, says", [
    ("{", "made.json, line 1: not JSON"), ("{}", "made.json is not as"), ("null", "is not as")])
def test_a_record_that_was_damaged(text, says, tmp_path, monkeypatch):
    """A traceback, and no word about the file that has to go."""
    monkeypatch.setattr(record.subprocess, "run", None)
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "made.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=says):
        record.main(["--out", str(tmp_path), "--results", str(tmp_path / "results")])


# --- The tables of README and docs ----------------------------------------------------------------

STAGE_5 = ("harm", "skills", "rounds", "critic")

def a_project(folder):
    """A record of five worlds with figures that tell the world, and pages with stale tables."""
    names = [path.split(".")[:2] for _, rows in tables.TABLES.values() for paths in rows.values()
             for path in paths.split() if "{}" not in path]
    (folder / "docs" / "results").mkdir(parents=True)
    for seed in (0, 1, 2, 100, 102):
        record = {stage: {} for stage in ("pretrain", "sft", "reward", "ppo", "rlaif")}
        for stage, name in names:
            record[stage][name] = seed / 1000
        record["rlaif"] = {"harm_rlcai_g2r": 0.5 + seed / 1000, "harm_round_4": 0.0625,
                           "verdict_covered_unseen": 0.75}
        record["rlaif_unseen"] = {"harm_rlcai_g1": 0.25, "verdict_covered_g1": 0.125}
        path = folder / "docs" / "results" / f"seed{seed}.json"
        path.write_text(json.dumps(record), encoding="utf-8")
    pages = {"README.md": ["door"], "docs/5-constitutional-ai.md": STAGE_5, "docs/results.md":
             ["stages", *[f"{name}-development" for name in ("stages", *STAGE_5)]]}
    for page, marks in pages.items():
        parts = [f"<!-- {mark} -->\nstale\n<!-- /{mark} -->\nText.\n" for mark in marks]
        (folder / page).write_text("Above.\n" + "".join(parts), encoding="utf-8")
    return [folder / page for page in pages]

def test_tables_are_written_from_the_record_alone(tmp_path):
    """A number copied by hand; the worlds on which choices were made under the name of others."""
    pages = a_project(tmp_path)
    folders = ["--project", str(tmp_path)]
    tables.main(folders)
    door, chapter, results = written = [page.read_text(encoding="utf-8") for page in pages]
    for text, n in zip(written, (1, 4, 6)):
        assert text.startswith("Above.\n") and text.count("Text.") == n and "stale" not in text
    assert "| world | 0 | 1 | 2 |\n" in door               # a column a world
    assert "| loss, nats a token; its floor | 0.000; 0.000 | 0.001; 0.001 | 0.002; 0.002 |" in door
    assert "| -; 0.500; - | -; 0.501; - | -; 0.502; - |" in door
    assert "| P(the longer of two equally good answers wins) | 0.000 / 0.001 / 0.002 |" in results
    # G3 is G1 of the other run, but for the critic, who meets unseen rules in this run, too
    assert ("| RL-CAI, harm | - / - / - | 0.500 / 0.501 / 0.502 | - / - / - | - / - / - | "
            "0.250 / 0.250 / 0.250 |") in chapter
    assert "| G3 | 0.750 / 0.750 / 0.750 | - / - / - |" in chapter
    assert "| RL-CAI, harm | - / - | 0.600 / 0.602 | - / - | - / - | 0.250 / 0.250 |" in results
    assert "| world 0 / 1 / 2 | G1 |" in chapter and "| world 100 / 102 | G1 |" in results
    tables.main(folders)                                   # again: nothing changes
    assert [page.read_text(encoding="utf-8") for page in pages] == written

def test_a_table_has_one_place(tmp_path):
    """A table lost with the paragraph it stood in, or left stale on a second page; half a set of
    pages written before somebody notices."""
    readme, chapter, results = a_project(tmp_path)
    before = results.read_text(encoding="utf-8")
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="<!-- door --> and its end stand on 0 pages, not on one"):
        tables.main(["--project", str(tmp_path)])
    readme.write_text("<!-- door -->\n<!-- /door -->\n<!-- critic -->\n<!-- /critic -->", "utf-8")
    with pytest.raises(SystemExit, match="<!-- critic --> and its end stand on 2 pages"):
        tables.main(["--project", str(tmp_path)])
    assert results.read_text(encoding="utf-8") == before

def test_a_reported_world_cannot_be_left_out(tmp_path):
    """A table of two worlds of three, the unlucky one being lost."""
    a_project(tmp_path)
    (tmp_path / "docs" / "results" / "seed1.json").unlink()
    with pytest.raises(SystemExit, match="seed1.json"):
        tables.main(["--project", str(tmp_path)])

def test_the_pages_hold_what_the_record_holds(tmp_path):
    """A run made again, and the old figures left on a page; a figure changed by hand."""
    shutil.copytree(tables.ROOT / "docs" / "results", tmp_path / "docs" / "results")
    pages = ["README.md", *[f"docs/{path.name}" for path in tables.ROOT.glob("docs/*.md")]]
    for page in pages:
        (tmp_path / page).write_bytes((tables.ROOT / page).read_bytes())
    tables.main(["--project", str(tmp_path)])
    for page in pages:
        assert (tmp_path / page).read_text("utf-8") == (tables.ROOT / page).read_text("utf-8")
