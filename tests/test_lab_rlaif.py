"""The experiments on Constitutional AI: people who label harm, no critique, harm by round, critics
that fail. (Stage 5's full table: tests/test_lab_table.py.)"""
import functools
import json
import shutil

import pytest
import torch

import critics
import data
import dial
import earned
import harm_by_round
import human_harm
import labels
import model as m
import no_critique
import reward
import rlaif
import second_turns
import tax
import unsorted

FLAGS = [*"--red-team 7 --rounds 2 --helpful 6 --label-prompts 8 --iterations 2".split(),
         *"--value-warmup 0 --batch-size 4 --minibatch 2 --max-new 8 --epochs 1".split(),
         *"--eval-prompts 7 --device cpu".split()]

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with untrained models of one village, and a few labels of helpfulness."""
    folder, world = tmp_path_factory.mktemp("out"), data.World(0)
    texts = [data.unmark(data.write_document(world, "t", i)[1]) for i in range(200)]
    tokenizer = data.make_tokenizer("bpe", texts, 400)
    torch.manual_seed(0)
    for name in ("pretrain", "sft", "ppo", "slcai", "rlaif"):
        config = m.GPTConfig(tokenizer.n_vocab, 192, 1, 2, 16)
        m.save_model(folder / f"{name}.pt", m.GPT(config, tokenizer, world_seed=0))
    questions = data.fact_questions(world, "train")[:5]
    groups = [(q, [world.answer(q)[1], "No."], [(0, 1, 1.0)]) for q in questions]
    reward.write_preferences(folder / "preferences.jsonl", groups)
    judge = m.ScalarModel(m.GPT(config, tokenizer, world_seed=0))
    m.save_model(folder / "rlaif_pm.pt", judge, scale={}, counts={"ai_labels": 10})
    return folder

@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    """Few answers, of at most 10 tokens: an untrained model never stops by itself."""
    generate, prompts = m.generate_batch, reward.preference_prompts
    short = lambda model, batch, noise, *rest: generate(model, batch, noise[:, :10], *rest)
    monkeypatch.setattr(m, "generate_batch", short)
    monkeypatch.setattr(reward, "preference_prompts", lambda w, use, n: prompts(w, use, min(n, 24)))
    for name, value in (("SL_EPOCHS", 1), ("ANSWERS", 2)):
        monkeypatch.setattr(rlaif, name, value)
    monkeypatch.setattr(no_critique, "CASES", 20)

def figures_of(path):
    return json.loads(path.read_text(encoding="utf-8"))

# --- Second turns ---------------------------------------------------------------------------------

def in_full(world, talk):
    """What the last question of a talk means: "And Tom?" is the first one, asked about Tom."""
    first, last = talk[0][1], talk[-1][1]
    asked = world.parse_question(first)
    if not last.startswith("And "):
        return last
    if isinstance(asked, data.Act):
        return f"How do I {asked.verb.word} {last[4:]}"
    return first.replace(asked[0], last[4:-1])

def test_second_turns(out, tmp_path, monkeypatch, capsys):
    """The first question judged in place of the second; twins among the harmful; one column under
    another's name."""
    world, refuse = data.World(0), [False]
    def answers(model, talks, seed):
        assert all(len(talk) == 3 and talk[1][1] for talk in talks)
        if refuse[0]:
            return [data.REFUSAL] * len(talks)
        return [data.unmark(world.answer(in_full(world, talk))[1]) for talk in talks]
    monkeypatch.setattr(second_turns, "answer", answers)
    model = m.load_gpt(out / "sft.pt")
    helpful = dict(harm=1, over_refusal=0, facts=1, how_to=1)
    assert second_turns.measure(model, world, 14, 0) == helpful
    refuse[0] = True
    evasive = dict(harm=0, over_refusal=1, facts=0, how_to=0)
    assert second_turns.measure(model, world, 14, 0) == evasive
    for path in out.iterdir():
        shutil.copy(path, tmp_path)
    second_turns.main(["--inputs", str(tmp_path), "--eval-prompts", "7", "--device", "cpu"])
    figures = figures_of(tmp_path / "second_turns.json")
    assert len(figures) == 16 and figures["over_refusal_rlcai"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 5
    (tmp_path / "slcai.pt").unlink()
    with pytest.raises(SystemExit, match=r"slcai.pt not found: run `python rlaif.py` first"):
        second_turns.main(["--inputs", str(tmp_path), "--eval-prompts", "7", "--device", "cpu"])

# --- Human labels of harm -------------------------------------------------------------------------

def test_two_people_who_label_harm():
    """Annotators who want the same, or who like refusals of harmless requests too: the comparison
    then shows nothing, or too much."""
    world = data.World(0)
    act = world.acts["train"][0]
    act = act if act.verb.harmful else act.twin()
    asked, comply, bare = act.question(), world.answer(act.question())[1], data.REFUSAL
    explained = f"{data.REFUSAL} {act.reason()}"
    for wants in ("any", "reason"):
        choice = functools.partial(human_harm.prefers, wants, world)
        assert choice(asked, bare, comply) == choice(asked, explained, comply) == 1
        assert choice(asked, comply, bare) == 0 and choice(asked, comply, comply) == 0.5
        assert choice(asked, explained, bare) == (1 if wants == "reason" else 0.5)
        assert choice(act.twin().question(), bare, comply) == 0.5  # nothing about harm in it
    answered = [(asked, [comply, bare, explained])] * 200
    coins = []
    for _, _, pairs in human_harm.human_labels("any", world, answered, 0):
        assert pairs[:2] == [(0, 1, 0.0), (0, 2, 0.0)] and pairs[2][:2] == (1, 2)
        coins.append(pairs[2][2])
    assert set(coins) == {0.0, 1.0} and 70 < sum(coins) < 130
    groups = human_harm.human_labels("reason", world, answered, 0)
    assert all(pairs[2] == (1, 2, 0.0) for *_, pairs in groups)

def test_refusals_with_and_without_a_reason(monkeypatch):
    """Compliance, or a refusal that gives its reason, counted as evasive."""
    world = data.World(0)
    act = data.act_prompts(world, "test", 1, True)[0]
    texts = [data.REFUSAL, f"{data.REFUSAL} {act.reason()}", world.answer(act.question())[1], "Hm?"]
    monkeypatch.setattr(human_harm, "answer", lambda *args, **options: texts)
    assert human_harm.without_a_reason(None, world, 0, 4, 0) == 1 / 4

@pytest.mark.slow
def test_human_harm_labels_beside_rlcai(out, tmp_path):
    """The comparison of the paper that leaves out its rival, writes over the rival's files, or
    gives people more labels than the AI."""
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    human_harm.main([*FLAGS, "--inputs", str(out), "--out", str(tmp_path)])
    figures = figures_of(tmp_path / "human_harm.json")
    # whole groups, until 10 are reached: at most six answers, 15 pairs, a group
    for wants in ("any", "reason"):
        assert 0 < figures[f"human_harm_labels_{wants}"] < 10 + 15
        assert m.load(tmp_path / f"human_{wants}.pt")["stage"] == f"human_{wants}"
    assert {"harm_rlcai_g1", "harm_any_g2", "generic_reason_strict"} <= set(figures)
    assert not list(tmp_path.glob("rlaif*"))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for flag in (["--resume"], ["--red-team-file", "red.txt"]):    # whose harm would be unknown
        with pytest.raises(SystemExit, match="no --resume"):
            human_harm.main([*FLAGS, "--inputs", str(out), "--out", str(tmp_path), *flag])

# --- No critique ----------------------------------------------------------------------------------

def test_a_direct_revision_has_no_critique(monkeypatch):
    """A direct reviser that is let think all the same, "The answer may stay." taken for an answer,
    or half a revision for a whole one."""
    tokenizer, asked = data.Tokenizer([bytes([i]) for i in range(256)]), []
    texts = ["Revision: Sorry. You could ask.", "The answer may stay.", "Revision: Sorry. You"]

    def generate(model, prompts, max_new, seed):
        asked.extend(map(tokenizer.decode, prompts))
        replies = [[*tokenizer.encode(text), tokenizer.eot] for text in texts]
        return [*replies[:2], replies[2][:-1]]

    monkeypatch.setattr(no_critique, "generate", generate)
    reviser = m.GPT(m.GPTConfig(tokenizer.n_vocab, 32, 1, 2, 16), tokenizer)
    cases = ["Q1?", "Q2?", "Q3?"], ["A1.", "A2.", "A3."], ["R1.", "R2.", "R3."]
    steps = no_critique.revise_directly(reviser, *cases, (0,))
    assert steps == [("", "Sorry. You could ask."), ("The answer may stay.", None), ("", "")]
    assert asked[0] == "<|user|> Request: Q1? Answer: A1. Rule: R1.<|assistant|>"

def test_direct_revisions_are_critiques_without_their_thought():
    """A direct reviser that is shown fewer cases, other cases or held-out verbs: the comparison is
    then one of examples and not of thinking."""
    world = data.World(0)
    pairs = no_critique.direct_revisions(world, 500)
    held_out = {verb.word for verb in world.verbs if verb.cell != "g1"}
    stays = [case for case, said in pairs if said == no_critique.STAYS]
    assert len(stays) / 500 == pytest.approx(0.4, abs=0.07)
    for case, said in pairs:
        assert case.startswith("Request: ") and " Rule: " in case
        assert "Critique" not in case + said and "That is" not in said
        assert said == no_critique.STAYS or said.startswith(f"Revision: {data.REFUSAL} If you ")
        assert not held_out & set(case.replace("?", " ").split())

def test_verdicts_are_counted_case_by_case():
    """A reviser that changes whatever it is given, praised for every fault that it finds."""
    world = data.World(0)
    acts, rules = data.act_prompts(world, "test", 42, True), rlaif.open_constitution()
    change_all = lambda model, questions, *rest: [("", "Sorry.")] * len(questions)
    shares = no_critique.right_verdicts(None, change_all, acts, rules, 0)
    assert shares == {"covered": 1, "silent": 0, "benign": 0}

def test_the_loop_without_a_critique(out, tmp_path, monkeypatch):
    """Both ways measured on one of the two models, or the direct one trained on the other's
    revisions: an untrained model finds no fault, and there is nothing to learn but helpfulness."""
    monkeypatch.setattr(no_critique, "ROOT", tmp_path)
    no_critique.main([*FLAGS, "--inputs", str(out), "--out", str(tmp_path), "--record"])
    figures = figures_of(tmp_path / "no_critique.json")
    assert {"harm_critique_2", "harm_direct_2", "verdict_covered_direct_g2"} <= set(figures)
    assert {"harm_direct_g2", "harm_slcai_g2"} <= set(figures)
    assert figures == figures_of(tmp_path / "docs" / "results" / "no_critique.json")
    assert m.load(tmp_path / "direct.pt")["world_seed"] == 0

# --- The alignment tax ----------------------------------------------------------------------------

@pytest.mark.slow
def test_what_fine_tuning_forgets(out, tmp_path, monkeypatch):
    """A tax measured on the wrong one of two models, or runs "without" that replay all the same."""
    judge = m.ScalarModel(m.load_gpt(out / "sft.pt"))
    scale = dict(mean=0.0, std=1.0, lowest=-1.0, margin=1.0)
    for name in ("pretrain", "sft", "ppo"):
        (tmp_path / f"{name}.pt").write_bytes((out / f"{name}.pt").read_bytes())
    m.save_model(tmp_path / "reward.pt", judge, scale=scale, taste="polite")
    rows, parse = [], tax.sft.read_args
    small = "--demonstrations 40 --epochs 1 --batch-size 8".split()
    monkeypatch.setattr(tax.sft, "read_args", lambda argv: parse([*argv, *small]))
    parse_ppo = tax.ppo.read_args
    few = "--iterations 1 --batch-size 4 --minibatch 2 --max-new 8 --epochs 1 --eval-prompts 4"
    monkeypatch.setattr(tax.ppo, "read_args", lambda argv: parse_ppo([*argv, *few.split()]))
    for stage in (tax.sft, tax.ppo):
        monkeypatch.setattr(stage, "replayer", lambda model, args, *_: rows.append(args.replay_rows)
                            or (lambda step: None))
    folders = ["--inputs", str(tmp_path), "--out", str(tmp_path / "tax"), "--device", "cpu"]
    tax.main([*folders, "--eval-prompts", "8"])
    figures = figures_of(tmp_path / "tax" / "tax.json")
    assert rows == [0, 0] and "facts_base" not in figures
    names = ("base", "sft_without", "sft_with", "ppo_without", "ppo_with")
    assert {f"loss_{name}" for name in names} <= set(figures)
    losses = [figures[f"loss_{name}"] for name in names]
    assert len(set(losses)) == 5                           # five models

# --- Unsorted prompts -----------------------------------------------------------------------------

def test_what_the_rounds_make_of_a_mixture():
    """A mixture that is sorted after all; a benign request that was changed counted as harm."""
    world = data.World(0)
    asked = unsorted.mixture(world, 60, ("g1", "g2r"), 0)
    acts = [world.parse_question(question) for question in asked]
    harmful = [act.verb.harmful for act in acts]
    assert sum(harmful) == 60 and 10 < sum(harmful[:60]) < 50
    assert {act.verb.cell for act in acts} == {"g1", "g2r"}
    twins = {act.question(): act.twin().question() for act in acts}
    assert set(twins) == set(twins.values())               # each with its twin
    act = next(act for act in acts if act.verb.harmful)
    why, how = f"{data.REFUSAL} {act.reason()}", world.answer(act.question())[1]
    tidy = world.answer(act.twin().question())[1]
    cases = [(act, how, why), (act, how, how), (act.twin(), tidy, tidy), (act.twin(), tidy, why)]
    traces = [{"question": a.question(), "answers": [first, last]} for a, first, last in cases]
    assert unsorted.shares(world, traces) == {"harm_revised": 0.5, "benign_revised": 0.5,
                                              "harm_left": 0.5, "over_refusal": 0.5}

@pytest.mark.slow
def test_the_loop_with_unsorted_prompts(out, tmp_path, monkeypatch):
    """SL-CAI and RL-CAI in one another's column; the runs of rlaif.py written over."""
    prefer_first = rlaif.prefer_first
    coin = lambda *args: prefer_first(*args).nan_to_num(0.5)       # it has no verdict
    monkeypatch.setattr(rlaif, "prefer_first", coin)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    unsorted.main([*FLAGS, "--inputs", str(out), "--out", str(tmp_path)])
    figures = figures_of(tmp_path / "unsorted.json")
    assert {"harm_left", "harm_slcai_g1", "harm_rlcai_g2r", "harm_rl_sort_g1"} <= set(figures)
    assert {path.name for path in tmp_path.iterdir()} == {"unsorted_sl.pt", "unsorted_rl.pt",
                                                          "unsorted.json"}
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

# --- Harm by round --------------------------------------------------------------------------------

def test_predicted_harm_by_hand():
    """(1 - h q)^k of the means where the mean of (1 - h q)^k was meant: verbs that never improve
    are then forgotten."""
    predicted = harm_by_round.predicted_harm
    assert predicted(0.5, 0.9, 0) == 1 and predicted(0.5, 0.9, 2) == pytest.approx(0.55 ** 2)
    mixture = predicted([0.5, 0.5], [1.0, 0.0], 2)
    assert mixture == pytest.approx((0.5 ** 2 + 1) / 2) and mixture != predicted(0.5, 0.5, 2)

def trace_of(world, act, principle, *refused):
    """A trace with an answer for each of `refused`, which says whether it is a refusal."""
    refusal, answer = f"{data.REFUSAL} {act.reason()}", world.answer(act.question())[1]
    return {"question": act.question(), "answers": [refusal if r else answer for r in refused],
            "steps": [{"principle": principle}, {"principle": "Be kind."}]}

def test_rounds_against_their_prediction_by_hand(tmp_path, capsys, monkeypatch):
    """A prediction made from the very prompts it is compared with, or a q that counts faults no
    principle covered."""
    world = data.World(0)
    acts = {act.verb.word: act for act in world.acts["train"]}
    swipe, kick, steal, hurt = acts["swipe"], acts["kick"], "Never steal.", "Never hurt."
    cases = [(swipe, steal, 0, 0, 1), (kick, steal, 0, 0, 0), (kick, hurt, 0, 1, 1),
             (swipe, steal, 1, 1, 1),                      # the measured half; then the other
             (swipe, steal, 0, 1, 1), (kick, hurt, 0, 0, 1), (kick, steal, 0, 0, 0),
             (kick, hurt, 1, 1, 1)]
    traces = [trace_of(world, *case) for case in cases]
    figures = harm_by_round.compare(traces, world, ["Never steal.", "Never steal or hurt."])
    # of the measured: three harmful at first, and h = 1 for steal, 1/2 for hurt; of the others two
    # were covered, and swipe alone was mended
    assert figures["h"] == pytest.approx((1 + 0.5 + 0.5) / 3) and figures["q"] == 0.5
    measured = [figures["harm_measured_1"], figures["harm_measured_2"]]
    assert measured == pytest.approx([2 / 3, 1 / 3])
    assert figures["harm_predicted_2"] == pytest.approx((1 - 2 / 3 * 0.5) ** 2)
    assert figures["harm_mixture_2"] == pytest.approx((0 + 1 + 1) / 3)
    with pytest.raises(SystemExit, match="not the world's"):
        unknown = {"question": "Why?", "answers": ["So."] * 3, "steps": []}
        harm_by_round.compare([unknown] * 2, world, ["Never steal."])
    with pytest.raises(SystemExit, match="nothing to predict"):
        harm_by_round.compare([traces[3]] * 4, world, ["Never steal."])

def test_harm_by_round_reads_what_rlaif_wrote(out, tmp_path, monkeypatch, capsys):
    """A script that knows another form of the traces than the one that is written."""
    monkeypatch.setattr(harm_by_round, "ROOT", tmp_path)
    world = data.World(0)
    swipe = next(act for act in world.acts["train"] if act.verb.word == "swipe")
    trace = trace_of(world, swipe, "Never steal.", 0, 1, 1)
    data.write_lines(out / "rlaif_traces.jsonl", [trace] * 4)
    harm_by_round.main(["--out", str(out), "--record"])
    assert "     2     0.000      0.250    0.250" in capsys.readouterr().out
    figures = figures_of(tmp_path / "docs" / "results" / "harm_by_round.json")
    assert (figures["h"], figures["q"]) == (0.5, 1)

TRACE = dict(question="Why?", answers=["So.", "No."], steps=[dict(principle="Be kind.")])

@pytest.mark.parametrize("trace", [
    {}, None, 3, [], TRACE | dict(steps=[{}]), TRACE | dict(steps=[]), TRACE | dict(answers=[]),
    TRACE | dict(question=None), TRACE | dict(answers=["So.", None]),
    TRACE | dict(answers=["So."] * 3, steps=TRACE["steps"] * 2)], ids=str)
def test_traces_of_another_form(trace, tmp_path):
    """A traceback where a line of the file is damaged, or of a run with other rounds."""
    data.write_lines(tmp_path / "rlaif_traces.jsonl", [TRACE, trace])
    with pytest.raises(SystemExit, match=r"traces.jsonl, line 2: .*: run `python rlaif.py` again"):
        harm_by_round.main(["--out", str(tmp_path)])

# --- Critics that fail ----------------------------------------------------------------------------

def test_a_coin_writes_the_verdicts():
    """A control whose noise is not noise: verdicts that still depend on the rule or on the act."""
    world, found = data.World(0), {}
    for i in range(4000):
        text = data.unmark(critics.shuffled_critique(world, data.Dice("coin", i)))
        act = world.parse_question(text[len("Request: "):text.index("?") + 1])
        rule = text[text.index("Rule:"):text.index("Critique:")]
        case = act.verb.harmful, data.covers(rule, act.verb.kind)
        found.setdefault(case, []).append("The rule forbids it" in text)
        assert ("Revision: Sorry" in text) == found[case][-1]
        assert act.verb.cell == "g1" and act not in world.acts["test"]
    assert set(found) == {(True, True), (True, False), (False, False)}
    for verdicts in found.values():
        assert sum(verdicts) / len(verdicts) == pytest.approx(0.5, abs=0.06)

@pytest.mark.slow
def test_critics_of_one_run_stopped_early(out, tmp_path, monkeypatch, capsys):
    """Critics of several runs, or critics that are all the last one; shuffled verdicts that reach
    the scripts run afterwards."""
    (tmp_path / "pretrain.pt").write_bytes((out / "pretrain.pt").read_bytes())
    monkeypatch.setitem(data.DOCUMENTS, "critique", data.DOCUMENTS["critique"])    # put back later
    tiny = "--steps 9 --batch-size 2 --eval-every 1".split()
    for name, more in (("a", ["--stop", "4", "6"]), ("b", ["--stop", "6", "--shuffle"])):
        critics.main(["--inputs", str(out), "--out", str(tmp_path / name), "--prompts", "8",
                      *more, *tiny])
    assert sorted(path.name for path in tmp_path.glob("?/*.pt")) == [
        "critic_00004.pt", "critic_00006.pt", "critic_00006.pt"]
    saved = [m.load_gpt(tmp_path / name / f"critic_0000{step}.pt")
             for name, step in (("a", 4), ("a", 6), ("b", 6))]
    assert saved[2].without == ["comparison", "drill"] and saved[0].without == []
    assert len({model.tokens.weight.sum().item() for model in saved}) == 3
    figures = figures_of(tmp_path / "b" / "critics.json")
    assert set(figures) == {"revised_harmful_6", "revised_harmless_6"}
    with pytest.raises(SystemExit, match="the run has 9 steps"):
        critics.main(["--inputs", str(out), "--out", str(tmp_path), "--stop", "12", *tiny])

def test_what_labels_cost(monkeypatch):
    """A cost that rewards a judge for saying A, or for being sure and wrong."""
    answers = {("good", "bad"): 0.9, ("bad", "good"): 0.6}     # P(A): it likes the first place
    ask = lambda judge, q, a, b, rules, stream, think=True: torch.tensor(
        [answers[pair] if think else 0.5 for pair in zip(a, b)])
    monkeypatch.setattr(rlaif, "prefer_first", ask)
    found = labels.label_costs(None, (["q"], ["good"], ["bad"], ["r"]), 0)
    assert found["soft"] == pytest.approx((1 - (0.9 + 1 - 0.6) / 2) ** 2)      # p = .65
    assert found["hard"] == 0 and found["no_thought"] == 0.25 and found["missing"] == 0
    assert found["one_order"] == pytest.approx((0.1 ** 2 + 0.6 ** 2) / 2)
    assert found["first"] == pytest.approx(0.75)
    assert [labels.rounded(p) for p in (0.9, 0.5, 0.2)] == [1, 0.5, 0]
    assert labels.cost(torch.tensor([1, 0.5, torch.nan])) == 0.125
    questions, better, worse, named = labels.cases_of(data.World(0), 56, 0)
    assert len(questions) == 42 and all(map(str.__ne__, better, worse))    # three cases of four

def test_intervals_are_over_pairs_of_verbs():
    """An interval over answers, which come verb by verb, or over unpaired means."""
    assert earned.interval([0.1, 0.1]) == pytest.approx([0.1, 0.1, 0.1])
    mean, low, high = earned.interval([-1.0, 1.0] * 50)
    assert mean == 0 and -0.25 < low < -0.15 and 0.15 < high < 0.25

@pytest.mark.slow
def test_dial_labels_and_earned_run(out, tmp_path, monkeypatch, capsys):
    """A dial on which each critic is the same; a policy judged that another critic had trained."""
    prefer_first, judges = rlaif.prefer_first, []
    coin = lambda judge, *args, **more: judges.append(judge) or prefer_first(
        judge, *args, **more).nan_to_num(0.5)              # an untrained one has no verdict
    monkeypatch.setattr(rlaif, "prefer_first", coin)
    monkeypatch.setattr(rlaif, "to_learn", lambda traces: [(t["question"], "No.") for t in traces])
    for name in ("critic_00004", "critic_00006"):
        (tmp_path / f"{name}.pt").write_bytes((out / "pretrain.pt").read_bytes())
    flags = [*FLAGS, "--critics", str(tmp_path), "--inputs", str(out), "--out", str(tmp_path)]
    dial.main(flags)
    rows = figures_of(tmp_path / "dial.json")
    assert list(rows) == ["critic_00004", "critic_00006", "helpful"]
    assert len({id(judge) for judge in judges}) == 3 and "hits" in capsys.readouterr().out
    before = len(judges)
    dial.main([*flags, "--resume"])                        # all rows are there
    assert len(judges) == before and figures_of(tmp_path / "dial.json") == rows
    labels.main(flags)
    assert set(figures_of(tmp_path / "labels.json")) == set(rows)
    earned.main([str(out), str(out), "--eval-prompts", "7", "--out", str(tmp_path)])
    figures = figures_of(tmp_path / "earned.json")
    assert figures["difference_g2"] == pytest.approx(figures["rlcai_g2"] - figures["slcai_g2"])
    with pytest.raises(SystemExit, match="no critics in"):
        dial.main([*FLAGS, "--critics", str(tmp_path / "none"), "--inputs", str(out)])

@pytest.mark.parametrize("script, flags", [(earned, ["out"]), (tax, [])])
def test_a_folder_that_is_a_file(script, flags, tmp_path, capsys):
    """A traceback after all the work."""
    (tmp_path / "afile").touch()
    with pytest.raises(SystemExit):
        script.main([*flags, "--out", str(tmp_path / "afile")])
    assert "argument --out: cannot write to" in capsys.readouterr().err

def test_a_seed_is_natural(capsys):
    """A traceback of numpy's in the middle: it knows no seed below 0."""
    with pytest.raises(SystemExit):
        earned.main(["out", "--seed", "-1"])
    assert "argument --seed: -1 is not from 0" in capsys.readouterr().err

# --- Doors ----------------------------------------------------------------------------------------

def test_missing_inputs_name_the_script_that_makes_them(tmp_path):
    """A traceback from a folder in which nothing was trained yet."""
    folder = ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="run `python rlaif.py` first"):
        harm_by_round.main(folder)
    (tmp_path / "rlaif_traces.jsonl").write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds nothing: run `python rlaif.py` first"):
        harm_by_round.main(folder)
    for script in (human_harm, no_critique):
        with pytest.raises(SystemExit, match="run `python pretrain.py` first"):
            script.main([*FLAGS, *folder])
    with pytest.raises(SystemExit, match="run `python pretrain.py` first"):
        critics.main(["--inputs", str(tmp_path), *folder])
