"""The reward model: Bradley and Terry by hand, and the one token at which a score is read."""
import argparse
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
    gpt = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 96, 1, 2, 16), TOKENIZER)
    for p in gpt.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return m.ScalarModel(gpt).eval()


def judge_by(monkeypatch, worth):
    """Every score is worth(question, answer), whatever the model."""
    def score_texts(reward_model, conversations):
        return torch.tensor([float(worth(question, a)) for question, a in conversations])
    monkeypatch.setattr(reward, "score_texts", score_texts)


def loss_of(first, second, target):
    numbers = (torch.tensor(x, dtype=torch.float32) for x in (first, second, target))
    return reward.preference_loss(*numbers).item()


def test_preference_loss_by_hand():
    """Chosen and rejected swapped, or the mean forgotten."""
    won, lost = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert loss_of([2.0], [1.0], [1.0]) == pytest.approx(won)
    assert loss_of([2.0], [1.0], [0.0]) == pytest.approx(lost)
    assert loss_of([2.0, 2.0], [1.0, 1.0], [1.0, 0.0]) == pytest.approx((won + lost) / 2)


def test_equal_scores_cost_ln_2():
    """The first number of every healthy run: anything but 0.693 before training means a bug."""
    assert loss_of([3.0, -1.0], [3.0, -1.0], [1.0, 0.3]) == pytest.approx(math.log(2))


def test_only_differences_count():
    """Training scores towards a level: adding 5 to all of them must change nothing."""
    higher = loss_of([7.0, 4.5], [6.0, 5.0], [1.0, 1.0])
    assert higher == pytest.approx(loss_of([2.0, -0.5], [1.0, 0.0], [1.0, 1.0]))


def test_a_soft_label_is_a_mixture_of_both_choices():
    """Soft labels rounded to hard ones, which throws away what the AI was unsure of."""
    mixture = 0.3 * loss_of([2.0], [1.0], [1.0]) + 0.7 * loss_of([2.0], [1.0], [0.0])
    assert loss_of([2.0], [1.0], [0.3]) == pytest.approx(mixture)
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
    rm, eot = tiny_reward_model(), TOKENIZER.eot
    sequences = [[65, 66, 67, eot], [70] * 30 + [eot], [68, eot]]
    together = reward.score(rm, sequences)
    alone = torch.cat([reward.score(rm, [s]) for s in sequences])
    assert torch.allclose(together, alone, atol=1e-5)
    assert alone.std() > 0.01
    assert torch.allclose(reward.score(rm, sequences, batch_size=2), alone, atol=1e-5)


def test_garbage_in_the_padding_changes_nothing():
    """Attention or the read-out looking at what follows the end-of-text."""
    rm = tiny_reward_model()
    segments = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tokens = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(0))
    garbage = torch.where(segments == 1, tokens, 255 - tokens)
    clean, dirty = (reward.last_token_score(rm(t, segments), segments) for t in (tokens, garbage))
    assert torch.equal(clean, dirty)


def test_the_annotator_follows_bradley_and_terry():
    """An annotator who always names the better answer (no noise), or whose order of options
    matters."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    best, right = data.best_answer(world, question), world.answer(question)[1]
    answers = ["Well, let me think.", best, right]
    u = [data.utility(world, question, a) for a in answers]
    groups = reward.annotate(world, [(question, answers)] * 4000, seed=5)
    for k, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        labels = [pairs[k] for _, _, pairs in groups]
        assert all(pair[:2] == (i, j) for pair in labels)
        p = 1 / (1 + math.exp(u[j] - u[i]))
        chance = 4 * math.sqrt(p * (1 - p) / 4000)
        assert sum(target for *_, target in labels) / 4000 == pytest.approx(p, abs=chance)


def test_votes_are_averaged():
    """Three annotators of whom one is heard, or whose majority passes for a certainty."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    answers = ["Well, let me think.", data.best_answer(world, question)]
    u = [data.utility(world, question, a) for a in answers]
    p = 1 / (1 + math.exp(u[1] - u[0]))
    groups = reward.annotate(world, [(question, answers)] * 4000, seed=5, votes=3)
    targets = [pairs[0][2] for _, _, pairs in groups]
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
    assert lines[0] == {"prompt": "Q?", "chosen": "b", "rejected": "a", "votes": [2, 1]}
    assert lines[1]["votes"] == [3, 0]
    (_, answers, pairs), = reward.groups_of(data.read_preferences(tmp_path / "p.jsonl")[0])
    shares = {(answers[i], answers[j]): target for i, j, target in pairs}
    assert shares == pytest.approx({("b", "a"): 2 / 3, ("a", "c"): 1.0, ("b", "c"): 2 / 3})


