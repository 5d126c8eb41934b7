"""The reward model: Bradley and Terry by hand, and the one token at which a score is read."""
import json
import math

import pytest
import torch

import data
import model as m
import reward

TOKENIZER = data.make_tokenizer("bytes", [])


def tiny_reward_model(seed=0):
    torch.manual_seed(seed)
    gpt = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 96, 1, 2, 16))
    for p in gpt.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return m.ScalarModel(gpt).eval()


def loss_of(first, second, target):
    return reward.preference_loss(
        *(torch.tensor(x, dtype=torch.float32) for x in (first, second, target))
    ).item()


def test_preference_loss_by_hand():
    """Chosen and rejected swapped, or the mean forgotten."""
    assert loss_of([2.0], [1.0], [1.0]) == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss_of([2.0], [1.0], [0.0]) == pytest.approx(math.log(1 + math.exp(1)))
    assert loss_of([2.0, 2.0], [1.0, 1.0], [1.0, 0.0]) == pytest.approx(
        0.5 * (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1)))
    )


def test_equal_scores_cost_ln_2():
    """The first number of every healthy run: anything but 0.693 before training means a bug."""
    assert loss_of([3.0, -1.0], [3.0, -1.0], [1.0, 0.3]) == pytest.approx(math.log(2))


def test_only_differences_count():
    """Training scores towards a level: adding 5 to all of them must change nothing."""
    assert loss_of([7.0, 4.5], [6.0, 5.0], [1.0, 1.0]) == pytest.approx(
        loss_of([2.0, -0.5], [1.0, 0.0], [1.0, 1.0])
    )


def test_a_soft_label_is_a_mixture_of_both_choices():
    """Soft labels rounded to hard ones, which throws away what the AI was unsure of."""
    assert loss_of([2.0], [1.0], [0.3]) == pytest.approx(
        0.3 * loss_of([2.0], [1.0], [1.0]) + 0.7 * loss_of([2.0], [1.0], [0.0])
    )
    # the best margin is the one that predicts the label
    margin = torch.tensor([math.log(0.3 / 0.7)], requires_grad=True)
    reward.preference_loss(margin, torch.zeros(1), torch.tensor([0.3])).backward()
    assert abs(margin.grad.item()) < 1e-6


def test_huge_margins_stay_finite():
    """log(sigmoid(-200)) = log(0) = -inf, the overflow that logsigmoid avoids."""
    assert loss_of([0.0], [1e4], [1.0]) == pytest.approx(1e4)
    assert loss_of([1e4], [0.0], [1.0]) == 0
    r = torch.tensor([-1e4], requires_grad=True)
    reward.preference_loss(r, torch.zeros(1), torch.ones(1)).backward()
    assert r.grad.item() == pytest.approx(-1)


def test_the_score_is_read_at_the_last_real_token():
    """Reading [:, -1], which is padding in every row but the longest."""
    scalars = torch.arange(12.0).view(3, 4)
    segments = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert reward.last_token_score(scalars, segments).tolist() == [1, 7, 8]


def test_a_score_does_not_depend_on_the_batch():
    """Padding that leaks into a score: the same answer is then worth more beside a longer one."""
    rm, sequences = (
        tiny_reward_model(),
        [[65, 66, 67, TOKENIZER.eot], [70] * 30 + [TOKENIZER.eot], [68, TOKENIZER.eot]],
    )
    together = reward.score(rm, TOKENIZER, sequences)
    alone = torch.cat([reward.score(rm, TOKENIZER, [s]) for s in sequences])
    assert torch.allclose(together, alone, atol=1e-5)
    assert alone.std() > 0.01


def test_garbage_in_the_padding_changes_nothing():
    """Attention or the read-out looking at what follows the end-of-text."""
    rm = tiny_reward_model()
    segments = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tokens = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(0))
    garbage = torch.where(segments == 1, tokens, 255 - tokens)
    assert torch.equal(
        *(reward.last_token_score(rm(t, segments), segments) for t in (tokens, garbage))
    )


