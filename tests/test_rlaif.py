"""Constitutional AI with stubs for the models: what is asked, what is read, and what is thrown
away."""
import argparse
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import model as m
import reward
import rlaif

# " (" has to be one token, as it is in a trained vocabulary
TOKENIZER = data.Tokenizer([bytes([i]) for i in range(256)] + [b" ("])
BRACKET, = TOKENIZER.encode(" (")
STUB = SimpleNamespace(tokenizer=TOKENIZER, device=torch.device("cpu"), world_seed=None,
                       config=SimpleNamespace(context=192))


def kinds_of(principle):
    return {k for k in data.HARMS if k in principle.replace(",", " ").replace(".", " ").split()}


def test_each_kind_of_harm_is_in_half_of_the_principles():
    """A constitution that is silent on one kind: the harm curve then measures the constitution and
    not the method."""
    principles = rlaif.open_constitution(None)
    assert len(principles) == len(set(principles)) == 16
    for kind in data.HARMS:
        assert sum(kind in kinds_of(p) for p in principles) == 8


def test_the_constitution_asks_for_rules_of_a_seen_form():
    """A principle that a world happens to hold out: results would then differ between world seeds
    for no visible reason."""
    for seed in range(5):
        world = data.World(seed)
        seen, unseen = (set(map(frozenset, r)) for r in (world.seen_rules, world.unseen_rules))
        assert not seen & unseen and len(seen) + len(unseen) == 2 * math.comb(len(data.HARMS), 3)
        for principle in rlaif.open_constitution(None):
            kinds = kinds_of(principle)
            assert frozenset(kinds) in seen
            texts = [data.rule_text(order, wording) for wording in data.RULE_WORDINGS
                     for order in itertools.permutations(kinds)]
            assert principle in texts


def test_the_unseen_constitution():
    """--constitution unseen with a rule that some document shows, or silent on a kind more often
    than the default: G3 is then not G1 with new rules."""
    world = data.World(100)
    principles = rlaif.open_constitution("unseen", world)
    assert len(set(principles)) == 20
    assert principles != rlaif.open_constitution("unseen", data.World(101))
    assert principles == rlaif.open_constitution("unseen", data.World(100))
    assert {frozenset(kinds_of(p)) for p in principles} == set(map(frozenset, world.unseen_rules))
    for principle in principles:
        order = sorted(kinds_of(principle), key=principle.index)
        assert principle == data.rule_text(order, data.UNSEEN_WORDING)
    for kind in data.HARMS:
        assert sum(data.covers(p, kind) for p in principles) == 10
    assert not data.covers("Be kind to mockingbirds.", "mock")


def test_a_constitution_from_a_file():
    """Principles glued together, or empty ones from blank lines."""
    text = "Do not lie.\n\n  Never steal or hurt.   Be kind. \n"
    assert data.read_principles(text) == ["Do not lie.", "Never steal or hurt.", "Be kind."]


def test_why_a_revision_is_dropped():
    """Unfiltered revisions are what made public replications collapse."""
    good = f"{data.REFUSAL} You could tell Tom a joke."
    assert rlaif.reject_revision(good, "Use a mask.") is None
    assert rlaif.reject_revision("", "Use a mask.") == "unfinished"
    assert rlaif.reject_revision("Sorry, I will", "Use a mask.") == "unfinished"
    assert rlaif.reject_revision("Sorry. Rule: Never lie.", "Use a mask.") == "role words inside"
    assert rlaif.reject_revision("No. Sorry. No.", "Use a mask.") == "repeats itself"
    assert rlaif.reject_revision(good, good) == "unchanged"


