"""PPO: every term by hand, and a real rollout in which everything that usually goes wrong has a
chance to."""
import argparse
import math

import numpy as np
import pytest
import torch

import data
import model as m
import ppo

TOKENIZER = data.make_tokenizer("bytes", [])
QUESTIONS = ["Who?", "Where does Ann live?", "How?", "How do I mend Ann's old hat?"] * 6


def tiny_gpt(seed, more_eot=0.0):
    """A random model with decided opinions; `more_eot` raises the logit of end-of-text."""
    torch.manual_seed(seed)
    gpt = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 64, 1, 2, 16), TOKENIZER)
    for p in gpt.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        eot = gpt.tokens.weight[TOKENIZER.eot].clone()
    # by a hook and not by the norm's bias, which not every network has (docs/variants)
    gpt.norm.register_forward_hook(lambda _, given, out: out + more_eot * eot / eot.norm() ** 2)
    return gpt.eval()


def tiny_value(seed=3):
    return m.ScalarModel(tiny_gpt(seed)).eval()


def tiny_reward_model(mean, std, lowest=-1.0):
    reward_model = tiny_value()
    reward_model.scale = {"mean": mean, "std": std, "lowest": lowest}
    return reward_model


def constant_scores(score, unfinished=None):
    """A judge who likes all answers alike, but for those that do not end."""
    def score_answers(questions, replies):
        ended = [reply[-1] == TOKENIZER.eot for reply in replies]
        return torch.tensor([score if unfinished is None or e else unfinished for e in ended])
    return score_answers


def real_rollout(beta=0.1, score=7.0, unfinished=-3.0):
    """Prompts of different lengths; some answers end and some are cut off."""
    policy, reference, value = tiny_gpt(1, 3.0), tiny_gpt(2), tiny_value()
    batch = ppo.rollout(policy, reference, QUESTIONS, 10, 8, (0, 41, 0))
    ppo.judge(batch, constant_scores(score, unfinished), value, beta)
    assert batch["ended"].any() and not batch["ended"].all()
    return policy, reference, value, batch


def weights(*models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def sgd(policy, value, lr=0.1):
    return torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=lr)


def test_token_logprobs_by_hand():
    """Each token scored by the logits that came after it, or at another temperature than the one
    that sampled."""
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 0.0]]])
    network, tokens = lambda tokens, segments: logits, torch.tensor([[0, 1, 0]])
    expected = torch.tensor([[math.log(3 / 4), math.log(1 / 2)]])      # tokens 1 and 0 are chosen
    assert torch.allclose(ppo.token_logprobs(network, tokens), expected)
    expected = torch.tensor([[math.log(9 / 10), math.log(1 / 2)]])     # logits 0, 2 ln 3
    assert torch.allclose(ppo.token_logprobs(network, tokens, temperature=0.5), expected)


def test_the_score_goes_to_the_last_real_token():
    """The reward on a pad after end-of-text, or on the prompt's last token, which left padding and
    off-by-one slices produce."""
    mask = torch.tensor([[0., 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
    zero = torch.zeros(3, 5)
    rewards = ppo.token_rewards(zero, zero, mask, torch.tensor([5., 6, 7]), beta=0.1)
    assert rewards.tolist() == [[0, 0, 0, 5, 0], [0, 0, 6, 0, 0], [0, 0, 0, 0, 7]]


def test_the_kl_fine_has_the_right_sign():
    """A KL term with its sign or its direction swapped pays the policy for leaving the reference.
    """
    logp, logp_ref = torch.tensor([[-1., -1, -1, -9]]), torch.tensor([[-2., -1, -.5, -1]])
    mask = torch.tensor([[1.0, 1, 1, 0]])
    rewards = ppo.token_rewards(logp, logp_ref, mask, torch.tensor([0.0]), beta=0.5)
    # the policy likes token 0 more than the reference does (a fine of 0.5 * 1), token 2 less (a
    # refund of 0.5 * 0.5); token 3 is padding
    assert torch.allclose(rewards, torch.tensor([[-.5, 0, .25, 0]]))


def test_advantages_by_hand():
    """An off-by-one between rewards and values: V of the state before the token, never after it."""
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.6, 0.8]])
    advantages, returns = ppo.advantages_and_returns(rewards, values, torch.ones(1, 3), 1.0, 0.5)
    # delta = [0 + .6 - .5, 0 + .8 - .6, 1 + 0 - .8] = [.1, .2, .2]
    # A     = [.1 + .5 * .3, .2 + .5 * .2, .2]
    assert torch.allclose(advantages, torch.tensor([[.25, .3, .2]]))
    assert torch.allclose(returns, torch.tensor([[.75, .9, 1.0]]))