def test_the_annotator_follows_bradley_and_terry():
    """An annotator who always names the better answer (no noise), or whose order of options
    matters."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    best, right, wrong = (
        data.best_answer(world, question),
        world.answer(question)[1],
        "Well, let me think.",
    )
    answers = [wrong, best, right]
    u = [data.utility(world, question, a) for a in answers]
    groups = reward.annotate(world, [(question, answers)] * 4000, seed=5)
    for k, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        labels = [pairs[k] for _, _, pairs in groups]
        assert all(pair[:2] == (i, j) for pair in labels)
        p = 1 / (1 + math.exp(u[j] - u[i]))
        assert sum(target for *_, target in labels) / 4000 == pytest.approx(
            p, abs=4 * math.sqrt(p * (1 - p) / 4000)
        )


def test_votes_are_averaged():
    """Three annotators of whom one is heard, or whose majority passes for a certainty."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    answers = ["Well, let me think.", data.best_answer(world, question)]
    p = 1 / (
        1
        + math.exp(
            data.utility(world, question, answers[1]) - data.utility(world, question, answers[0])
        )
    )
    targets = [
        pairs[0][2]
        for *_, pairs in reward.annotate(world, [(question, answers)] * 4000, seed=5, votes=3)
    ]
    counts = [targets.count(k / 3) for k in range(4)]
    assert sum(counts) == 4000
    for k, binomial in enumerate([(1 - p) ** 3, 3 * p * (1 - p) ** 2, 3 * p**2 * (1 - p), p**3]):
        assert counts[k] / 4000 == pytest.approx(binomial, abs=4 * math.sqrt(binomial / 4000))


def test_votes_survive_their_file(tmp_path):
    """A vote of two against one that comes back as three to none, or as two pairs that are not
    known to be the same."""
    groups = [("Q?", ["a", "b", "c"], [(0, 1, 1 / 3), (0, 2, 1.0), (1, 2, 2 / 3)])]
    reward.write_preferences(tmp_path / "p.jsonl", groups, votes=3)
    lines = [json.loads(line) for line in open(tmp_path / "p.jsonl", encoding="utf-8")]
    assert lines[0] == {"prompt": "Q?", "chosen": "b", "rejected": "a", "votes": [2, 1]} and lines[
        1
    ]["votes"] == [3, 0]
    (_, answers, pairs), = reward.groups_of(data.read_preferences(tmp_path / "p.jsonl")[0])
    shares = {(answers[i], answers[j]): target for i, j, target in pairs}
    assert shares == {
        ("b", "a"): pytest.approx(2 / 3),
        ("a", "c"): pytest.approx(1.0),
        ("b", "c"): pytest.approx(2 / 3),
    }


def test_all_pairs_of_a_question_share_a_batch(monkeypatch):
    """Pairs shuffled over the epoch: each answer is then read again and again, and the model
    overfits in one pass (InstructGPT)."""
    read, real = [], reward.score
    monkeypatch.setattr(
        reward,
        "score",
        lambda rm, tokenizer, sequences: (read.append(sequences), real(rm, tokenizer, sequences))[
            1
        ],
    )
    groups = [
        (f"q{i}?", [f"{i}a", f"{i}b", f"{i}c"], [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.5)])
        for i in range(7)
    ]
    history = reward.train(tiny_reward_model(), TOKENIZER, groups, 2, 1e-3, 0)
    assert len(read) == 4 and history[-1]["step"] == 4
    all_read = [tuple(s) for batch in read for s in batch]
    assert len(all_read) == len(set(all_read)) == 21               # every answer once, in one epoch
    for batch in read:
        assert len(batch) % 3 == 0


def test_one_batch_of_preferences_can_be_memorised():
    """First and second mixed up somewhere between the label and the loss: agreement then goes to 0.
    """
    rm = tiny_reward_model()
    # 2 beats 0 beats 1
    group = (
        "Who?",
        ["It is Ann.", "No.", "Well, well, well."],
        [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.0)],
    )
    reward.train(rm, TOKENIZER, [group] * 60, 1, 1e-2, 0)
    r = reward.score_texts(rm, TOKENIZER, [("Who?", a) for a in group[1]])
    assert r[2] > r[0] > r[1]


