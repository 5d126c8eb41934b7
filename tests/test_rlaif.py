"""Constitutional AI with stubs for the models: what is asked, what is read, and what is thrown away."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import reward
import rlaif

TOKENIZER = data.Tokenizer([bytes([i]) for i in range(256)] + [b" ("])       # " (" has to be one token, as it is in a trained vocabulary
BRACKET, = TOKENIZER.encode(" (")


def kinds_of(principle):
    return {k for k in data.HARMS if k in principle.replace(",", " ").replace(".", " ").split()}


def test_each_kind_of_harm_is_in_half_of_the_principles():
    """A constitution that is silent on one kind: the harm curve then measures the constitution and not the method."""
    principles = rlaif.open_constitution(None)
    assert len(principles) == len(set(principles)) == 16
    for kind in data.HARMS:
        assert sum(kind in kinds_of(p) for p in principles) == 8


def test_the_constitution_asks_for_rules_of_a_seen_form():
    """A principle that a world happens to hold out: results would then differ between world seeds for no visible reason."""
    for seed in range(5):
        world = data.World(seed)
        seen, unseen = ({frozenset(r) for r in rules} for rules in (world.seen_rules, world.unseen_rules))
        assert not seen & unseen and len(seen) + len(unseen) == 70
        for principle in rlaif.open_constitution(None):
            assert frozenset(kinds_of(principle)) in seen
            assert any(principle == data.rule_text(order, w) for w in data.RULE_WORDINGS for order in itertools.permutations(kinds_of(principle)))


def test_a_constitution_from_a_file():
    """Principles glued together, or empty ones from blank lines."""
    assert data.read_principles("Do not lie.\n\n  Never steal or hurt.   Be kind. \n") == ["Do not lie.", "Never steal or hurt.", "Be kind."]


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
    """`rlaif.generate` gives these replies, one call after the other; returns the prompts it was asked, decoded."""
    asked, replies = [], iter(texts)

    def generate(model, prompts, max_new, tokenizer, **options):
        asked.extend(tokenizer.decode(p) for p in prompts)
        return [tokenizer.encode(next(replies)) + [tokenizer.eot] * ended for _ in prompts]

    monkeypatch.setattr(rlaif, "generate", generate)
    return asked


def test_a_critique_is_split_from_its_revision(monkeypatch):
    """The critique left in the answer, or a revision where the critic found no fault."""
    asked = stub_generate(monkeypatch, [" That is to steal. The rule forbids it, so the answer is bad. Revision: Sorry. You could ask.",
                                        " That is to tidy. The rule is silent, so the answer may stay."])
    steps = rlaif.critique_and_revise(None, TOKENIZER, ["Q1?", "Q2?"], ["A1.", "A2."], ["R1.", "R2."], (0,))
    assert steps == [("That is to steal. The rule forbids it, so the answer is bad.", "Sorry. You could ask."),
                     ("That is to tidy. The rule is silent, so the answer may stay.", None)]
    assert asked[0] == "<|endoftext|> Request: Q1? Answer: A1. Rule: R1. Critique:"


def test_a_revision_cut_off_in_the_middle_is_not_used(monkeypatch):
    """Half sentences as training data: a revision that ran out of room may look finished."""
    stub_generate(monkeypatch, [" It is bad. Revision: Sorry, no. You could ask."], ended=False)
    (_, revision), = rlaif.critique_and_revise(None, TOKENIZER, ["Q?"], ["A."], ["R."], (0,))
    assert rlaif.reject_revision(revision, "A.") == "unfinished"


def test_the_prompts_are_those_of_the_documents():
    """A critic asked in another form than the one it has learnt: it fails, and one blames its size."""
    world = data.World(0)
    texts = {kind: data.unmark(text) for kind, text, _ in (data.write_document(world, "t", i) for i in range(300))}
    assert texts["critique"].startswith("Request: ") and texts["comparison"].startswith("Request: ")
    for words in ("Request:", "Answer:", "Rule:", "Critique:"):
        assert f"{words} " in texts["critique"]
    assert texts["critique"].index(" Answer: ") < texts["critique"].index(" Rule: ") < texts["critique"].index(" Critique: ")
    order = [texts["comparison"].index(w) for w in (" Rule: ", " Answer (A): ", " Answer (B): ", " Thought: ", " The better answer is (")]
    assert order == sorted(order)


def test_each_round_goes_on_from_the_last_answer(monkeypatch):
    """Rounds that all revise the first answer, and dropped revisions that become answers all the same."""
    asked = stub_generate(monkeypatch, [" Bad. Revision: Second.", " Bad. Revision: Third. Third.", " Fine.", " Bad. Revision: Fourth."])
    monkeypatch.setattr(rlaif, "answer", lambda *args, **options: ["First."])
    (trace,), dropped = rlaif.revise_rounds(None, None, TOKENIZER, ["Q?"], ["R1.", "R2."], 4, 0)
    assert trace["answers"] == ["First.", "Second.", "Second.", "Second.", "Fourth."]
    assert dropped == {"repeats itself": 1} and [s["dropped"] for s in trace["steps"]] == [None, "repeats itself", None, None]
    assert [a.split(" Answer: ")[1].split(" Rule: ")[0] for a in asked] == ["First.", "Second.", "Second.", "Second."]
    assert {s["principle"] for s in trace["steps"]} <= {"R1.", "R2."}
    assert json.loads(json.dumps(trace)) == trace                # it is written to a file and read again by --resume


def judge_that(preference, monkeypatch, verdict=True):
    """A judge whose logit for A over B is `preference(first option, second option)`; with no verdict it thinks for ever."""
    def generate(model, prompts, max_new, tokenizer, stop=None, **options):
        assert BRACKET in stop
        thought = tokenizer.encode(" To hit is bad.")
        return [thought + [BRACKET] if verdict else thought for _ in prompts]

    def hidden(tokens, segments):
        rows = []
        for row in tokens.tolist():
            text = TOKENIZER.decode([t for t in row if t != TOKENIZER.pad])
            assert not verdict or text.endswith(" (")            # read right after the bracket, whatever padding there is
            a, b = text.split(" Answer (A): ")[1].split(" Thought:")[0].split(" Answer (B): ")
            rows.append(preference(a, b))
        return torch.tensor(rows).view(-1, 1, 1).expand(-1, tokens.shape[1], 1)

    def head(last):                                               # (B, 1) -> (B, V): B's logit is 0
        logits = torch.full((len(last), TOKENIZER.n_vocab), 3.0)  # other tokens are likely too, and must not count
        logits[:, ord("A")], logits[:, ord("B")] = last[:, 0], 0
        return logits

    monkeypatch.setattr(rlaif, "generate", generate)
    return SimpleNamespace(tokens=SimpleNamespace(weight=torch.zeros(1)), hidden=hidden, head=head)


def test_the_probabilities_of_a_and_b_are_normalised(monkeypatch):
    """Probabilities of the wrong tokens, or of A among all tokens: labels that are all near 0."""
    judge = judge_that(lambda a, b: math.log(3.0) if a == "good" else -math.log(3.0) if b == "good" else 0.0, monkeypatch)
    p = rlaif.prefer_first(judge, TOKENIZER, ["Q?"] * 3, ["good", "bad", "bad"], ["a longer bad one", "good", "bad too"], ["R."] * 3, (0,), batch_size=2)
    assert torch.allclose(p, torch.tensor([0.75, 0.25, 0.5]), atol=1e-6)


def test_a_judge_that_always_says_a_teaches_nothing(monkeypatch):
    """Position bias: small judges prefer the first option more than half the time, and one order alone writes that into the labels."""
    judge = judge_that(lambda a, b: 5.0, monkeypatch)
    groups, record = rlaif.ai_labels(judge, TOKENIZER, [("Q?", ["x", "y", "z"]), ("P?", ["u", "v"])], ["R1.", "R2."], 0)
    assert [[pair[:2] for pair in pairs] for _, _, pairs in groups] == [[(0, 1), (0, 2), (1, 2)], [(0, 1)]]
    assert all(label == pytest.approx(0.5, abs=1e-6) for _, _, pairs in groups for *_, label in pairs)
    assert len(record) == 4 and all(r["principle"] in ("R1.", "R2.") for r in record)


def test_labels_point_to_the_better_answer(monkeypatch):
    """Averaging over both orders with the second one not turned round: every label is then 0.5, or the wrong way."""
    bias = 0.4
    judge = judge_that(lambda a, b: bias + (2.0 if a == "good" else -2.0 if b == "good" else 0.0), monkeypatch)
    groups, record = rlaif.ai_labels(judge, TOKENIZER, [("Q?", ["good", "bad"]), ("P?", ["bad", "good"])], ["R."], 0)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = (sigmoid(bias + 2) + 1 - sigmoid(bias - 2)) / 2
    assert groups[0][2][0][2] == pytest.approx(expected, abs=1e-6) and groups[1][2][0][2] == pytest.approx(1 - expected, abs=1e-6)
    assert record[0]["label"] == pytest.approx(expected, abs=1e-4) and record[0]["a_first"] == pytest.approx(sigmoid(bias + 2), abs=1e-4)


def test_no_verdict_is_no_label(monkeypatch):
    """Reading A and B where the judge was about to say something else."""
    judge = judge_that(lambda a, b: 5.0, monkeypatch, verdict=False)
    assert rlaif.prefer_first(judge, TOKENIZER, ["Q?"], ["x"], ["y"], ["R."], (0,)).tolist() == [0.5]


def test_a_refusal_is_among_the_answers_to_be_judged(monkeypatch):
    """Needless refusals that nobody ever voted down: the policy ends up refusing everything."""
    asked = stub_generate(monkeypatch, [" If you hug Tom, Tom is afraid.", ""])
    answered = [("How do I hug Tom?", ["Use a towel.", "Gladly."]), ("How do I thank Ann?", ["Use a song.", data.REFUSAL])]
    more = rlaif.with_forced_refusal(None, TOKENIZER, answered, (0,))
    assert more == [("How do I hug Tom?", ["Use a towel.", "Gladly.", f"{data.REFUSAL} If you hug Tom, Tom is afraid."]), answered[1]]
    assert asked[0] == f"<|user|> How do I hug Tom?<|assistant|> {data.REFUSAL}"


def test_preferences_come_back_from_their_file(tmp_path):
    """Chosen and rejected swapped between the stage that writes the labels and the one that reads them."""
    groups = [("Q?", ["a", "b", "c"], [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.0)]), ("P?", ["x", "y"], [(0, 1, 0.0)])]
    reward.write_preferences(tmp_path / "preferences.jsonl", groups)

    def wins(groups):
        return {(q if isinstance(q, str) else q[-1][1], answers[i if t else j], answers[j if t else i]) for q, answers, pairs in groups for i, j, t in pairs}

    read = reward.groups_of(data.read_preferences(tmp_path / "preferences.jsonl")[0])
    assert wins(read) == wins(groups) == {("Q?", "a", "b"), ("Q?", "c", "a"), ("Q?", "c", "b"), ("P?", "y", "x")}
    assert [len(pairs) for _, _, pairs in read] == [3, 1]        # the pairs of a question stay together


def test_the_preference_model_learns_from_soft_labels(monkeypatch):
    """AI labels that reward.train reads as hard choices, or does not take at all."""
    seen = []
    monkeypatch.setattr(reward, "preference_loss", lambda first, second, target: (seen.append(target), (first - second).sum())[1])
    import model as m
    torch.manual_seed(0)
    rm = m.ScalarModel(m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 32, 1, 2, 16)))
    reward.train(rm, TOKENIZER, [("Q?", ["x", "y"], [(0, 1, 0.73)])], 1, 1e-4, 0)
    assert seen[0].item() == pytest.approx(0.73)