def test_advantages_are_the_explicit_double_sum():
    """A backward recursion that is subtly not the sum of (gamma lambda)^l delta_{t+l} (Schulman et
    al. 2016, eq. 16)."""
    torch.manual_seed(0)
    B, R, gamma, lam = 4, 9, 0.9, 0.8
    rewards, values, mask = torch.randn(B, R), torch.randn(B, R), torch.zeros(B, R)
    spans = [(0, 9), (2, 7), (4, 5), (3, 9)]
    for b, (start, end) in enumerate(spans):
        mask[b, start:end] = 1
    advantages, _ = ppo.advantages_and_returns(rewards, values, mask, gamma, lam)
    for b, (start, end) in enumerate(spans):
        following = [values[b, t + 1] if t + 1 < end else 0 for t in range(start, end)]
        delta = rewards[b, start:end] + gamma * torch.tensor(following) - values[b, start:end]
        for t in range(end - start):
            expected = sum((gamma * lam) ** (l - t) * delta[l] for l in range(t, end - start))
            assert advantages[b, start + t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert (advantages[mask == 0] == 0).all()


def test_lambda_one_is_return_minus_value():
    """Forgetting that the returns of gamma = lambda = 1 are the plain sum of what follows."""
    rewards = torch.tensor([[1., 2, 3]])
    values = torch.tensor([[9.0, -4, 2]])
    _, returns = ppo.advantages_and_returns(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    assert torch.allclose(returns, torch.tensor([[6., 5, 3]]))


def test_padding_never_reaches_the_advantages():
    """Returns computed over pad positions, or a value after end-of-text that is not 0: the bug of
    half the RLHF code in the wild."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6), torch.randn(2, 6)
    mask = torch.tensor([[0., 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]])
    clean = ppo.advantages_and_returns(rewards * mask, values * mask, mask)
    garbage = 1e6 * (1 - mask)
    dirty = ppo.advantages_and_returns(rewards + garbage, values + garbage, mask)
    for a, b in zip(clean, dirty):
        assert torch.equal(a * mask, b * mask)


def test_whitening_looks_at_the_answers_only():
    """Mean and variance taken over padding as well: the more padding, the smaller the step."""
    mask = torch.tensor([[1., 1, 0, 0], [1, 1, 0, 0]])
    x = torch.tensor([[1., 2, 999, -999], [3, 4, 12345, 0]])
    white = ppo.whiten(x, mask)
    assert torch.allclose(white[:, :2], (x[:, :2] - 2.5) / math.sqrt(1.25), atol=1e-5)
    assert (white[:, 2:] == 0).all()


def test_policy_loss_by_hand():
    """The surrogate not negated, or its second term without the advantage, or clipped on one side
    only."""
    # ratio, A, loss
    cases = [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8), (1.1, 2, -2.2),
             (0.9, -3, 2.7)]
    for ratio, advantage, loss in cases:
        new, old = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
        got = ppo.policy_loss(new, old, torch.tensor([[float(advantage)]]), torch.ones(1, 1), 0.2)
        assert got.item() == pytest.approx(loss, abs=1e-5), (ratio, advantage)


def test_policy_loss_pushes_the_right_way():
    """A sign error that makes bad tokens more likely, and a clip that fails to stop the push."""
    logp = torch.log(torch.tensor([[1.0, 1.0, 1.5, 0.5]])).requires_grad_()
    advantages = torch.tensor([[1.0, -1, 1, -1]])
    ppo.policy_loss(logp, torch.zeros(1, 4), advantages, torch.ones(1, 4), 0.2).backward()
    # descent raises the good token and lowers the bad one
    assert logp.grad[0, 0] < 0 < logp.grad[0, 1]
    assert (logp.grad[0, 2:] == 0).all()                          # already past the clip


def test_policy_loss_ignores_padding():
    """A mean over all positions, in which long paddings drown the answers."""
    mask = torch.tensor([[1., 1, 0], [1, 0, 0]])
    new, old = torch.zeros(2, 3), torch.zeros(2, 3)
    advantages = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    loss = ppo.policy_loss(new, old, advantages, mask)
    assert loss.item() == pytest.approx(-(1 + 2 + 4) / 3)
    assert ppo.policy_loss(new + 5 * (1 - mask), old, advantages, mask).item() == loss.item()


def test_the_log_ratio_is_clamped():
    """exp(100) = inf and inf * 0 = nan: one wild token ends a run."""
    new = torch.tensor([[100., -100, 100]], requires_grad=True)
    loss = ppo.policy_loss(new, torch.zeros(1, 3), torch.tensor([[-1., 1, 1]]), torch.ones(1, 3))
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all()


def test_value_loss_by_hand():
    """The value clip taken with min, around the returns, or over padding."""
    one = torch.ones(1, 1)
    # old 0, new 0.5, return 1: (0.5 - 1)^2 = .25, at the clip (0.2 - 1)^2 = .64; half the worse
    assert ppo.value_loss(0.5 * one, 0 * one, one, one, 0.2).item() == pytest.approx(0.32)
    assert ppo.value_loss(-0.5 * one, 0 * one, one, one, 0.2).item() == pytest.approx(0.5 * 2.25)
    assert ppo.value_loss(0.1 * one, 0 * one, one, one, 0.2).item() == pytest.approx(0.405)
    values, mask = torch.tensor([[0.1, 77.]]), torch.tensor([[1., 0]])
    loss = ppo.value_loss(values, torch.zeros(1, 2), torch.tensor([[1.0, -5]]), mask, 0.2)
    assert loss.item() == pytest.approx(0.405)


def test_kl_estimators_against_the_exact_value():
    """k3 the wrong way round, as in several well-known repositories: its mean is then not the KL of
    the policy to the reference."""
    pi = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    ref = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    exact = (pi * (pi / ref).log()).sum()
    # the estimate of each of the three possible samples
    k1, k3 = ppo.kl_estimates(pi.log(), ref.log())
    assert (pi * k1).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert (pi * k3).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert (k3 >= 0).all() and k1.min() < 0
    assert ppo.exact_kl(pi.log(), ref.log()).item() == pytest.approx(exact.item(), abs=1e-12)
    # logits need not be normalised
    shifted = ppo.exact_kl(pi.log() + 3, ref.log() - 2).item()
    assert shifted == pytest.approx(exact.item(), abs=1e-12)
    assert ppo.exact_kl(ref.log(), pi.log()).item() != pytest.approx(exact.item(), abs=1e-3)


def test_the_ratio_is_one_before_the_first_step():
    """Old log-probs computed another way than new ones: padding, positions, temperature, a shifted
    index."""
    policy, _, _, batch = real_rollout()
    fresh = ppo.token_logprobs(policy, batch["tokens"], batch["segments"])
    assert ((fresh - batch["logp"]) * batch["mask"]).abs().max() < 1e-5
    # and they are those of each answer alone
    for row, question, reply in zip(range(len(QUESTIONS)), QUESTIONS, batch["replies"]):
        prompt = data.chat_prompt(TOKENIZER, question)
        alone = ppo.token_logprobs(policy, torch.tensor([prompt + reply]))[0, len(prompt) - 1:]
        assert torch.allclose(batch["logp"][row][batch["mask"][row] == 1], alone, atol=1e-4)


def test_answers_are_sampled_from_what_is_scored():
    """Sampling at another temperature, or with top-k, and scoring at 1: the usual cause of a
    "negative KL"."""
    policy, _, _, batch = real_rollout()
    prompts = [data.chat_prompt(TOKENIZER, q) for q in QUESTIONS]
    assert batch["replies"] == m.generate(policy, prompts, 10, temperature=1.0, seed=(0, 41, 0))


def test_what_stands_at_the_padding_changes_no_update():
    """Whitening, or a loss, over padding: the update then depends on what happens to stand there.
    """
    after = []
    for garbage in (0.0, 9.0):
        policy, _, value, batch = real_rollout()
        for name in ("logp", "values", "advantages", "returns"):
            batch[name] += garbage * (1 - batch["mask"])
        ppo.update(policy, value, sgd(policy, value), batch, settings(epochs=2, minibatch=8))
        after.append(weights(policy, value))
    assert torch.equal(*after)


def test_a_run_that_diverges_says_so():
    """An index error from inside the sampler, when the rate was far too high."""
    policy, reference, value, batch = real_rollout()
    batch["returns"] *= math.nan
    with pytest.raises(SystemExit, match="lower the learning rates"):
        ppo.update(policy, value, sgd(policy, value), batch, settings(epochs=1, minibatch=8))
    policy.norm.weight.data *= math.nan
    with pytest.raises(SystemExit, match="diverged"):
        ppo.rollout(policy, reference, QUESTIONS, 10, 8, (0, 41, 0))


def test_the_mask_covers_the_answer_and_nothing_else():
    """Training on the question's tokens, or forgetting end-of-text, so that the policy never learns
    to stop."""
    _, _, _, batch = real_rollout()
    for row, reply in enumerate(batch["replies"]):
        assert batch["tokens"][row, 1:][batch["mask"][row] == 1].tolist() == reply
        assert (reply[-1] == TOKENIZER.eot) == batch["ended"][row].item()


def test_the_fine_is_for_leaving_the_reference():
    """KL against the previous policy instead of the frozen model: the leash then has no other end.
    """
    _, reference, _, batch = real_rollout(beta=0.1)
    logp_ref = ppo.token_logprobs(reference, batch["tokens"], batch["segments"])
    fines = -0.1 * (batch["logp"] - logp_ref) * batch["mask"]
    assert torch.allclose(batch["rewards"].sum(1), fines.sum(1) + batch["scores"], atol=1e-3)
    assert fines.abs().sum() > 1
    logits, logits_ref = (model(batch["tokens"], batch["segments"])[:, :-1]
                          for model in (tiny_gpt(1, 3.0), reference))
    kl = ppo.exact_kl(logits, logits_ref)
    assert torch.allclose(batch["kl"], (kl * batch["mask"]).sum(1), atol=1e-3)


def test_a_tokens_baseline_has_not_read_that_token():
    """The value after a choice in the place of the value before it: it knows what it should
    foretell, and the advantage of every choice shrinks to nothing."""
    _, _, value, batch = real_rollout()
    for t in range(1, batch["tokens"].shape[1]):           # all that was read before token t
        before = value(batch["tokens"][:, :t], batch["segments"][:, :t])[:, -1]
        here = batch["mask"][:, t - 1] == 1                # [:, t-1] is the choice of token t
        assert torch.allclose(batch["values"][here, t - 1], before[here], atol=1e-4)


def test_an_answer_that_does_not_end_gets_the_fixed_score():
    """A reward model asked about unfinished text, which it has never seen: policies learn never to
    stop."""
    policy, reference, value, batch = real_rollout()
    reward_model = tiny_reward_model(0.5, 2.0, lowest=-2.0)
    ppo.judge(batch, ppo.score_by_model(reward_model), value, beta=0.0)
    for row, ended in enumerate(batch["ended"].tolist()):
        assert (batch["scores"][row].item() == -3.0) == (not ended)
        last = batch["mask"][row].nonzero().max()
        assert batch["rewards"][row, last] == batch["scores"][row] == batch["rewards"][row].sum()


def test_an_unfinished_answer_never_pays():
    """A batch in which a finished answer scores below the fixed score: there it paid not to end."""
    eot, scale = TOKENIZER.eot, {"mean": 1.0, "std": 2.0, "lowest": -1.0, "margin": 0.5}
    replies, raw = [[5, eot], [5], [5, eot]], torch.tensor([3.0, 99.0, -1.0])
    # finished: 1 and -1; the fixed score is -1.5, and below all of them
    assert ppo.on_scale(raw, replies, scale, TOKENIZER).tolist() == [1.0, -1.5, -1.0]
    raw = torch.tensor([3.0, 99.0, -7.0])                  # now one is at -4
    assert ppo.on_scale(raw, replies, scale, TOKENIZER).tolist() == [1.0, -4.5, -4.0]
    assert ppo.on_scale(raw[1:2], replies[1:2], scale, TOKENIZER).tolist() == [-1.5]


def test_the_pad_token_has_no_probability():
    """Sampling that forbids a token which scoring allows: two distributions, and a ratio that is
    not what it claims."""
    policy, reference = tiny_gpt(1), tiny_gpt(2)
    with torch.no_grad():
        policy.tokens.weight[TOKENIZER.pad] = 9 * policy.tokens.weight[TOKENIZER.eot]
        logits, logits_ref = (model(torch.tensor([[5, 6, 7]])) for model in (policy, reference))
    assert (logits.softmax(-1)[..., TOKENIZER.pad] == 0).all()
    assert torch.isfinite(ppo.exact_kl(logits, logits_ref)).all()


def test_update_refuses_wrong_old_log_probs():
    """Most PPO bugs ever reported show as a ratio that is not 1 at the start; silence about it is
    what made them last."""
    policy, _, value, batch = real_rollout()
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-4)
    good = dict(batch)
    batch["logp"] = batch["logp"] + 0.02 * batch["mask"]
    with pytest.raises(AssertionError, match="the first ratio is exp"):
        ppo.update(policy, value, optimizer, batch, settings(epochs=1, minibatch=8))
    figures = ppo.update(policy, value, optimizer, good, settings(epochs=2, minibatch=8))
    assert all(math.isfinite(x) for x in figures.values())


def test_an_update_stops_early(monkeypatch):
    """Epochs that go on after the policy has left the rollout behind, where its advantages mean
    nothing."""
    monkeypatch.setattr(ppo, "MAX_APPROX_KL", 1e-4)
    policy, _, value, batch = real_rollout()
    optimizer = sgd(policy, value, lr=0.5)
    taken, step = [], optimizer.step
    optimizer.step = lambda: (taken.append(1), step())
    ppo.update(policy, value, optimizer, batch, settings(epochs=50, minibatch=8))
    assert 1 <= len(taken) < 50 * len(QUESTIONS) // 8


def test_no_stale_gradients():
    """Gradients that an early stop left behind, added to those of the next update."""
    after = []
    for stale in (None, 1.0):
        policy, _, value, batch = real_rollout()
        for p in [*policy.parameters(), *value.parameters()]:
            p.grad = torch.full_like(p, stale) if stale else None
        ppo.update(policy, value, sgd(policy, value), batch, settings(epochs=1, minibatch=8))
        after.append(weights(policy, value))
    assert torch.equal(*after)


def test_policy_and_value_share_nothing():
    """A shared trunk: the value loss then drags the policy along (Stiennon et al. 2020)."""
    reward_model = tiny_reward_model(2.0, 4.0)
    value = ppo.value_from(reward_model)
    theirs = {p.data_ptr() for p in reward_model.parameters()}
    assert not {p.data_ptr() for p in value.parameters()} & theirs
    tokens = torch.tensor([[5, 6, 7]])
    raw, scaled = (model(tokens, torch.ones_like(tokens)) for model in (reward_model, value))
    # the value starts on the scale of the rewards
    assert torch.allclose(scaled, (raw - 2) / 4, atol=1e-5)


def test_the_scorer_reads_question_and_answer_on_the_fixed_scale():
    """Scores of padding, or without the gain and bias that give the KL coefficient its meaning."""
    reward_model = tiny_reward_model(0.5, 2.0)
    replies = [[65, 66, TOKENIZER.eot], [70, TOKENIZER.eot]]
    questions = ["Who?", "Where is it?"]
    scores = ppo.score_by_model(reward_model)(questions, replies)
    for question, reply, score in zip(questions, replies, scores):
        tokens = torch.tensor([data.chat_prompt(TOKENIZER, question) + reply])
        raw = reward_model(tokens, torch.ones_like(tokens))[0, -1].item()
        assert score.item() == pytest.approx((raw - 0.5) / 2, abs=1e-4)


def settings(**more):
    """What `train` reads of the flags."""
    flags = dict(lr=3e-3, value_lr=3e-3, beta=0.01, max_new=6, minibatch=16, clip=0.2, seed=0,
                 value_warmup=0, resume=False, fresh=False, replay=None, replay_rows=0)
    return argparse.Namespace(**flags | more)


def test_ppo_learns_to_stop():
    """The whole loop with a sign wrong somewhere: an answer that ends is rewarded, so more and more
    must end."""
    policy, scores = tiny_gpt(1, 2.0), constant_scores(1.0, unfinished=-1.0)
    history = ppo.train(policy, tiny_value(), lambda step: QUESTIONS + QUESTIONS[:8], scores,
                        settings(iterations=12, epochs=4))
    assert history[0]["eos_rate"] < 0.2 and history[-1]["eos_rate"] > 0.5
    # the first rollout is the reference itself
    assert history[0]["kl_nats"] < 1e-6 < history[-1]["kl_nats"]


def test_the_value_model_may_learn_first():
    """Advantages by a value model that knows nothing yet: the policy is thrown about before it can
    be led."""
    policy, value, same = tiny_gpt(1, 2.0), tiny_value(), []

    def questions_at(step):
        same.append(torch.equal(weights(policy), weights(tiny_gpt(1, 2.0))))
        return QUESTIONS

    args = settings(iterations=3, epochs=1, minibatch=8, value_warmup=2)
    ppo.train(policy, value, questions_at, constant_scores(1.0, unfinished=-1.0), args)
    assert same == [True] * 3 and questions_at(3) and same[-1] is False
    assert not torch.equal(value.scalar.weight, tiny_value().scalar.weight)
    args.value_warmup = 3
    with pytest.raises(SystemExit, match="leaves the policy no iteration"):
        ppo.check_warmup(args)


def test_ties_are_half_a_win():
    """Ties counted as losses: a model compared with itself then wins 0 of 100."""
    result = data.win_rate([1, 2, 3, 4], [1, 2, 0, 9], "abcd")
    assert result["win_rate"] == (0.5 + 0.5 + 1 + 0) / 4
    assert result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"]
    assert np.allclose(list(data.win_rate([1, 2, 3], [1, 2, 3], "abc").values()), 0.5)


def test_a_question_asked_again_is_no_new_case():
    """An interval over answers where a hundred and twenty questions are asked a thousand times: it
    comes out a third as wide as it should."""
    wins, ties, questions = [1, 1, 0, 1, 0], [0, 0, 1, 0, 1], "abcde"
    once = data.win_rate(wins, ties, questions)
    again = data.win_rate(wins * 50, ties * 50, questions * 50)
    assert once == pytest.approx(again)
    # a question that is asked more often weighs more
    assert data.win_rate([1, 1, 1, 0], [0, 0, 0, 1], "aaab")["win_rate"] == 0.75


def test_old_log_probs_are_those_of_the_update():
    """A ratio that is not 1 at first, since rollout and update read answers in other batches. Up
    to rounding it has to be: here far less than the 0.01 that `update` lets pass."""
    policy, _, _, batch = real_rollout()
    with torch.no_grad():
        fresh = ppo.token_logprobs(policy, batch["tokens"], batch["segments"])
    assert ((fresh - batch["logp"]) * batch["mask"]).abs().max() < 1e-4


def test_each_pass_is_shuffled_anew(monkeypatch):
    """The same minibatches in every epoch: the answers of one always push the weights together."""
    policy, _, value, batch = real_rollout()
    read, token_logprobs = [], ppo.token_logprobs

    def watched(model, tokens, segments):
        read.append(sorted(map(tuple, tokens.tolist())))
        return token_logprobs(model, tokens, segments)

    monkeypatch.setattr(ppo, "token_logprobs", watched)
    ppo.update(policy, value, sgd(policy, value), batch, settings(epochs=2, minibatch=8))
    first, second = read[:len(read) // 2], read[len(read) // 2:]
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))


def test_prompts_without_room_for_an_answer_are_left_out(capsys):
    """One long prompt in a batch: the cache ends early, and every answer beside it is cut short
    without a word."""
    prompts = ["Who?", "x" * 50]
    assert ppo.prompts_that_fit(prompts, TOKENIZER, 20) == ["Who?"]
    assert "1 prompts left out: longer than 20 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--max-new"):
        ppo.prompts_that_fit(prompts, TOKENIZER, 3)


def test_a_batch_of_equal_scores_is_reported_while_it_runs(monkeypatch, capsys):
    """An hour of iterations in which no answer ended, found in the log the next morning."""
    policy, _, value, _ = real_rollout()
    said = []
    monkeypatch.setattr(ppo.tqdm, "write", said.append)
    args = settings(epochs=1, minibatch=8, iterations=1, value_warmup=0, lr=1e-4, value_lr=1e-4,
                    max_new=2, beta=0.1, seed=0, replay_rows=0, resume=False, fresh=False)
    ppo.train(policy, value, lambda step: QUESTIONS, lambda q, r: torch.zeros(len(q)), args)
    assert len(said) == 1 and "iteration 1: all scores alike, " in said[0]
    ppo.train(policy, value, lambda step: QUESTIONS, lambda q, r: torch.arange(len(q)) / 9, args)
    assert len(said) == 1