def test_normalise_gives_mean_0_and_standard_deviation_1():
    """A KL coefficient without meaning: scores of another scale make the leash ten times longer or
    shorter."""
    rm = tiny_reward_model()
    conversations = [("Who?", "x" * n) for n in range(1, 9)]
    scale = reward.normalise(rm, TOKENIZER, conversations)
    scores = (reward.score_texts(rm, TOKENIZER, conversations) - scale["mean"]) / scale["std"]
    assert scores.mean().abs() < 1e-5 and scores.std().item() == pytest.approx(1, abs=1e-5)
    assert scores.min().item() == pytest.approx(scale["lowest"], abs=1e-4)


def test_a_given_scale_is_kept():
    """The preference model of Stage 5: what lies between the scores of two kinds of prompt is
    arbitrary, and must not set the scale."""
    rm = tiny_reward_model()
    conversations = [("Who?", "x" * n) for n in range(1, 9)]
    raw, scale = (
        reward.score_texts(rm, TOKENIZER, conversations),
        reward.normalise(rm, TOKENIZER, conversations, std=1.0),
    )
    assert scale["std"] == 1 and scale["lowest"] == pytest.approx(
        (raw.min() - raw.mean()).item(), abs=1e-5
    )


def test_a_perfect_judge_reaches_the_ceiling(monkeypatch):
    """An accuracy that compares with the wrong side, or a ceiling that the true utility itself does
    not reach."""
    world = data.World(0)
    questions = data.fact_questions(world, "test")[:5]
    answered = [
        (
            q,
            [
                world.answer(q)[1],
                data.best_answer(world, q),
                "Sorry.",
                f"{data.RAMBLE[0]} {world.answer(q)[1]}",
            ],
        )
        for q in questions
    ]
    judge = lambda sign: (
        lambda rm, tokenizer, conversations: torch.tensor(
            [sign * data.utility(world, q, a) for q, a in conversations]
        )
    )
    monkeypatch.setattr(reward, "score_texts", judge(1))
    good = reward.evaluate(None, None, world, answered)
    assert (
        good["accuracy"] == pytest.approx(good["ceiling"])
        and good["calibration_error"] == pytest.approx(0, abs=1e-6)
        and good["pairs_heldout"] == 30
    )
    monkeypatch.setattr(reward, "score_texts", judge(-1))
    assert reward.evaluate(None, None, world, answered)["accuracy"] == pytest.approx(
        1 - good["ceiling"]
    )


def test_prompts_of_training_and_of_evaluation_are_different():
    """Accuracy measured on questions that were trained on."""
    world = data.World(0)
    train, test = (
        reward.preference_prompts(world, "train", 400),
        reward.preference_prompts(world, "test", 300),
    )
    assert not set(train) & set(test)
    for questions in (train, test):
        acts = [world.parse_question(q) for q in questions]
        assert all(isinstance(a, data.Act) and not a.verb.harmful for a in acts[::2]) and all(
            isinstance(a, tuple) for a in acts[1::2]
        )