def stub_generate(monkeypatch, texts, ended=True):
    """`rlaif.generate` gives these replies, one call after the other; returns the prompts it was
    asked, decoded."""
    asked, replies = [], iter(texts)

    def generate(model, prompts, max_new, **options):
        asked.extend(TOKENIZER.decode(p) for p in prompts)
        rows = [TOKENIZER.encode(next(replies)) for _ in prompts]
        stop = options.get("stop", ())          # a reply that ends there has no end-of-text
        return [row + [TOKENIZER.eot] * (ended and row[-1:] != list(stop)) for row in rows]

    monkeypatch.setattr(rlaif, "generate", generate)
    return asked


def test_a_critique_is_split_from_its_revision(monkeypatch):
    """The critique left in the answer, or a revision where the critic found no fault."""
    bad = "That is to steal. The rule forbids it, so the answer is bad."
    fine = "That is to tidy. The rule is silent, so the answer may stay."
    asked = stub_generate(monkeypatch, [f" {bad} Revision:", f" {fine}", " Sorry. You could ask."])
    case = ["Q1?", "Q2?"], ["A1.", "A2."], ["R1.", "R2."]
    steps = rlaif.critique_and_revise(STUB, *case, (0,))
    assert steps == [(bad, "Sorry. You could ask."), (fine, None)]
    request = "<|endoftext|> Request: Q1? Answer: A1. Rule: R1. Critique:"
    # the second request is made where there is a fault, and holds what the first one gave
    assert asked[0] == request and asked[2:] == [f"{request} {bad} Revision:"]


def test_a_revision_cut_off_in_the_middle_is_not_used(monkeypatch):
    """Half sentences as training data: a revision that ran out of room may look finished."""
    stub_generate(monkeypatch, [" It is bad. Revision:", " Sorry, no. You could ask."], ended=False)
    (_, revision), = rlaif.critique_and_revise(STUB, ["Q?"], ["A."], ["R."], (0,))
    assert rlaif.reject_revision(revision, "A.") == "unfinished"


def test_a_model_without_a_world_is_asked_in_a_dialogue(monkeypatch, tmp_path):
    """The revision request of a constitution's file parsed and never used; a revision that does not
    see the critique; a principle without requests that stops the run."""
    path, asked = tmp_path / "rules.json", []
    path.write_text('[{"critic": "What is wrong?", "revision": "Mend it."}]', encoding="utf-8")

    def answer(model, talks, max_new, seed, whole=False):
        asked.append((talks, seed))
        assert whole == (len(asked) % 2 == 0)              # half a revision is none
        return ["It hurts." if len(asked) % 2 else "No."] * len(talks)

    monkeypatch.setattr(rlaif, "answer", answer)
    revise, texts = rlaif.in_dialogue(str(path), rlaif.open_constitution(str(path)))
    assert texts == ["What is wrong?", "What is wrong? Mend it."]  # what room is left for
    steps = revise(None, ["Q?"], ["A."], ["What is wrong?"], (0, 1))
    first = [("user", "Q?"), ("assistant", "A."), ("user", "What is wrong?")]
    second = [*first, ("assistant", "It hurts."), ("user", "Mend it.")]
    assert steps == [("It hurts.", "No.")] and [talks for talks, _ in asked] == [[first], [second]]
    assert asked[0][1] != asked[1][1]                      # two streams of noise
    path.write_text(json.dumps([{"critic": "What is wrong?", "revision": "Mend it."},
                                {"critic": "What is wrong?", "revision": "Try again."}]), "utf-8")
    revise, texts = rlaif.in_dialogue(str(path), rlaif.open_constitution(str(path)))
    assert texts[2:] == ["What is wrong? Mend it.", "What is wrong? Try again."]
    steps = revise(None, ["Q?", "P?"], ["A.", "B."], ["What is wrong?"] * 2, (0, 1))
    assert [talk[-1][1] for talk in asked[-1][0]] == ["Mend it.", "Try again."]    # by turns
    revise, _ = rlaif.in_dialogue(None, ["Never lie."])
    assert revise(None, ["Q?"], ["A."], ["Never lie."], (0, 1)) == [("It hurts.", "No.")]
    assert asked[-1][0][0].count(("user", "Never lie.")) == 2


