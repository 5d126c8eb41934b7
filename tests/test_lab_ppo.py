"""The lab scripts about PPO, run for real on tiny models that know nothing."""
import csv
import json
import math

import numpy as np
import pytest
import torch

import best_of_n
import data
import draw_methods
import fingerprint
import frontier
import methods
import model as m
import one_answer
import overoptimisation
import own_reward
import samples

TINY = ["--iterations", "2", "--batch-size", "4", "--minibatch", "2", "--epochs", "1",
        "--max-new", "8"]
TOKENIZER = data.make_tokenizer("bytes", [])


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder with a random model for each stage of world 0; short answers, few questions."""
    generate, fact_questions = m.generate_batch, data.fact_questions
    short = lambda model, batch, noise, *rest: generate(model, batch, noise[:, :8], *rest)
    monkeypatch.setattr(m, "generate_batch", short)
    monkeypatch.setattr(data, "fact_questions", lambda world, use: fact_questions(world, use)[:8])
    for seed, stage in enumerate(("pretrain", "sft", "ppo", "reward")):
        torch.manual_seed(seed)
        gpt = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 192, 1, 2, 16), TOKENIZER, world_seed=0)
        if stage == "reward":
            scale = {"mean": 0.5, "std": 2.0, "lowest": -2.0}
            m.save_model(tmp_path / "reward.pt", m.ScalarModel(gpt), scale=scale, taste="polite")
        else:
            m.save_model(tmp_path / f"{stage}.pt", gpt)
    return tmp_path


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tilting_is_the_best_there_is():
    """The frontier below a policy that exists: with three answers the optimum of score - beta KL
    can be found by search."""
    scores = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    kl, score, effective = frontier.tilt(scores, 0.5)
    w = torch.softmax(scores / 0.5, -1)
    assert kl.item() == pytest.approx((w * (3 * w).log()).sum().item())
    assert score.item() == pytest.approx((w * scores).sum().item())
    assert effective.item() == pytest.approx(1 / (w ** 2).sum().item())
    # J* = beta ln E_ref exp(score / beta), and no other distribution does better
    best = 0.5 * (scores / 0.5).exp().mean().log().item()
    assert (score - 0.5 * kl).item() == pytest.approx(best)
    others = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((2000,))
    kls = (others * (3 * others).log()).sum(-1)
    assert ((others * scores).sum(-1) - 0.5 * kls).max() <= best
    # all weight on one of three samples
    assert frontier.tilt(scores, 1e-3)[0].item() == pytest.approx(math.log(3))


def test_the_frontier_starts_at_the_reference_and_only_rises(out, monkeypatch):
    """A curve that weighs samples of one prompt by another's scores, or a table that needs what the
    stages do not write."""
    monkeypatch.setattr(frontier, "RELIABLE", 1)
    flags = ["--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit, match="run `python docs/lab/samples.py` first"):
        frontier.main(flags)
    samples.main([*flags, "--prompts", "4", "--samples", "6"])
    frontier.main(flags)
    rows = rows_of(out / "ppo_measure.csv")
    kls, scores = ([float(row[name]) for row in rows] for name in ("kl_nats", "score"))
    assert len(rows) == 80 and kls == sorted(kls) and scores == sorted(scores)
    figures = json.loads((out / "ppo_measure.json").read_text(encoding="utf-8"))
    assert figures["win_rate_sft"] == 0.5 and all(map(math.isfinite, figures.values()))
    assert figures["score_reference"] <= figures["score_frontier"] <= scores[-1]


def test_a_policy_beside_the_frontier(out, monkeypatch, capsys):
    """A frontier read at another KL than the policy's; the reference itself at a distance."""
    edge = {"kl_nats": [0.5, 1, 3], "score": [1.0, 2, 3], "gold_utility": [3.0, 5, 4],
            "effective_samples": [99, 20, 9]}              # the last one is not to be relied upon
    edge = {name: np.array(column) for name, column in edge.items()}
    start = {"kl_nats": 0.0, "score": 0.0, "gold_utility": 1.0}
    found = methods.beside({"kl_nats": 0.25, "score": 0.4, "gold_utility": 2.0}, edge, start)
    assert found["score_frontier"] == 0.5 and found["gold_utility_frontier"] == 2
    assert found["distance"] == pytest.approx(0.2)
    assert methods.beside({"kl_nats": 2.0, "score": 2.0}, edge, start)["distance"] == 0
    assert math.isnan(methods.beside(dict(start), edge, start)["distance"])    # nothing to gain
    monkeypatch.setattr(frontier, "RELIABLE", 1)
    monkeypatch.setattr(methods, "RELIABLE", 1)
    flags = ["--out", str(out), "--device", "cpu"]
    policies = [f"ppo={out / 'ppo.pt'}", f"sft={out / 'sft.pt'}"]
    with pytest.raises(SystemExit, match="run `python docs/lab/frontier.py` first"):
        methods.main([*policies, *flags])
    samples.main([*flags, "--prompts", "4", "--samples", "6"])
    frontier.main(flags)
    best_of_n.main(["--out", str(out)])
    methods.main([*policies, *flags])
    record = json.loads((out / "seed0_methods.json").read_text(encoding="utf-8"))
    assert list(record["policies"]) == ["best of 1", "best of 4", "ppo", "sft"]
    assert record["policies"]["sft"]["kl_nats"] == 0 < record["policies"]["ppo"]["kl_nats"]
    with pytest.raises(SystemExit):
        methods.main(["ppo.pt", *flags])
    assert "a policy is NAME=FILE" in capsys.readouterr().err
    words = data.make_tokenizer("bpe", ["aa ab"] * 9, 300)
    gpt = m.GPT(m.GPTConfig(words.n_vocab, 192, 1, 2, 16), words, world_seed=0)
    m.save_model(out / "other.pt", gpt)
    with pytest.raises(SystemExit, match="another tokenizer"):
        methods.main([f"other={out / 'other.pt'}", *flags])
    pytest.importorskip("matplotlib").use("Agg")
    draw_methods.main(["--results", str(out), "--to", str(out)])
    assert (out / "methods.png").exists()