def test_all_pairs_of_a_question_share_a_batch(monkeypatch):
    """Pairs shuffled over the epoch: each answer is then read again and again, and the model
    overfits in one pass (InstructGPT)."""
    read, real = [], reward.score

    def score(rm, sequences):
        read.append(sequences)
        return real(rm, sequences)

    monkeypatch.setattr(reward, "score", score)
    labels = [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.5)]
    groups = [(f"q{i}?", [f"{i}a", f"{i}b", f"{i}c"], labels) for i in range(7)]
    history = reward.train(tiny_reward_model(), groups, epochs=1, batch_size=2, lr=1e-3, seed=0)
    assert len(read) == 4 and history[-1]["step"] == 4
    all_read = [tuple(s) for batch in read for s in batch]
    assert len(all_read) == len(set(all_read)) == 21       # every answer once, in one epoch
    for batch in read:
        assert len(batch) % 3 == 0


def test_one_batch_of_preferences_can_be_memorised():
    """First and second mixed up somewhere between the label and the loss: agreement then goes to 0.
    """
    rm, answers = tiny_reward_model(), ["It is Ann.", "No.", "Well, well, well."]
    group = ("Who?", answers, [(0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.0)])     # 2 beats 0 beats 1
    reward.train(rm, [group] * 60, epochs=1, batch_size=1, lr=1e-2, seed=0)
    r = reward.score_texts(rm, [("Who?", a) for a in answers])
    assert r[2] > r[0] > r[1]


def test_the_pairs_of_several_questions_are_not_mixed_up():
    """Pairs of the second question in a batch that point at answers of the first."""
    rm = tiny_reward_model()
    groups = [("Who?", ["Ann.", "No."], [(0, 1, 1.0)]),
              ("Where?", ["Go.", "In Oslo."], [(0, 1, 0.0)])]
    reward.train(rm, groups, epochs=60, batch_size=2, lr=1e-2, seed=0)
    good, bad = [("Who?", "Ann."), ("Where?", "In Oslo.")], [("Who?", "No."), ("Where?", "Go.")]
    assert (reward.score_texts(rm, good) > reward.score_texts(rm, bad)).all()


def test_normalise_gives_mean_0_and_standard_deviation_1():
    """A KL coefficient without meaning: scores of another scale make the leash ten times longer or
    shorter."""
    rm = tiny_reward_model()
    conversations = [("Who?", "x" * n) for n in range(1, 9)]
    scale = reward.normalise(rm, conversations)
    scores = (reward.score_texts(rm, conversations) - scale["mean"]) / scale["std"]
    assert scores.mean().abs() < 1e-5 and scores.std().item() == pytest.approx(1, abs=1e-5)
    assert scores.min().item() == pytest.approx(scale["lowest"], abs=1e-4)
    # an answer that was cut off has no part in it, least of all in "lowest" (`answer(whole=True)`)
    assert reward.normalise(rm, conversations + [("Who?", "")] * 3) == scale