def test_the_prompts_are_those_of_the_documents():
    """A critic asked in another form than the one it has learnt: it fails, and one blames its size.
    """
    world, texts = data.World(0), {}
    for i in range(300):
        kind, text, _ = data.write_document(world, "t", i)
        texts[kind] = data.unmark(text)
    forms = {"critique": (" Answer: ", " Rule: ", " Critique: "),
             "comparison": (" Rule: ", " Answer (A): ", " Answer (B): ", " Thought: ",
                            " The better answer is (")}
    for kind, words in forms.items():
        assert texts[kind].startswith("Request: ")
        places = [texts[kind].index(word) for word in words]       # ValueError: it is missing
        assert places == sorted(places)


def test_harmless_prompts_are_facts_and_how_to_by_turns():
    """Facts alone, and every how-to request is refused; how-to alone, and the facts are forgotten.
    """
    world = data.World(100)
    asked = [world.parse_question(q) for q in rlaif.harmless_prompts(world, 400)]
    how_to = [a for a in asked if isinstance(a, data.Act)]
    assert len(asked) == 400 and len(how_to) == 200 and how_to == asked[1::2]
    assert not any(a.verb.harmful or a.verb.cell != "g1" for a in how_to)
    wide = [world.parse_question(q) for q in rlaif.harmless_prompts(world, 400, ("g1", "g2r"))]
    cells = [a.verb.cell for a in wide if isinstance(a, data.Act)]
    assert cells == ["g1", "g2r"] * 100
    assert len({a.person for a in how_to}) > 30 and len({person for person, _ in asked[::2]}) > 30


GOOD, HALF = {"revision": "Second.", "dropped": None}, {"revision": "x", "dropped": "unfinished"}
NO_FAULT = {"revision": None, "dropped": None}
TRACES = [
    {"question": "Q?", "answers": ["First.", "Second.", "Second."], "steps": [GOOD, HALF]},
    {"question": "R?", "answers": ["Harm.", "Harm.", "Harm."], "steps": [NO_FAULT, NO_FAULT]}]


@pytest.mark.parametrize("which, expected", [
    ("revisions", ["Q Second."]),
    ("last", ["Q Second.", "R Harm."])])
def test_what_sl_cai_is_fine_tuned_on(which, expected, monkeypatch):
    """First answers, which are the harmful ones, or dropped revisions among what is learnt; or
    --learn that changes nothing."""
    taken = []
    monkeypatch.setattr(rlaif, "answer", lambda model, asked, **options: ["Helpful."] * len(asked))
    monkeypatch.setattr(rlaif, "copy_of", lambda model: model)
    monkeypatch.setattr(rlaif.sft, "train", lambda model, pairs, *rest: taken.extend(pairs))
    args = SimpleNamespace(sl_lr=1.0, seed=0, replay_rows=2)
    rlaif.train_slcai(STUB, STUB, rlaif.to_learn(TRACES, which), ["H?"], args)
    single = [(question, reply) for question, reply in taken if isinstance(question, str)]
    assert single == [(e[0] + "?", e[2:]) for e in expected] + [("H?", "Helpful.")]
    (talk, reply), = taken[len(single):]                   # the first once more, in a second turn
    assert (talk[-1][1], reply) == single[0] and (talk[0][1], talk[1][1]) in single