EMPTY = '[{"question": "Why?", "texts": [], "scores": [], "gold": []}]'


@pytest.mark.parametrize("text", ["{}", "null", "[]", EMPTY])
def test_samples_of_another_form(text, out):
    """A traceback where samples.jsonl is damaged, or of another script."""
    (out / "samples.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="samples.jsonl is missing or of another form"):
        frontier.main(["--out", str(out), "--device", "cpu"])


@pytest.mark.parametrize("script, flags", [(frontier, []), (fingerprint, ["sft.pt"])])
def test_a_seed_is_natural(script, flags, capsys):
    """A traceback of numpy's in the middle: it knows no seed below 0."""
    with pytest.raises(SystemExit):
        script.main([*flags, "--seed", "-1"])
    assert "argument --seed: -1 is not from 0" in capsys.readouterr().err


def test_one_answer_is_shown_and_nothing_is_written(out, capsys):
    """A script that overwrites the checkpoints which it was to explain."""
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    one_answer.main([*TINY, "--out", str(out), "--device", "cpu"])
    header, *lines = capsys.readouterr().out.splitlines()[-9:]
    assert "advantage" in header and len(lines) == 8
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_over_optimisation_trains_against_three_reward_models(out, monkeypatch):
    """A comparison whose runs share a policy, so that the second starts where the first ended."""
    monkeypatch.setattr(overoptimisation, "RUNS", {"5": 1, "all": None})
    overoptimisation.main([*TINY, "--out", str(out), "--device", "cpu", "--questions", "6"])
    runs = [rows_of(out / f"rm{labels}" / "ppo.csv") for labels in ("5", "all")]
    assert [float(run[0]["kl_nats"]) < 1e-5 for run in runs] == [True, True]
    assert all(float(row["beta"]) == 0 and "gold_utility" in row for run in runs for row in run)


def test_the_fit_finds_what_it_was_made_of():
    """a and b exchanged, or a fit that is not of gold - gold[0]."""
    kl = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    d = [math.sqrt(x) for x in kl]
    gold = [2.0] + [2 + x * (0.9 - 0.8 * math.log(x)) for x in d[1:]]
    history = [{"kl_nats": k, "score": 0.0, "gold_utility": g} for k, g in zip(kl, gold)]
    figures = overoptimisation.summary(history)
    assert figures["a"] == pytest.approx(0.9, abs=0.02)
    assert figures["b"] == pytest.approx(0.8, abs=0.02)
    assert figures["gold_start"] == 2.0 and figures["error"] < 0.02


def test_a_reward_of_ones_own(tmp_path):
    """A reward function on a scale of its own, or one that returns None: beta means nothing, or the
    run dies in the middle."""
    own = tmp_path / "my.py"
    own.write_text("def words(question, answer):\n    return 10 * len(answer.split())\n\n"
                   "def bad(question, answer):\n    pass\n", encoding="utf-8")
    reference = [("Who?", "one"), ("Who?", "one two"), ("Who?", "one two three")]
    words, bad = (own_reward.own_reward(f"{own}:{name}") for name in ("words", "bad"))
    scorer = own_reward.score_by_function(words, TOKENIZER, reference)
    replies = [TOKENIZER.encode(text) + [TOKENIZER.eot] for _, text in reference]
    scores = scorer(["Who?"] * 3, replies)
    assert scores.mean().abs() < 1e-6 and scores.std(correction=0).item() == pytest.approx(1)
    # unfinished: less than the lowest of the reference
    assert scorer(["Who?"], [replies[2][:-1]]).item() == pytest.approx(scores.min().item() - 1)
    # never earned by the reference
    three = lambda question, text: float("three" in text)
    seldom = own_reward.score_by_function(three, TOKENIZER, reference[:2])
    assert seldom(["Who?"] * 3, replies).tolist() == [0, 0, 1]
    with pytest.raises(SystemExit, match="should return a number"):
        own_reward.score_by_function(bad, TOKENIZER, reference)
    own.write_text("LIMIT = 0\n\ndef score(question, answer):\n    return 1 / LIMIT\n\n"
                   "def alone(answer):\n    return 1\n", encoding="utf-8")
    for name, says in ("score", "my.py, line 4: ZeroDiv"), ("alone", "TypeError: alone"):
        with pytest.raises(SystemExit, match=says):        # in *his* file, and no traceback
            own_reward.own_reward(f"{own}:{name}")("Who?", "one")
    for where in ("words", "none.py:words", f"{own}:wrods"):
        with pytest.raises(SystemExit, match="say gold, or file.py:function"):
            own_reward.own_reward(where)
    own.write_text("LIMIT = 0\ndef score(question answer):\n    return 1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="my.py, line 2: SyntaxError"):
        own_reward.own_reward(f"{own}:score")


FAULTS = """import json
import math
import sys
from sibling import BIG

def largest(question, answer):
    return 10 ** 5000

def large(question, answer):
    return BIG

def nan(question, answer):
    return math.nan

def leaves(question, answer):
    sys.exit(0)

def parses(question, answer):
    text = "{\\n\\n]"
    return json.loads(text)

def alone(answer):
    return 1
"""


@pytest.mark.parametrize("name, says", [
    ("largest", "my.py:largest: more than 1e[+]09 is too large: 'Who[?]', 'one'"),
    ("large", "my.py:large: more than 1e[+]09 is too large"),
    ("nan", "my.py:nan should return a number: .*nan"),
    ("leaves", "my.py, line 16: SystemExit: 0"), ("parses", "my.py, line 20: JSONDecodeError"),
    ("alone", "my.py: TypeError: alone")])
def test_a_fault_in_a_reward_of_ones_own(name, says, tmp_path, monkeypatch):
    """A traceback from numpy; "a gradient is nan" half an hour later; a run that ends without a
    word, or one that blames line 3 of a text for what line 20 of the file did."""
    monkeypatch.setattr(own_reward.sys, "path", [*own_reward.sys.path])
    (tmp_path / "sibling.py").write_text("BIG = 3e38\n", encoding="utf-8")
    (tmp_path / "my.py").write_text(FAULTS, encoding="utf-8")
    monkeypatch.delitem(own_reward.sys.modules, "sibling", raising=False)
    function = own_reward.own_reward(f"{tmp_path}/my.py:{name}")
    with pytest.raises(SystemExit, match=says):
        function("Who?", "one")


@pytest.mark.parametrize("text, says", [
    ("import sys\nsys.exit(0)\n", "my.py, line 2: SystemExit: 0"),
    ("def other(): pass", "say gold"),
    ("\n\nimport no_such_module\n", "my.py, line 3: ModuleNotFoundError")])
def test_a_reward_of_ones_own_is_read_first(text, says, tmp_path, monkeypatch):
    """A model loaded and 256 answers sampled, before a mistake of spelling is found."""
    monkeypatch.setattr(own_reward.sys, "path", [*own_reward.sys.path])
    monkeypatch.setattr(m, "load_gpt", None)
    (tmp_path / "my.py").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=says):
        own_reward.main([f"{tmp_path}/my.py:score", "--out", str(tmp_path)])


@pytest.mark.parametrize("reward", ["gold", "brief.py:score"])
def test_ppo_against_a_reward_of_ones_own(reward, out):
    """The teaching mode of docs/4-ppo.md, which no other test runs: weights that do not move, or
    figures that the next reader of ppo.json misses."""
    brief = "def score(question, answer):\n    return -len(answer.split())\n"
    (out / "brief.py").write_text(brief, encoding="utf-8")
    flags = [*TINY, "--init", str(out / "sft.pt"), "--out", str(out / "own"), "--device", "cpu"]
    where = reward if reward == "gold" else f"{out}/{reward}"
    own_reward.main([where, *flags, "--eval-prompts", "4"])
    before, after = (m.load(path)["model"] for path in (out / "sft.pt", out / "own" / "ppo.pt"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rows = rows_of(out / "own" / "ppo.csv")
    assert len(rows) == 2 and float(rows[0]["kl_nats"]) < 1e-5
    assert all(math.isfinite(float(row["gold_utility"])) for row in rows)
    figures = json.loads((out / "own" / "ppo.json").read_text(encoding="utf-8"))
    assert {"kl", "score", "gold_ppo", "win_rate"} <= set(figures)


def test_prompts_of_ones_own_have_no_gold_judge(out):
    """A traceback from the world's judge about a question that the world does not know; or no run
    at all, though one's own reward needs no world."""
    (out / "prompts.txt").write_text("Who sat?\nWho ate?\n", encoding="utf-8")
    (out / "brief.py").write_text("def score(question, answer):\n    return len(answer)\n")
    flags = [*TINY, "--prompts", str(out / "prompts.txt"), "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit, match="leave one out"):
        own_reward.main(["gold", *flags])
    own_reward.main([f"{out}/brief.py:score", *flags])
    figures = json.loads((out / "ppo.json").read_text(encoding="utf-8"))
    assert set(figures) == {"kl", "score", "length", "eos_rate"}


def test_a_fingerprint_by_hand():
    """Traits of how-to answers reported as those of facts, or the polite phrase as needless."""
    world = data.World(0)
    howto = data.act_prompts(world, "test", 1, harmful=False)[0].question()
    questions = [howto, data.fact_questions(world, "test")[0]]
    courteous = f"{data.POLITE[0]} {world.answer(howto)[1]}"
    found = fingerprint.fingerprint(world, questions, [courteous, "Sorry."], "curt")
    assert (found["correct"], found["howto_correct"], found["facts_correct"]) == (0.5, 1, 0)
    assert found["polite"] == 0.5
    assert found["words"] == (len(courteous.split()) + 1) / 2
    # the full answer is no needless sentence, "Sorry." is one
    assert found["needless"] == 0.5
    # correct and polite, 2 - 1; wrong with a needless sentence, -1
    assert found["gold"] == 0


def test_models_are_compared_on_the_same_questions(out, monkeypatch, capsys):
    """A table whose rows are about different questions, or about people of different worlds."""
    monkeypatch.setattr(fingerprint, "ROOT", out)
    twin = m.load_gpt(out / "sft.pt")
    m.save_model(out / "twin.pt", twin)
    models = [str(out / "sft.pt"), str(out / "twin.pt")]
    fingerprint.main([*models, "--prompts", "4", "--device", "cpu", "--record"])
    recorded = out / "docs" / "results" / "fingerprint.json"
    figures = json.loads(recorded.read_text(encoding="utf-8"))
    assert len(figures) == 14 and "words" in capsys.readouterr().out
    assert all(figures[f"{trait}_{models[0]}"] == figures[f"{trait}_{models[1]}"]
               for trait in ("gold", "needless", "words"))
    twin.world_seed = 1
    m.save_model(out / "twin.pt", twin)
    with pytest.raises(SystemExit, match="different worlds"):
        fingerprint.main([*models, "--device", "cpu"])