def test_a_given_scale_is_kept():
    """The preference model of Stage 5: what lies between the scores of two kinds of prompt is
    arbitrary, and must not set the scale."""
    rm = tiny_reward_model()
    conversations = [("Who?", "x" * n) for n in range(1, 9)]
    raw, scale = reward.score_texts(rm, conversations), reward.normalise(rm, conversations, std=1.0)
    assert scale["std"] == 1
    assert scale["lowest"] == pytest.approx((raw.min() - raw.mean()).item(), abs=1e-5)


def test_scores_that_are_all_alike_are_no_scale(monkeypatch):
    """A division by 0 that makes every reward of the next stage infinite."""
    judge_by(monkeypatch, lambda question, text: 1)
    with pytest.raises(SystemExit, match="raise --prompts, or lower --lr"):
        reward.normalise(None, [("Who?", "Ann."), ("Who?", "Tom.")])


def test_a_perfect_judge_reaches_the_ceiling(monkeypatch):
    """An accuracy that compares with the wrong side, or a ceiling that the true utility itself does
    not reach."""
    world, answered = data.World(0), []
    for q in data.fact_questions(world, "test")[:5]:
        full = world.answer(q)[1]
        rambling = f"{data.RAMBLE[0]} {full}"
        answered.append((q, [full, data.best_answer(world, q), "Sorry.", rambling]))
    judge_by(monkeypatch, lambda q, a: data.utility(world, q, a))
    good = reward.evaluate(None, world, answered)
    assert good["accuracy"] == pytest.approx(good["ceiling"]) and good["pairs_heldout"] == 30
    assert good["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert good["correlation"] == pytest.approx(1) and good["share_of_ceiling"] == pytest.approx(1)
    judge_by(monkeypatch, lambda q, a: -data.utility(world, q, a))
    bad = reward.evaluate(None, world, answered)
    assert bad["accuracy"] == pytest.approx(1 - good["ceiling"])
    # it says 1 - p where p is right, and is off by |1 - 2p|; the ceiling is above 1/2 by |p - 1/2|
    assert bad["calibration_error"] == pytest.approx(2 * good["ceiling"] - 1)


def test_pairs_are_formed_within_a_question(monkeypatch):
    """Answers to different questions compared with one another: no annotator ever did that."""
    world = data.World(0)
    answered = [(q, ["Yes.", "No.", "Well."]) for q in data.fact_questions(world, "test")[:2]]
    level = {answered[0][0]: 0, answered[1][0]: 100}       # what is arbitrary between two questions
    judge_by(monkeypatch, lambda q, a: level[q] + len(a))
    figures = reward.evaluate(None, world, answered)
    assert figures["pairs_heldout"] == 6
    # the margins are 1 of Yes over No, 1 of Well over Yes, 2 of Well over No: far from certain
    assert figures["calibration_error"] < 0.5


def test_prompts_of_training_and_of_evaluation_are_different():
    """Accuracy measured on questions that were trained on."""
    world = data.World(0)
    train = reward.preference_prompts(world, "train", 400)
    test = reward.preference_prompts(world, "test", 300)
    assert not set(train) & set(test) and (len(train), len(test)) == (400, 300)
    for questions in (train, test):
        asked = [world.parse_question(q) for q in questions]
        assert all(isinstance(a, data.Act) and not a.verb.harmful for a in asked[::2])
        assert all(isinstance(a, tuple) for a in asked[1::2])


def test_bfloat16_ends_before_scores_are_compared(monkeypatch):
    """Margins in bfloat16, which has two and a half digits: close scores are all the same to it."""
    compared, preference_loss = [], reward.preference_loss

    def loss(r_first, r_second, target):
        compared.append(r_first.dtype)
        return preference_loss(r_first, r_second, target)

    half = lambda device: torch.autocast(device.type, torch.bfloat16)
    monkeypatch.setattr(reward, "autocast", half)
    monkeypatch.setattr(reward, "preference_loss", loss)
    model = tiny_reward_model()
    groups = [("Who?", ["Ann.", "Tom, I think."], [(0, 1, 1.0)])] * 40
    history = reward.train(model, groups, epochs=1, batch_size=2, lr=3e-3, seed=0)
    assert history[-1]["train_loss_nats"] < 0.5 * history[0]["train_loss_nats"]
    assert set(compared) == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_pairs_become_groups():
    """Answers to one prompt scattered over batches, or winner and loser swapped on the way from a
    file."""
    dialogue = [("user", "P?")]
    pairs = [("P?", "a", "b"), ("Q?", "x", "y"), ("P?", "a", "c"), (dialogue, "d", "e")]
    expected = [("P?", ["a", "b", "c"], [(0, 1, 1.0), (0, 2, 1.0)]),
                ("Q?", ["x", "y"], [(0, 1, 1.0)]), (dialogue, ["d", "e"], [(0, 1, 1.0)])]
    assert reward.groups_of([(*pair, 1, 0) for pair in pairs]) == expected
    votes = [("P?", "a", "b", 10 ** 9, 0), ("P?", "b", "a", 3 * 10 ** 9, 0)]     # a weight, no list
    assert reward.groups_of(votes) == [("P?", ["a", "b"], [(0, 1, 0.25)])]


def test_pairs_are_taken_by_whole_groups():
    """Half of a question's pairs learnt from, so that its answers no longer share a batch."""
    groups = [("P?", ["a", "b", "c"], [(0, 1, 1.0), (0, 2, 1.0)]),
              ("Q?", ["x", "y"], [(0, 1, 1.0)]), ("R?", ["u", "v"], [(0, 1, 1.0)])]
    assert [len(reward.take_pairs(groups, n)) for n in (1, 2, 3, 4, 9, None)] == [1, 1, 2, 3, 3, 3]


def test_agreement_is_measured_over_prompts(monkeypatch):
    """An interval over pairs: those of one prompt are no independent cases, and it comes out too
    narrow."""
    judge_by(monkeypatch, lambda question, text: float(text))
    groups = [("P?", ["3", "2", "1"], [(0, 1, 1.0), (2, 1, 1.0)]),         # right, wrong
              ("Q?", ["1", "2"], [(1, 0, 1.0)])]                           # right
    figures = reward.agreement(None, groups)
    assert figures["accuracy"] == pytest.approx((0.5 + 1) / 2) and figures["prompts_heldout"] == 2
    assert figures["accuracy_low"] == 0.5 and figures["accuracy_high"] == 1.0


def test_a_tie_is_no_label_to_agree_with(monkeypatch):
    """Two annotators who disagree, or a file that contradicts itself: counted as a win of the
    second, it makes a perfect judge look like one who errs."""
    judge_by(monkeypatch, lambda question, text: float(text))
    groups = [("P?", ["3", "2", "1"], [(0, 1, 1.0), (0, 2, 0.5), (1, 2, 0.5)]),
              ("Q?", ["2", "1"], [(0, 1, 0.5)])]
    figures = reward.agreement(None, groups)
    assert figures["accuracy"] == 1 and figures["ties_heldout"] == 3
    assert figures["prompts_heldout"] == 1


def test_held_out_ties_alone_stop_the_run_at_the_door(tmp_path, monkeypatch):
    """An evaluation of nothing, found out after the training."""
    groups = [(f"{i}?", ["a", "b"], [(0, 1, 0.5)]) for i in range(30)]
    monkeypatch.setattr(reward, "groups_from_file", lambda path, model: groups)
    args = argparse.Namespace(data="mine.jsonl", pairs=None, seed=0)
    with pytest.raises(SystemExit, match="mine.jsonl: the held-out labels are all ties"):
        reward.from_file(None, args)


def test_ties_do_not_count_in_the_agreement_of_training():
    """The same in the column that training prints: it could not come near 1."""
    rm = tiny_reward_model()
    groups = [("Who?", ["Ann.", "No."], [(0, 1, 1.0)]), ("Who?", ["Ann.", "Go."], [(0, 1, 0.5)])]
    history = reward.train(rm, groups, epochs=40, batch_size=2, lr=1e-2, seed=0)
    assert history[-1]["train_agreement"] == 1


@pytest.mark.parametrize("sign, expected", [(1, 0.9), (-1, 0.1), (0, 0.5)])
def test_a_judge_of_length_is_found_out(sign, expected, monkeypatch):
    """A reward model that likes long answers looks accurate as long as good answers are long."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    full = world.answer(question)[1]
    # "Gladly." and a longer phrase, equally good
    answered = [(question, [f"{data.POLITE[0]} {full}", f"{data.POLITE[2]} {full}", full])]
    judge_by(monkeypatch, lambda q, a: sign * len(a.split()))
    found = reward.evaluate(None, world, answered)["longer_wins"]
    assert found == pytest.approx(expected, abs=0.1)


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
    own = [world.answer(q)[1] for q in questions]
    astray = reward.with_strays(world, [(q, [a]) for q, a in zip(questions, own)])
    assert [q for q, _ in astray] == questions
    assert [answers[0] for _, answers in astray] == own    # its own answers stay, in front
    wrong, right_person, same_recipe = 0, 0, 0
    for (question, (answer, *strays)), asked in zip(astray, map(world.parse_question, questions)):
        person = asked.person if isinstance(asked, data.Act) else asked[0]
        wrong += any(not data.is_correct(world, question, a) for a in strays)
        right_person += any(person in a for a in strays)   # ... and the wrong fact
        recipe = answer.partition("use")[2]
        same_recipe += any(a.endswith(recipe) and a != answer for a in strays if recipe)
    assert wrong > 180 and right_person > 150
    assert same_recipe > 30                                # the right recipe for somebody else


def test_strays_come_where_questions_were_dropped():
    """A look-up by number that fails, or gives a question its own answers, where questions have
    been left out and the last ones have nobody after them."""
    world = data.World(0)
    questions = reward.preference_prompts(world, "train", 40)
    left = questions[:3] + questions[4:9] + questions[20:]
    astray = reward.with_strays(world, [(q, [world.answer(q)[1]]) for q in left])
    assert [q for q, _ in astray] == left and all(2 <= len(a) <= 4 for _, a in astray)
    lone = [(questions[0], ["Yes."])]
    assert reward.with_strays(world, lone) == lone


def test_half_of_the_fact_prompts_of_training_are_about_people_in_no_demonstration():
    """Prompts about well-known people alone: the model is right about them, and the judge learns
    nothing about facts."""
    world = data.World(0)
    facts = reward.preference_prompts(world, "train", 400)[1::2]
    people = [world.parse_question(q)[0] for q in facts]
    assert sum(p in world.people["train"] for p in people) == 100
    assert sum(p in world.people["demo"] for p in people) == 100


def test_a_reward_model_comes_back_from_its_file(tmp_path):
    """A score that means another thing after loading, or a reward model that reads a policy's
    tokens by another alphabet."""
    rm = tiny_reward_model()
    m.save_model(tmp_path / "reward.pt", rm, scale={"mean": 1.0, "std": 2.0}, taste="curt")
    back = reward.load_reward(tmp_path / "reward.pt", rm.gpt)
    assert back.scale == {"mean": 1.0, "std": 2.0} and back.taste == "curt" and not back.training
    conversation = [("Who?", "Ann.")]
    assert torch.equal(reward.score_texts(back, conversation), reward.score_texts(rm, conversation))
    other = m.GPT(rm.gpt.config, data.make_tokenizer("bpe", ["Ann lives in Oslo. "] * 50, 280))
    with pytest.raises(SystemExit, match="its tokenizer or context differs"):
        reward.load_reward(tmp_path / "reward.pt", other)
    m.save_model(tmp_path / "sft.pt", rm.gpt)
    with pytest.raises(SystemExit, match="holds no reward model: run `python reward.py` first"):
        reward.load_reward(tmp_path / "sft.pt", rm.gpt)