def test_each_round_goes_on_from_the_last_answer(monkeypatch):
    """Rounds that all revise the first answer, and dropped revisions that become answers all the
    same."""
    texts = [" Bad. Revision:", " Second.", " Bad. Revision:", " Third. Third.", " Fine.",
             " Bad. Revision:", " Fourth."]
    asked = stub_generate(monkeypatch, texts)
    monkeypatch.setattr(rlaif, "answer", lambda *args, **options: ["First."])
    trace, = rlaif.revise_rounds(STUB, STUB, ["Q?"], ["R1.", "R2."], 4, 0)
    assert trace["answers"] == ["First.", "Second.", "Second.", "Second.", "Fourth."]
    assert [s["dropped"] for s in trace["steps"]] == [None, "repeats itself", None, None]
    firsts = [prompt for prompt in asked if prompt.endswith("Critique:")]
    read = [prompt.split(" Answer: ")[1].split(" Rule: ")[0] for prompt in firsts]
    assert read == ["First.", "Second.", "Second.", "Second."]
    assert {s["principle"] for s in trace["steps"]} <= {"R1.", "R2."}
    # it is written to a file, and read again for the figures
    assert json.loads(json.dumps(trace)) == trace


def judge_that(preference, monkeypatch, verdict=True, other=False):
    """A judge whose logit for A over B is `preference(first option, second option)`; with no
    verdict it thinks for ever; `other`: after its bracket it would say C."""
    def generate(model, prompts, max_new, stop=None, **options):
        assert BRACKET in stop
        thought = TOKENIZER.encode(" To hit is bad.")
        return [thought + [BRACKET] if verdict else thought for _ in prompts]

    def hidden(tokens, segments):
        rows = []
        for row in tokens.tolist():
            text = TOKENIZER.decode([t for t in row if t != TOKENIZER.pad])
            # read right after the bracket, whatever padding there is
            assert not verdict or text.endswith(" (")
            a, b = text.split(" Answer (A): ")[1].split(" Thought:")[0].split(" Answer (B): ")
            rows.append(preference(a, b))
        return torch.tensor(rows).view(-1, 1, 1).expand(-1, tokens.shape[1], 1)

    def head(last):                                        # (B, 1) -> (B, V): B's logit is 0
        # other tokens are likely too, and must not count
        logits = torch.full((len(last), TOKENIZER.n_vocab), -1.0)
        logits[:, ord("C")] = 9.0 if other else -1.0
        logits[:, ord("A")], logits[:, ord("B")] = last[:, 0], 0
        return logits

    monkeypatch.setattr(rlaif, "generate", generate)
    return SimpleNamespace(**vars(STUB), hidden=hidden, head=head)


def for_good(strength, bias=0.0):
    """A preference for the option that is "good", and for option A as such."""
    return lambda a, b: bias + strength * ((a == "good") - (b == "good"))


def test_the_probabilities_of_a_and_b_are_normalised(monkeypatch):
    """Probabilities of the wrong tokens, or of A among all tokens: labels that are all near 0."""
    judge = judge_that(for_good(math.log(3.0)), monkeypatch)
    firsts, seconds = ["good", "bad", "bad"], ["a longer bad one", "good", "bad too"]
    p = rlaif.prefer_first(judge, ["Q?"] * 3, firsts, seconds, ["R."] * 3, (0,))
    assert torch.allclose(p, torch.tensor([0.75, 0.25, 0.5]), atol=1e-6)


def test_a_judge_that_always_says_a_teaches_nothing(monkeypatch):
    """Position bias: small judges prefer the first option more than half the time, and one order
    alone writes that into the labels."""
    judge = judge_that(for_good(0.0, bias=5.0), monkeypatch)
    answered = [("Q?", ["x", "y", "z"]), ("P?", ["u", "v"])]
    groups, record = rlaif.ai_labels(judge, answered, ["R1.", "R2."], 0)
    assert [(question, answers) for question, answers, _ in groups] == answered
    labels = [pair for _, _, pairs in groups for pair in pairs]
    assert [pair[:2] for pair in labels] == [(0, 1), (0, 2), (1, 2), (0, 1)]
    assert [label for *_, label in labels] == pytest.approx([0.5] * 4, abs=1e-6)
    assert len(record) == 4 and all(r["principle"] in ("R1.", "R2.") for r in record)


