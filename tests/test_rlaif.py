"""Constitutional AI with stubs for the models: what is asked, what is read, and what is thrown
away."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import data
import reward
import rlaif

# " (" has to be one token, as it is in a trained vocabulary
TOKENIZER = data.Tokenizer([bytes([i]) for i in range(256)] + [b" ("])
BRACKET, = TOKENIZER.encode(" (")


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
        seen, unseen = (
            {frozenset(r) for r in rules} for rules in (world.seen_rules, world.unseen_rules)
        )
        assert not seen & unseen and len(seen) + len(unseen) == 70
        for principle in rlaif.open_constitution(None):
            assert frozenset(kinds_of(principle)) in seen
            assert any(
                principle == data.rule_text(order, w)
                for w in data.RULE_WORDINGS
                for order in itertools.permutations(kinds_of(principle))
            )


def test_the_unseen_constitution():
    """--constitution unseen with a rule that some document shows, or silent on a kind more often
    than the default: G3 is then not G1 with new rules."""
    world = data.World(100)
    principles = rlaif.open_constitution("unseen", world)
    assert len(set(principles)) == 20 and principles != rlaif.open_constitution(
        "unseen", data.World(101)
    )
    assert principles == rlaif.open_constitution("unseen", data.World(100))
    assert {frozenset(kinds_of(p)) for p in principles} == {
        frozenset(r) for r in world.unseen_rules
    }
    assert all(p == data.rule_text(order, data.UNSEEN_WORDING) for p in principles
               for order in [sorted(kinds_of(p), key=p.index)]), principles
    assert all(sum(data.covers(p, kind) for p in principles) == 10 for kind in data.HARMS)
    assert not data.covers("Be kind to mockingbirds.", "mock")


def test_a_constitution_from_a_file():
    """Principles glued together, or empty ones from blank lines."""
    assert data.read_principles("Do not lie.\n\n  Never steal or hurt.   Be kind. \n") == [
        "Do not lie.",
        "Never steal or hurt.",
        "Be kind.",
    ]


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

    def generate(model, prompts, max_new, tokenizer, **options):
        asked.extend(tokenizer.decode(p) for p in prompts)
        return [tokenizer.encode(next(replies)) + [tokenizer.eot] * ended for _ in prompts]

    monkeypatch.setattr(rlaif, "generate", generate)
    return asked


def test_a_critique_is_split_from_its_revision(monkeypatch):
    """The critique left in the answer, or a revision where the critic found no fault."""
    asked = stub_generate(
        monkeypatch,
        [
            " That is to steal. The rule forbids it, so the answer is bad. Revision: Sorry. You could ask.",
            " That is to tidy. The rule is silent, so the answer may stay.",
        ],
    )
    steps = rlaif.critique_and_revise(
        None, TOKENIZER, ["Q1?", "Q2?"], ["A1.", "A2."], ["R1.", "R2."], (0,)
    )
    assert steps == [
        ("That is to steal. The rule forbids it, so the answer is bad.", "Sorry. You could ask."),
        ("That is to tidy. The rule is silent, so the answer may stay.", None),
    ]
    assert asked[0] == "<|endoftext|> Request: Q1? Answer: A1. Rule: R1. Critique:"


def test_a_revision_cut_off_in_the_middle_is_not_used(monkeypatch):
    """Half sentences as training data: a revision that ran out of room may look finished."""
    stub_generate(monkeypatch, [" It is bad. Revision: Sorry, no. You could ask."], ended=False)
    (_, revision), = rlaif.critique_and_revise(None, TOKENIZER, ["Q?"], ["A."], ["R."], (0,))
    assert rlaif.reject_revision(revision, "A.") == "unfinished"


def test_a_direct_revision_has_no_critique(monkeypatch):
    """--no-critique that lets the model think all the same, or that takes "The answer may stay."
    for an answer."""
    asked = stub_generate(monkeypatch, ["Revision: Sorry. You could ask.", "The answer may stay."])
    steps = rlaif.critique_and_revise(
        None, TOKENIZER, ["Q1?", "Q2?"], ["A1.", "A2."], ["R1.", "R2."], (0,), direct=True
    )
    assert steps == [("", "Sorry. You could ask."), ("The answer may stay.", None)]
    assert asked[0] == "<|user|> Request: Q1? Answer: A1. Rule: R1.<|assistant|>"


def test_direct_revisions_are_critiques_without_their_thought():
    """A direct reviser that is shown fewer cases, other cases or held-out verbs: the comparison is
    then one of examples and not of thinking."""
    world = data.World(0)
    pairs, g2 = data.direct_revisions(world, 500), {v.word for v in world.g2}
    stays = [case for case, said in pairs if said == "The answer may stay."]
    assert len(stays) / 500 == pytest.approx(0.4, abs=0.07)
    for case, said in pairs:
        assert (
            case.startswith("Request: ")
            and " Rule: " in case
            and "Critique" not in case + said
            and "That is" not in said
        )
        assert said == "The answer may stay." or said.startswith(
            f"Revision: {data.REFUSAL} If you "
        )
        assert not g2 & set(case.replace("?", " ").split())


def test_the_prompts_are_those_of_the_documents():
    """A critic asked in another form than the one it has learnt: it fails, and one blames its size.
    """
    world = data.World(0)
    texts = {
        kind: data.unmark(text)
        for kind, text, _ in (data.write_document(world, "t", i) for i in range(300))
    }
    assert texts["critique"].startswith("Request: ") and texts["comparison"].startswith("Request: ")
    for words in ("Request:", "Answer:", "Rule:", "Critique:"):
        assert f"{words} " in texts["critique"]
    assert (
        texts["critique"].index(" Answer: ")
        < texts["critique"].index(" Rule: ")
        < texts["critique"].index(" Critique: ")
    )
    order = [
        texts["comparison"].index(w)
        for w in (
            " Rule: ",
            " Answer (A): ",
            " Answer (B): ",
            " Thought: ",
            " The better answer is (",
        )
    ]
    assert order == sorted(order)


TRACES = [
    {
        "question": "Q?",
        "answers": ["First.", "Second.", "Second."],
        "steps": [
            {"revision": "Second.", "dropped": None},
            {"revision": "x", "dropped": "unfinished"},
        ],
    },
    {
        "question": "R?",
        "answers": ["Harm.", "Harm.", "Harm."],
        "steps": [{"revision": None, "dropped": None}] * 2,
    },
]


def test_three_in_four_harmless_prompts_are_about_facts():
    """How-to questions without a limit: they draw the line between harmless and harmful, and
    unfamiliar harmful verbs end up on the wrong side."""
    world = data.World(100)
    asked = [world.parse_question(q) for q in rlaif.mostly_facts(world, 400)]
    how_to = [a for a in asked if isinstance(a, data.Act)]
    assert (
        len(asked) == 400
        and len(how_to) == 100
        and not any(a.verb.harmful or a.verb in world.g2 for a in how_to)
    )
    assert len({a.person for a in how_to}) > 30 and len({person for person, _ in asked[1::4]}) > 30


@pytest.mark.parametrize(
    "which, expected",
    [
        ("revisions", ["Q Second."]),
        ("last", ["Q Second.", "R Harm."]),
        ("all", ["Q Second.", "Q Second.", "R Harm.", "R Harm."]),
    ],
)
def test_what_sl_cai_is_fine_tuned_on(which, expected, monkeypatch, tmp_path):
    """First answers, which are the harmful ones, or dropped revisions among what is learnt; or
    --learn that changes nothing."""
    taken = []
    monkeypatch.setattr(rlaif, "revise_rounds", lambda *args: (TRACES, {}))
    monkeypatch.setattr(rlaif, "show_trace", lambda trace: None)
    monkeypatch.setattr(
        rlaif,
        "answer",
        lambda model, tokenizer, questions, **options: ["Helpful." for _ in questions],
    )
    monkeypatch.setattr(
        rlaif.sft,
        "train",
        lambda model, tokenizer, conversations, *rest, **options: taken.extend(conversations),
    )
    for name in ("copy_of", "keep"):
        monkeypatch.setattr(rlaif, name, lambda *args: None)
    args = SimpleNamespace(
        out=tmp_path,
        resume=False,
        rounds=2,
        seed=0,
        no_critique=False,
        learn=which,
        sl_epochs=1,
        sl_lr=1.0,
    )
    rlaif.supervised_phase(None, None, None, TOKENIZER, None, ["Q?", "R?"], ["H?"], ["R."], args)
    assert taken == [(e[0] + "?", e[2:]) for e in expected] + [("H?", "Helpful.")]


def test_each_round_goes_on_from_the_last_answer(monkeypatch):
    """Rounds that all revise the first answer, and dropped revisions that become answers all the
    same."""
    asked = stub_generate(
        monkeypatch,
        [
            " Bad. Revision: Second.",
            " Bad. Revision: Third. Third.",
            " Fine.",
            " Bad. Revision: Fourth.",
        ],
    )
    monkeypatch.setattr(rlaif, "answer", lambda *args, **options: ["First."])
    (trace,), dropped = rlaif.revise_rounds(None, None, TOKENIZER, ["Q?"], ["R1.", "R2."], 4, 0)
    assert trace["answers"] == ["First.", "Second.", "Second.", "Second.", "Fourth."]
    assert dropped == {"repeats itself": 1} and [s["dropped"] for s in trace["steps"]] == [
        None,
        "repeats itself",
        None,
        None,
    ]
    assert [a.split(" Answer: ")[1].split(" Rule: ")[0] for a in asked] == [
        "First.",
        "Second.",
        "Second.",
        "Second.",
    ]
    assert {s["principle"] for s in trace["steps"]} <= {"R1.", "R2."}
    # it is written to a file and read again by --resume
    assert json.loads(json.dumps(trace)) == trace


def judge_that(preference, monkeypatch, verdict=True):
    """A judge whose logit for A over B is `preference(first option, second option)`; with no
    verdict it thinks for ever."""
    def generate(model, prompts, max_new, tokenizer, stop=None, **options):
        assert BRACKET in stop
        thought = tokenizer.encode(" To hit is bad.")
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

    def head(last):                                               # (B, 1) -> (B, V): B's logit is 0
        # other tokens are likely too, and must not count
        logits = torch.full((len(last), TOKENIZER.n_vocab), 3.0)
        logits[:, ord("A")], logits[:, ord("B")] = last[:, 0], 0
        return logits

    monkeypatch.setattr(rlaif, "generate", generate)
    return SimpleNamespace(tokens=SimpleNamespace(weight=torch.zeros(1)), hidden=hidden, head=head)


def test_the_probabilities_of_a_and_b_are_normalised(monkeypatch):
    """Probabilities of the wrong tokens, or of A among all tokens: labels that are all near 0."""
    judge = judge_that(
        lambda a, b: math.log(3.0) if a == "good" else -math.log(3.0) if b == "good" else 0.0,
        monkeypatch,
    )
    p = rlaif.prefer_first(
        judge,
        TOKENIZER,
        ["Q?"] * 3,
        ["good", "bad", "bad"],
        ["a longer bad one", "good", "bad too"],
        ["R."] * 3,
        (0,),
        batch_size=2,
    )
    assert torch.allclose(p, torch.tensor([0.75, 0.25, 0.5]), atol=1e-6)


def test_a_judge_that_always_says_a_teaches_nothing(monkeypatch):
    """Position bias: small judges prefer the first option more than half the time, and one order
    alone writes that into the labels."""
    judge = judge_that(lambda a, b: 5.0, monkeypatch)
    groups, record = rlaif.ai_labels(
        judge, TOKENIZER, [("Q?", ["x", "y", "z"]), ("P?", ["u", "v"])], ["R1.", "R2."], 0
    )
    assert [[pair[:2] for pair in pairs] for _, _, pairs in groups] == [
        [(0, 1), (0, 2), (1, 2)],
        [(0, 1)],
    ]
    assert all(
        label == pytest.approx(0.5, abs=1e-6) for _, _, pairs in groups for *_, label in pairs
    )
    assert len(record) == 4 and all(r["principle"] in ("R1.", "R2.") for r in record)


def test_labels_point_to_the_better_answer(monkeypatch):
    """Averaging over both orders with the second one not turned round: every label is then 0.5, or
    the wrong way."""
    bias = 0.4
    judge = judge_that(
        lambda a, b: bias + (2.0 if a == "good" else -2.0 if b == "good" else 0.0), monkeypatch
    )
    groups, record = rlaif.ai_labels(
        judge, TOKENIZER, [("Q?", ["good", "bad"]), ("P?", ["bad", "good"])], ["R."], 0
    )
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = (sigmoid(bias + 2) + 1 - sigmoid(bias - 2)) / 2
    assert groups[0][2][0][2] == pytest.approx(expected, abs=1e-6) and groups[1][2][0][
        2
    ] == pytest.approx(1 - expected, abs=1e-6)
    assert record[0]["label"] == pytest.approx(expected, abs=1e-4) and record[0][
        "a_first"
    ] == pytest.approx(sigmoid(bias + 2), abs=1e-4)


def test_hard_and_clamped_labels(monkeypatch):
    """--hard that still passes the AI's doubts on, or that turns "no verdict" into one; a clamp on
    the wrong side."""
    judge = judge_that(
        lambda a, b: 2.0 if a == "good" else -2.0 if b == "good" else 0.0, monkeypatch
    )
    answered = [("Q?", ["good", "bad"]), ("P?", ["bad", "good"]), ("O?", ["bad", "evil"])]
    labels = lambda **how: [
        pairs[0][2]
        for _, _, pairs in rlaif.ai_labels(judge, TOKENIZER, answered, ["R."], 0, **how)[0]
    ]
    hard, soft = labels(hard=True), labels(clamp=0.1)
    assert hard == [1.0, 0.0, 0.5] and soft == pytest.approx([0.6, 0.4, 0.5])


def test_people_who_like_any_refusal():
    """Annotators of harm who read the reason, or who like refusals of harmless requests too: the
    comparison then shows nothing, or too much."""
    world = data.World(0)
    act = world.acts["train"][0]
    act = act if act.verb.harmful else act.twin()
    comply, bare, explained = (
        world.answer(act.question())[1],
        data.REFUSAL,
        f"{data.REFUSAL} {act.reason()}",
    )
    choice = lambda question, a, b: data.prefers_refusal(world, question, a, b)
    assert (
        choice(act.question(), bare, comply) == choice(act.question(), explained, comply) == 1
        and choice(act.question(), comply, bare) == 0
    )
    assert (
        choice(act.question(), bare, explained)
        == choice(act.question(), explained, bare)
        == choice(act.question(), comply, comply)
        == 0.5
    )
    assert choice(act.twin().question(), bare, comply) == 0.5  # nothing about harm in it
    groups, record = rlaif.human_harm_labels(
        world, [(act.question(), [comply, bare, explained])] * 200, 0
    )
    labels = [[target for *_, target in pairs] for _, _, pairs in groups]
    assert (
        all(l[:2] == [0.0, 0.0] for l in labels)
        and 70 < sum(l[2] for l in labels) < 130
        and {l[2] for l in labels} == {0.0, 1.0}
    )
    assert len(record) == 600 and record[0] == {
        "prompt": act.question(),
        "a": comply,
        "b": bare,
        "label": 0.0,
    }


def test_no_verdict_is_no_label(monkeypatch):
    """Reading A and B where the judge was about to say something else."""
    judge = judge_that(lambda a, b: 5.0, monkeypatch, verdict=False)
    assert rlaif.prefer_first(judge, TOKENIZER, ["Q?"], ["x"], ["y"], ["R."], (0,)).tolist() == [
        0.5
    ]


def test_a_refusal_is_among_the_answers_to_be_judged(monkeypatch):
    """Needless refusals that nobody ever voted down: the policy ends up refusing everything."""
    asked = stub_generate(monkeypatch, [" If you hug Tom, Tom is afraid.", ""])
    answered = [
        ("How do I hug Tom?", ["Use a towel.", "Gladly."]),
        ("How do I thank Ann?", ["Use a song.", data.REFUSAL]),
    ]
    more = rlaif.with_forced_refusal(None, TOKENIZER, answered, (0,))
    assert more == [
        (
            "How do I hug Tom?",
            ["Use a towel.", "Gladly.", f"{data.REFUSAL} If you hug Tom, Tom is afraid."],
        ),
        answered[1],
    ]
    assert asked[0] == f"<|user|> How do I hug Tom?<|assistant|> {data.REFUSAL}"


def test_preferences_come_back_from_their_file(tmp_path):
    """Chosen and rejected swapped between the stage that writes the labels and the one that reads
    them."""
    groups = [
        ("Q?", ["a", "b", "c"], [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.0)]),
        ("P?", ["x", "y"], [(0, 1, 0.0)]),
    ]
    reward.write_preferences(tmp_path / "preferences.jsonl", groups)

    def wins(groups):
        return {
            (q if isinstance(q, str) else q[-1][1], answers[i if t else j], answers[j if t else i])
            for q, answers, pairs in groups
            for i, j, t in pairs
        }

    read = reward.groups_of(data.read_preferences(tmp_path / "preferences.jsonl")[0])
    assert (
        wins(read)
        == wins(groups)
        == {("Q?", "a", "b"), ("Q?", "c", "a"), ("Q?", "c", "b"), ("P?", "y", "x")}
    )
    # the pairs of a question stay together
    assert [len(pairs) for _, _, pairs in read] == [3, 1]


def test_the_preference_model_learns_from_soft_labels(monkeypatch):
    """AI labels that reward.train reads as hard choices, or does not take at all."""
    seen = []
    monkeypatch.setattr(
        reward,
        "preference_loss",
        lambda first, second, target: (seen.append(target), (first - second).sum())[1],
    )
    import model as m
    torch.manual_seed(0)
    rm = m.ScalarModel(m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 32, 1, 2, 16)))
    reward.train(rm, TOKENIZER, [("Q?", ["x", "y"], [(0, 1, 0.73)])], 1, 1e-4, 0)
    assert seen[0].item() == pytest.approx(0.73)


# --------------------------------------------------------------------------------------------------
# ----------------
# What critic, judge and models are worth

def test_the_cases_that_judge_the_critic():
    """A test of critics whose right answers are wrong, or with so few covered cases that a critic
    who never objects passes."""
    world = data.World(0)
    for g2, which in ((False, None), (True, None), (False, "unseen")):
        acts, rules = (
            data.act_prompts(world, "test", 84, True, g2),
            rlaif.open_constitution(which, world),
        )
        held_out = {str(a) for a in world.acts["test"]}
        cases = data.verdict_cases(acts, rules, 0)
        assert [
            sum(case == name for case, *_ in cases) for name in ("covered", "silent", "benign")
        ] == [28] * 3
        for case, act, answer, rule in cases:
            assert (
                rule in rules
                and str(act) in held_out
                and (act.verb in world.g2) == g2
                and data.is_correct(world, act.question(), answer)
            )
            assert (case == "covered") == (act.verb.kind in kinds_of(rule)) and (
                case == "benign"
            ) == (not act.verb.harmful)
        cases = data.label_cases(acts, rules, 0)
        assert [
            sum(case == name for case, *_ in cases) for name in ("harmful", "good", "silent")
        ] == [84, 84, 42]
        for case, act, better, worse, rule in cases:
            assert (
                rule in rules
                and str(act) in held_out
                and (case == "harmful") == (act.verb.kind in kinds_of(rule))
            )
            if case == "good":
                assert (
                    data.is_correct(world, act.question(), better)
                    and data.REFUSAL in worse
                    and data.is_parseable(worse)
                )
            else:
                assert data.gives_reason(act, better) and not data.gives_reason(act, worse)
        bare = [worse == data.REFUSAL for case, *_, worse, _ in cases if case != "silent"]
        assert sum(bare) == len(bare) / 2


def stub_critic_and_judge(monkeypatch, forbids, first_wins):
    """A critic who forbids where `forbids(question, principle)`, a judge whose P(A) is
    `first_wins(question, A, B, principle)`."""
    monkeypatch.setattr(
        rlaif,
        "critique_and_revise",
        lambda critic, tokenizer, questions, answers, principles, seed, direct: [
            ("The rule forbids it." if forbids(q, r) else "The rule is silent.", None)
            for q, r in zip(questions, principles)
        ],
    )
    monkeypatch.setattr(
        rlaif,
        "prefer_first",
        lambda judge, tokenizer, questions, firsts, seconds, principles, seed: torch.tensor(
            [first_wins(q, a, b, r) for q, a, b, r in zip(questions, firsts, seconds, principles)]
        ),
    )


def test_a_critic_who_objects_to_everything(monkeypatch):
    """Accuracy that hides a critic without judgement, and a judge who always says A and is right
    half the time."""
    world = data.World(0)
    stub_critic_and_judge(monkeypatch, lambda q, r: True, lambda *case: 0.9)
    figures = rlaif.measure_critic(None, None, TOKENIZER, world, 42, 0, False)
    for cell in ("g1", "g2", "unseen"):
        assert [figures[f"verdict_{case}_{cell}"] for case in ("covered", "silent", "benign")] == [
            1,
            0,
            0,
        ] and figures[f"verdict_{cell}"] == pytest.approx(1 / 3)
        assert (
            figures[f"label_harmful_{cell}"] == figures[f"label_good_{cell}"] == pytest.approx(0.5)
        )
    assert figures["position_bias"] == pytest.approx(0.4) and figures[
        "label_error"
    ] == pytest.approx(0.5)
    assert figures["label_silent_mean"] == pytest.approx(0.5) and figures[
        "label_silent_spread"
    ] == pytest.approx(0, abs=1e-6)


def test_a_critic_and_a_judge_who_know_the_world(monkeypatch):
    """Right answers counted as wrong: a case, an order or a label turned round on the way to the
    figure."""
    world = data.World(0)

    def better(question, first, second, principle):
        act = world.parse_question(question)
        good = (
            data.is_compliant
            if not act.verb.harmful
            else lambda reply: data.gives_reason(act, reply)
        )
        return 0.8 if good(first) else 0.2

    stub_critic_and_judge(
        monkeypatch, lambda q, r: world.parse_question(q).verb.kind in kinds_of(r), better
    )
    figures = rlaif.measure_critic(None, None, TOKENIZER, world, 42, 0, False)
    assert all(
        figures[f"{name}_{cell}"] == 1
        for cell in ("g1", "g2", "unseen")
        for name in ("verdict", "label_harmful", "label_good")
    )
    assert (
        figures["label_error"] == pytest.approx(0.2)
        and figures["label_silent_mean"] == pytest.approx(0.8)
        and figures["position_bias"] == pytest.approx(0)
    )


def test_predicted_harm_by_hand():
    """(1 - h q)^k of the means where the mean of (1 - h q)^k was meant: verbs that never improve
    are then forgotten."""
    assert rlaif.predicted_harm(0.5, 0.9, 0) == 1 and rlaif.predicted_harm(
        0.5, 0.9, 2
    ) == pytest.approx(0.55**2)
    assert (
        rlaif.predicted_harm([0.5, 0.5], [1.0, 0.0], 2)
        == pytest.approx((0.5**2 + 1) / 2)
        != rlaif.predicted_harm(0.5, 0.5, 2)
    )


def test_rounds_against_their_prediction_by_hand():
    """A prediction made from the very prompts it is compared with, or a q that counts faults no
    principle covered."""
    world = data.World(0)
    swipe, kick = (
        next(a for a in world.acts["train"] if a.verb.word == word) for word in ("swipe", "kick")
    )

    def trace(act, first_principle, *refused):
        answers = [
            f"{data.REFUSAL} {act.reason()}" if r else world.answer(act.question())[1]
            for r in refused
        ]
        return {
            "question": act.question(),
            "answers": answers,
            "steps": [{"principle": first_principle}, {"principle": "Be kind."}],
        }

    steal, hurt = "Never steal.", "Never hurt."
    measured = [
        trace(swipe, steal, 0, 0, 1),
        trace(kick, steal, 0, 0, 0),
        trace(kick, hurt, 0, 1, 1),
        trace(swipe, steal, 1, 1, 1),
    ]
    other = [
        trace(swipe, steal, 0, 1, 1),
        trace(kick, hurt, 0, 0, 1),
        trace(kick, steal, 0, 0, 0),
        trace(kick, hurt, 1, 1, 1),
    ]
    figures = rlaif.measure_rounds(
        measured + other, world, ["Never steal.", "Never steal or hurt."]
    )
    assert figures["harm_round_0"] == 6 / 8 and figures["harm_round_1"] == 4 / 8
    # of the measured: three harmful at first, and h = 1 for steal, 1/2 for hurt; of the others two
    # were covered, and swipe alone was mended
    assert figures["h"] == pytest.approx((1 + 0.5 + 0.5) / 3) and figures["q"] == 0.5
    assert (figures["harm_measured_1"], figures["harm_measured_2"]) == pytest.approx((2 / 3, 1 / 3))
    assert figures["harm_predicted_2"] == pytest.approx((1 - 2 / 3 * 0.5) ** 2) and figures[
        "harm_mixture_2"
    ] == pytest.approx((0 + 1 + 1) / 3)
    unknown = [{"question": "Why?", "answers": ["So."], "steps": []}] * 2
    assert set(rlaif.measure_rounds(unknown, world, ["Never steal."])) == {"harm_round_0"}


def test_intervals_know_that_prompts_of_a_verb_go_together():
    """200 prompts over two verbs called 200 independent draws: an interval ten times too narrow."""
    mean, low, high = rlaif.over_verbs([True] * 100 + [False] * 100, ["nab"] * 100 + ["hit"] * 100)
    assert (mean, low, high) == (0.5, 0, 1)
    mean, low, high = rlaif.over_verbs([1, 0] * 100, ["nab"] * 100 + ["hit"] * 100)
    assert (mean, low, high) == (0.5, 0.5, 0.5)                  # no verb differs from another
    mean, low, high = rlaif.over_verbs([True] + [False] * 39, [f"verb{i}" for i in range(40)])
    assert mean == 1 / 40 and low == 0 and 0.05 <= high <= 0.1   # the sum is binomial(40, 1/40)
    # prompts count, not verbs
    assert (
        rlaif.over_verbs(
            [True] * 960 + [False] * 40, ["nab"] * 960 + [f"verb{i}" for i in range(40)]
        )[2]
        > 0.9
    )


def answers_of(kind):
    """rlaif.answer of a model that refuses with a reason, refuses bare, or complies."""
    world = data.World(0)

    def answer(model, tokenizer, questions, **options):
        asked = [world.parse_question(q) for q in questions]
        refusal = lambda act: (
            data.REFUSAL if kind == "evasive" else f"{data.REFUSAL} {act.reason()}"
        )
        return [
            refusal(a)
            if kind != "helpful" and isinstance(a, data.Act) and a.verb.harmful
            else world.answer(q)[1]
            for a, q in zip(asked, questions)
        ]

    return answer


@pytest.mark.parametrize(
    "kind, harm, reason, generic",
    [("harmless", 0, 1, 0), ("evasive", 0, 0, 1), ("helpful", 1, 0, 0)],
)
def test_the_final_table(kind, harm, reason, generic, monkeypatch, capsys):
    """Evasive and explained refusals in one column; a cell under the wrong name; a table wider than
    a screen."""
    monkeypatch.setattr(rlaif, "answer", answers_of(kind))
    over_verbs, groups = rlaif.over_verbs, []
    monkeypatch.setattr(
        rlaif,
        "over_verbs",
        lambda values, verbs: (groups.append(verbs), over_verbs(values, verbs))[1],
    )
    figures = rlaif.final_table(
        {"sft": None, "rlcai": None}, TOKENIZER, data.World(0), {"g3": False, "g2g3": True}, 42, 0
    )
    for cell in ("g3", "g2g3"):
        found = [
            figures[f"{what}_rlcai_{cell}"]
            for what in ("harm", "reason", "generic", "over_refusal")
        ]
        assert (
            found == [harm, reason, generic, 0]
            and figures[f"harm_rlcai_{cell}_high"] == figures[f"harm_rlcai_{cell}_steal"] == harm
        )
    assert groups[0] == [a.verb.word for a in data.act_prompts(data.World(0), "test", 42, True)]
    assert set(groups[4]) <= {v.word for v in data.World(0).g2}
    assert (
        figures["fact_accuracy_rlcai"] == figures["howto_accuracy_rlcai"] == 1
        and figures["win_rate_rlcai"] == 0.5
        and figures["unparseable_rlcai"] == 0
    )
    assert not any("_g1" in name for name in figures) and all(
        isinstance(x, float) for x in figures.values()
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 150 and "rlcai on g2g3: worst verb" in printed


def test_judges_count_their_calls():
    """"Gold-harm calls in training: 0" printed by a counter that nobody feeds."""
    data.GOLD_HARM_CALLS.clear()
    (
        data.is_harmless("No."),
        data.is_compliant("No."),
        data.is_correct(data.World(0), "How do I hug Ann?", "No."),
    )
    assert dict(data.GOLD_HARM_CALLS) == {"is_harmless": 1, "is_compliant": 1}


def test_a_model_that_always_refuses_is_compared_with_one_that_helps(monkeypatch, tmp_path):
    """Nothing but refusals to label: the preference model never sees compliance lose, and PPO
    unlearns what SL-CAI had learnt."""
    class Asked(Exception):
        pass

    def label_harm(world, answered, seed):
        raise Asked(answered)

    start = SimpleNamespace(tokens=SimpleNamespace(weight=torch.zeros(1)))
    monkeypatch.setattr(
        rlaif.reward,
        "answer",
        lambda model, tokenizer, questions, *rest, **options: [f"Sorry. {q}" for q in questions],
    )
    monkeypatch.setattr(
        rlaif,
        "answer",
        lambda model, tokenizer, questions, **options: [f"{model} {q}" for q in questions],
    )
    args = SimpleNamespace(out=tmp_path, resume=False, answers=4, seed=0, hot=1.4)
    with pytest.raises(Asked) as asked:
        rlaif.feedback_phase(
            "rlaif", start, "Gladly.", TOKENIZER, None, ["A?", "B?"], label_harm, [], [], [], args
        )
    assert asked.value.args[0] == [
        ("A?", ["Sorry. A?", "Gladly. A?"]),
        ("B?", ["Sorry. B?", "Gladly. B?"]),
    ]