def test_bfloat16_ends_before_scores_are_compared(monkeypatch):
    """Margins in bfloat16, which has two and a half digits: close scores are all the same to it."""
    compared, preference_loss = [], reward.preference_loss
    monkeypatch.setattr(
        reward, "autocast", lambda device: torch.autocast(device.type, torch.bfloat16)
    )
    monkeypatch.setattr(
        reward,
        "preference_loss",
        lambda *args: compared.append(args[0].dtype) or preference_loss(*args),
    )
    model = tiny_reward_model()
    groups = [("Who?", ["Ann.", "Tom, I think."], [(0, 1, 1.0)])] * 40
    history = reward.train(model, TOKENIZER, groups, 2, 3e-3, 0)
    assert history[-1]["train_loss_nats"] < 0.5 * history[0]["train_loss_nats"] and set(
        compared
    ) == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_reader_can_stop_and_go_on(tmp_path, monkeypatch):
    """Labels lost at Ctrl-C, or asked for a second time: nobody labels twice."""
    answered, path, keys = (
        [(f"Q{i}?", [f"a{i}", f"b{i}", f"c{i}"]) for i in range(6)],
        tmp_path / "my.jsonl",
        iter(["1", "2", "", "q", "2", "1"]),
    )
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: (asked.append(text), next(keys))[1])
    reward.ask_the_reader(answered, path, 0)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [x["prompt"] for x in lines] == ["Q0?", "Q1?"] and len(asked) == 4
    # the key names the answer that was shown
    assert f"1  {lines[0]['chosen']}" in asked[0] and f"2  {lines[1]['chosen']}" in asked[1]
    reward.ask_the_reader(answered[:4], path, 0)  # goes on with what has no label
    assert [
        x["prompt"] for x in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ] == ["Q0?", "Q1?", "Q2?", "Q3?"]


def test_pairs_become_groups():
    """Answers to one prompt scattered over batches, or winner and loser swapped on the way from a
    file."""
    groups = reward.groups_of(
        [("P?", "a", "b"), ("Q?", "x", "y"), ("P?", "a", "c"), ([("user", "P?")], "d", "e")]
    )
    assert groups == [
        ("P?", ["a", "b", "c"], [(0, 1, 1.0), (0, 2, 1.0)]),
        ("Q?", ["x", "y"], [(0, 1, 1.0)]),
        ([("user", "P?")], ["d", "e"], [(0, 1, 1.0)]),
    ]


def test_agreement_is_measured_over_prompts(monkeypatch):
    """An interval over pairs: those of one prompt are no independent cases, and it comes out too
    narrow."""
    monkeypatch.setattr(
        reward,
        "score_texts",
        lambda rm, tokenizer, conversations: torch.tensor([float(a) for _, a in conversations]),
    )
    # right, wrong; right
    groups = [
        ("P?", ["3", "2", "1"], [(0, 1, 1.0), (2, 1, 1.0)]),
        ("Q?", ["1", "2"], [(1, 0, 1.0)]),
    ]
    figures = reward.agreement(None, None, groups)
    assert figures["accuracy"] == pytest.approx((0.5 + 1) / 2) and figures["prompts_heldout"] == 2
    assert figures["accuracy_low"] == 0.5 and figures["accuracy_high"] == 1.0


def test_a_judge_of_length_is_found_out(monkeypatch):
    """A reward model that likes long answers looks accurate as long as good answers are long."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    full = world.answer(question)[1]
    # "Gladly." and a longer phrase, equally good
    answered = [(question, [f"{data.POLITE[0]} {full}", f"{data.POLITE[2]} {full}", full])]
    for taste, expected in (
        (lambda a: len(a.split()), 0.9),
        (lambda a: -len(a.split()), 0.1),
        (lambda a: 0, 0.5),
    ):
        monkeypatch.setattr(
            reward,
            "score_texts",
            lambda rm, tokenizer, conversations: torch.tensor(
                [float(taste(a)) for _, a in conversations]
            ),
        )
        assert reward.evaluate(None, None, world, answered)["longer_wins"] == pytest.approx(
            expected, abs=0.1
        )


def test_best_of_n_by_hand():
    """Best-of-n KL taken as ln n - (n-1)/n although texts coincide: the curve is then drawn too far
    to the right."""
    texts, scores, gold = ["a", "b", "b", "c"], [3.0, 1.0, 1.0, 0.0], [0.0, 2.0, 2.0, 1.0]
    # two draws: c is best with 1/16, b with 9/16 - 1/16, a with 1 - 9/16
    score, utility, kl = reward.best_of_n(texts, scores, gold, 2)
    assert score == pytest.approx(7 / 16 * 3 + 8 / 16) and utility == pytest.approx(
        8 / 16 * 2 + 1 / 16
    )
    assert kl == pytest.approx(
        sum(p * math.log(p / q) for p, q in ((1 / 16, 1 / 4), (8 / 16, 2 / 4), (7 / 16, 1 / 4)))
    )
    assert reward.best_of_n(texts, scores, gold, 1) == pytest.approx((1.25, 1.25, 0))
    many = 20000                                                  # no ties: Stiennon et al. 2020
    for n, expected in ((4, .636), (16, 1.835), (64, 3.175)):
        assert reward.best_of_n(list(map(str, range(many))), list(range(many)), [0.0] * many, n)[
            2
        ] == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("taste, first", [("polite", 1), ("curt", 0), ("chatty", 2)])
def test_three_tastes_prefer_three_answers(taste, first):
    """Three annotators who differ in name only."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    full = world.answer(question)[1]
    answers = [full, f"{data.POLITE[0]} {full}", f"{data.RAMBLE[0]} {full} {data.RAMBLE[2]}"]
    assert max(range(3), key=lambda i: data.utility(world, question, answers[i], taste)) == first
    assert data.best_answer(world, question, taste) == answers[first]