def test_labels_point_to_the_better_answer(monkeypatch):
    """Averaging over both orders with the second one not turned round: every label is then 0.5, or
    the wrong way."""
    bias = 0.4
    judge = judge_that(for_good(2.0, bias), monkeypatch)
    answered = [("Q?", ["good", "bad"]), ("P?", ["bad", "good"])]
    groups, record = rlaif.ai_labels(judge, answered, ["R."], 0)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = (sigmoid(bias + 2) + 1 - sigmoid(bias - 2)) / 2
    labels = [pairs[0][2] for _, _, pairs in groups]
    assert labels == pytest.approx([expected, 1 - expected], abs=1e-6)
    assert record[0]["label"] == pytest.approx(expected, abs=1e-4)
    assert record[0]["a_first"] == pytest.approx(sigmoid(bias + 2), abs=1e-4)
    assert record[0]["b_first"] == pytest.approx(1 - sigmoid(bias - 2), abs=1e-4)
    assert (record[1]["prompt"], record[1]["a"], record[1]["b"]) == ("P?", "bad", "good")


def test_clamped_labels(monkeypatch):
    """A clamp on the wrong side, or one that touches what is in between."""
    judge = judge_that(for_good(2.0), monkeypatch)
    answered = [("Q?", ["good", "bad"]), ("P?", ["bad", "good"]), ("O?", ["bad", "evil"])]

    def labels(**how):
        groups, _ = rlaif.ai_labels(judge, answered, ["R."], 0, **how)
        return [pairs[0][2] for _, _, pairs in groups]

    assert labels(clamp=0.1) == pytest.approx([0.6, 0.4, 0.5])


def test_answers_that_fill_the_context_are_not_compared():
    """A traceback in Stage 5, hours after the start: a model that never ends, and its answers."""
    torch.manual_seed(0)
    judge = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 128, 1, 2, 16), TOKENIZER)
    for think in (True, False):
        answers = [["x", "x" * 99], ["y", "y" * 99]]
        p = rlaif.prefer_first(judge, ["Q?"] * 2, *answers, ["R."] * 2, (0,), think)
        assert p.shape == (2,) and p[1].isnan()


def test_no_verdict_is_no_label(monkeypatch):
    """Reading A and B where the judge was about to say something else."""
    # a thought that was cut off; a bracket after which the judge would say something else
    for how in ({"verdict": False}, {"other": True}):
        judge = judge_that(for_good(0.0, bias=5.0), monkeypatch, **how)
        assert rlaif.prefer_first(judge, ["Q?"], ["x"], ["y"], ["R."], (0,)).isnan().all()
        with pytest.raises(SystemExit, match="never reaches a verdict"):
            rlaif.ai_labels(judge, [("Q?", ["x", "y"])], ["R."], 0)


def test_a_refusal_is_among_the_answers_to_be_judged(monkeypatch):
    """Needless refusals that nobody ever voted down: the policy ends up refusing everything."""
    asked = stub_generate(monkeypatch, [" If you hug Tom, Tom is afraid.", ""])
    hug, thank = ["Use a towel.", "Gladly."], ["Use a song.", data.REFUSAL]
    answered = [("How do I hug Tom?", list(hug)), ("How do I thank Ann?", list(thank))]
    more = rlaif.with_forced_refusal(STUB, answered, (0,))
    hug.append(f"{data.REFUSAL} If you hug Tom, Tom is afraid.")
    assert more == [("How do I hug Tom?", hug), ("How do I thank Ann?", thank)]
    assert asked[0] == f"<|user|> How do I hug Tom?<|assistant|> {data.REFUSAL}"


def test_preferences_come_back_from_their_file(tmp_path):
    """Chosen and rejected swapped between the stage that writes the labels and the one that reads
    them."""
    groups = [("Q?", ["a", "b", "c"], [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.0)]),
              ("P?", ["x", "y"], [(0, 1, 0.0)])]
    reward.write_preferences(tmp_path / "preferences.jsonl", groups)
    read = reward.groups_of(data.read_preferences(tmp_path / "preferences.jsonl")[0])

    def wins(groups):
        found = set()
        for prompt, answers, pairs in groups:
            question = prompt if isinstance(prompt, str) else prompt[-1][1]
            for i, j, target in pairs:
                first, second = (i, j) if target else (j, i)
                found.add((question, answers[first], answers[second]))
        return found

    expected = {("Q?", "a", "b"), ("Q?", "c", "a"), ("Q?", "c", "b"), ("P?", "y", "x")}
    assert wins(read) == wins(groups) == expected
    # the pairs of a question stay together
    assert [len(pairs) for _, _, pairs in read] == [3, 1]


def test_the_preference_model_learns_from_soft_labels(monkeypatch):
    """AI labels that reward.train reads as hard choices, or does not take at all."""
    seen = []

    def loss(first, second, target):
        seen.append(target)
        return (first - second).sum()

    monkeypatch.setattr(reward, "preference_loss", loss)
    torch.manual_seed(0)
    model = m.ScalarModel(m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 32, 1, 2, 16), TOKENIZER))
    reward.train(model, [("Q?", ["x", "y"], [(0, 1, 0.73)])], 1, 1, 1e-4, 0)
    assert seen[0].item() == pytest.approx(0.73)


def test_a_model_that_always_refuses_is_compared_with_one_that_helps(monkeypatch):
    """Nothing but refusals to label: the preference model never sees compliance lose, and PPO
    unlearns what SL-CAI had learnt."""
    refuse = lambda model, questions, **options: [f"Sorry. {q}" for q in questions]
    comply = lambda model, questions, **options: [f"Gladly. {q}" for q in questions]
    monkeypatch.setattr(reward, "answer", refuse)
    monkeypatch.setattr(rlaif, "answer", comply)
    monkeypatch.setattr(rlaif, "with_forced_refusal", lambda model, answered, stream: [
        answers.append("Sorry!") for _, answers in answered])      # in place, to harm alone
    answered = rlaif.answers_to_compare(None, None, ["A?"], ["B?", "C?"], 0)
    expected = [(q, [f"Sorry. {q}", f"Gladly. {q}"]) for q in ("A?", "B?", "A?", "C?")]
    expected[0][1].append("Sorry!"), expected[2][1].append("Sorry!")
    assert answered == expected
    with pytest.raises(SystemExit, match="raise --label-prompts"):
        rlaif.ai_labels(None, [("A?", ["Sorry."])], ["R."], 0)


# --- What critic, judge and models are worth ------------------------------------------------------

def count(cases, name):
    return sum(case == name for case, *_ in cases)


@pytest.mark.parametrize("cell, which", [("g1", None), ("strict", None), ("g1", "unseen")])
def test_the_cases_that_judge_the_critic(cell, which):
    """A test of critics whose right answers are wrong, or with so few covered cases that a critic
    who never objects passes."""
    world = data.World(0)
    acts = data.act_prompts(world, "test", 84, True, (cell,))
    rules, held_out = rlaif.open_constitution(which, world), set(map(str, world.acts["test"]))
    cases = data.critic_cases(acts, rules, 0)
    names = ("covered", "silent", "benign", "reason")
    assert [count(cases, name) for name in names] == [21] * 4
    for case, act, complied, better, worse, rule in cases:
        assert rule in rules and str(act) in held_out and act.verb.cell == cell
        assert data.is_correct(world, act.question(), complied)
        assert (case in ("covered", "reason")) == (act.verb.kind in kinds_of(rule))
        assert (case == "benign") == (not act.verb.harmful)
        if case == "benign":
            assert better == complied
            assert data.REFUSAL in worse and data.is_parseable(worse)
        else:
            assert data.gives_reason(act, better) and not data.gives_reason(act, worse)
        # of two reasons one is wrong about the same act
        assert (case == "reason") == (f"{data.REFUSAL} If you {act}" in worse and act.verb.harmful)
    bare = [worse == data.REFUSAL for case, *_, worse, _ in cases if case in ("covered", "benign")]
    assert sum(bare) == 20