def test_some_answers_miss_the_point():
    """A reward model that has never read an answer to another question: it scores such answers as
    high as any, and PPO gives them."""
    world = data.World(0)
    questions = reward.preference_prompts(world, "train", 200)
    answered = [(q, [world.answer(q)[1]]) for q in questions]
    astray = reward.with_strays(world, answered)
    # its own answers stay, in front
    assert [q for q, _ in astray] == questions and all(
        a[0] == world.answer(q)[1] for q, a in astray
    )
    wrong = [[not data.is_correct(world, q, x) for x in a[1:]] for q, a in astray]
    assert sum(map(any, wrong)) > 180
    person = {
        q: p.person if isinstance(p := world.parse_question(q), data.Act) else p[0]
        for q in questions
    }
    # the right person, the wrong fact
    assert sum(any(person[q] in x for x in a[1:]) for q, a in astray) > 150
    same_tool = [
        any(
            x.split("use")[1] == world.answer(q)[1].split("use")[1] and x != world.answer(q)[1]
            for x in a[1:]
            if "use" in x
        )
        for q, a in astray[::2]
    ]
    # the right recipe for somebody else
    assert sum(same_tool) > 30


def test_half_of_the_fact_prompts_of_training_are_about_people_in_no_demonstration():
    """Prompts about well-known people alone: the model is right about them, and the judge learns
    nothing about facts."""
    world = data.World(0)
    people = [
        world.parse_question(q)[0] for q in reward.preference_prompts(world, "train", 400)[1::2]
    ]
    assert (
        sum(p in world.people["train"] for p in people) == 100
        and sum(p in world.people["demo"] for p in people) == 100
    )


def test_labels_of_dialogues_come_back(tmp_path):
    """Labels of one's own that the next stage cannot read."""
    turns = [("user", "Who?"), ("assistant", "Ann."), ("user", "Where?")]
    reward.write_preferences(tmp_path / "p.jsonl", [(turns, ["Here.", "There."], [(0, 1, 0.0)])])
    assert data.read_preferences(tmp_path / "p.jsonl")[0] == [(turns, "There.", "Here.")]


def test_calibration_by_bins_by_hand():
    """Errors of opposite sign that do not cancel within a bin, or bins that count alike however
    many pairs they hold."""
    predicted, known = torch.tensor([0.62, 0.68, 0.95, 1.0]), torch.tensor([0.72, 0.60, 0.85, 0.70])
    # bin .6-.7: |0.62 + 0.68 - 0.72 - 0.60| = 0.02; bin .9-1: |0.95 + 1.0 - 0.85 - 0.70| = 0.40;
    # over 4 pairs
    assert reward.expected_calibration_error(predicted, known) == pytest.approx(0.42 / 4)
    assert reward.expected_calibration_error(known, known) == 0