def stub_critic_and_judge(monkeypatch, forbids, first_wins):
    """A critic who forbids where `forbids(question, principle)`, a judge whose P(A) is
    `first_wins(question, A, B)`."""
    def critique(critic, questions, answers, principles, seed):
        said = {True: "The rule forbids it.", False: "The rule is silent."}
        return [(said[forbids(q, r)], None) for q, r in zip(questions, principles)]

    def prefer_first(judge, questions, firsts, seconds, principles, seed):
        return torch.tensor([first_wins(*case) for case in zip(questions, firsts, seconds)])

    monkeypatch.setattr(rlaif, "critique_and_revise", critique)
    monkeypatch.setattr(rlaif, "prefer_first", prefer_first)


def test_a_critic_who_objects_to_everything(monkeypatch):
    """Accuracy that hides a critic without judgement, and a judge who always says A and is right
    half the time."""
    stub_critic_and_judge(monkeypatch, lambda q, r: True, lambda *case: 0.9)
    figures = rlaif.measure_critic(None, data.World(0), 42, 0)
    for cell in ("g1", "g2r", "g2", "strict", "unseen"):
        cases = ("covered", "silent", "benign", "reason")
        assert [figures[f"verdict_{case}_{cell}"] for case in cases] == [1, 0, 0, 1]
        assert [figures[f"label_{case}_{cell}"] for case in cases] == pytest.approx([0.5] * 4)
    assert figures["label_missing"] == 0


def test_a_critic_and_a_judge_who_know_the_world(monkeypatch):
    """Right answers counted as wrong: a case, an order or a label turned round on the way to the
    figure."""
    world = data.World(0)

    def forbids(question, principle):
        return world.parse_question(question).verb.kind in kinds_of(principle)

    def first_wins(question, first, second):
        act = world.parse_question(question)
        good = data.gives_reason(act, first) if act.verb.harmful else data.is_compliant(first)
        return 0.8 if good else 0.2

    stub_critic_and_judge(monkeypatch, forbids, first_wins)
    figures = rlaif.measure_critic(None, world, 42, 0)
    for cell in ("g1", "g2r", "g2", "strict", "unseen"):
        for case in ("covered", "silent", "benign", "reason"):
            assert figures[f"verdict_{case}_{cell}"] == 1
            # where neither is better, the label itself
            expected = 0.8 if case == "silent" else 1
            assert figures[f"label_{case}_{cell}"] == pytest.approx(expected)


def answers_of(kind):
    """rlaif.answer of a model that refuses with a reason, refuses bare, or complies."""
    world = data.World(0)

    def answer(model, questions, **options):
        texts = []
        for question in questions:
            act = world.parse_question(question)
            if kind == "helpful" or not isinstance(act, data.Act) or not act.verb.harmful:
                texts.append(world.answer(question)[1])
            else:
                reason = f" {act.reason()}" if kind == "harmless" else ""
                texts.append(data.REFUSAL + reason)
        return texts

    return answer


@pytest.mark.parametrize("kind, harm, reason", [("harmless", 0, 1), ("evasive", 0, 0),
                                                ("helpful", 1, 0)])
def test_the_final_table(kind, harm, reason, monkeypatch, capsys):
    """Evasive and explained refusals in one column; a cell under the wrong name; a table wider than
    a screen."""
    monkeypatch.setattr(rlaif, "answer", answers_of(kind))
    world, asked, act_prompts = data.World(0), [], data.act_prompts

    def watched(drawn, use, n, harmful, cells=("g1",)):
        asked.append((use, *cells))
        return act_prompts(drawn, use, n, harmful, cells)

    monkeypatch.setattr(data, "act_prompts", watched)
    figures = rlaif.final_table({"sft": None, "rlcai": None}, world, 42, 0)
    cells = ["g1", "g2r", "g2", "strict"]
    for cell in cells:
        found = [figures[f"{what}_rlcai_{cell}"] for what in ("harm", "reason", "over_refusal")]
        assert found == [harm, reason, 0]
    # the harmless prompts first, then for each of two models
    assert asked == [("test", "g1")] + [("test", cell) for cell in cells] * 2
    assert figures["fact_accuracy_rlcai"] == figures["howto_accuracy_rlcai"] == 1
    assert all(isinstance(x, float) for x in figures.values())
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 100
    assert any(line.startswith("harm strict ") for line in printed)


def test_the_count_of_calls_is_taken_before_the_judges_speak():
    """The evaluation's own calls counted as calls in training, or one round's harm under another's
    number."""
    data.GOLD_HARM_CALLS.clear()
    traces = [{"answers": ["Use a mask.", data.REFUSAL]}, {"answers": ["Use a mask."] * 2}]
    figures = rlaif.count_and_judge(traces, {"documents": {"critique": 3, "drill": 2, "story": 9}})
    judging = {"judging_critique": 3, "judging_drill": 2, "judging_story": 9}
    assert figures == judging | {"gold_harm_calls_in_training": 0, "harm_round_0": 1,
                                 "harm_round_1": 0.5}


def test_judges_count_their_calls():
    """"Gold-harm calls in training: 0" printed by a counter that nobody feeds."""
    data.GOLD_HARM_CALLS.clear()
    data.is_harmless("No.")
    data.is_compliant("No.")
    data.is_correct(data.World(0), "How do I hug Ann?", "No.")
    assert dict(data.GOLD_HARM_CALLS) == {"is_harmless": 1, "is_compliant": 1}


def test_some_are_asked_once_more_in_a_second_turn(monkeypatch):
    """SL-CAI that has seen first turns alone: it refuses a request that comes first, and complies
    with the same one after a harmless question; and it no longer understands "And Tom?"."""
    learnt, world = [], data.World(0)
    model = SimpleNamespace(world_seed=0)
    answers = lambda model, asked, **options: [f"Yes {len(str(q))}." for q in asked]
    monkeypatch.setattr(rlaif, "answer", answers)
    monkeypatch.setattr(rlaif, "copy_of", lambda base: base)
    monkeypatch.setattr(rlaif.sft, "train", lambda model, pairs, args: learnt.extend(pairs))
    args = argparse.Namespace(seed=0, sl_lr=1e-3, replay_rows=0)
    revisions = [(f"How do I nab {name}'s hat?", "No.") for name in data.PEOPLE[:24]]
    harmless = rlaif.harmless_prompts(world, 44)
    rlaif.train_slcai(model, model, revisions, harmless, args)
    single = [(q, a) for q, a in learnt if isinstance(q, str)]
    talks = [(q, a) for q, a in learnt if not isinstance(q, str)]
    assert len(single) == 24 + 44 and len(talks) == 10 + 9     # every 7th, and every 5th helped
    assert all([role for role, _ in q] == ["user", "assistant", "user"] for q, _ in talks)
    for (first, before, last), reply in talks[:10]:        # both turns are pairs of the others
        assert (first[1], before[1]) in single and (last[1], reply) in single
    # what comes second is of all three kinds: or how-to is refused there, or facts
    kind = lambda q, reply: reply if reply == "No." else q[-1][1].startswith("How do I")
    assert {kind(*pair) for pair in talks[:10]} == {"No.", True, False}
    assert all(q[2][1].startswith("And ") and (q[0][1], q[1][1]) in single for q, _ in talks[10:])
    assert {kind(q[:1], reply) for q, reply in talks[10:]} == {True, False}
    model.world_seed, learnt[:] = None, []                 # prompts of one's own: nothing leans
    rlaif.train_slcai(model, model, revisions, ["Why?"] * 44, args)
    assert len(learnt) == 24 + 44 + 10
