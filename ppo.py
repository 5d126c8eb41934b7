"""Stage 4. Improve the assistant by trial and error against the reward model, on a leash.

    reward[t] = -beta * (logp_policy[t] - logp_ref[t]),   + score at the last token           # Ziegler et al. 2019; Stiennon et al. 2020
    loss = -min(ratio * A, clip(ratio, 1-eps, 1+eps) * A),   ratio = exp(logp_new - logp_old)  # PPO, Schulman et al. 2017, eq. 7

Each iteration: the policy answers a batch of questions (rollout), the reward model scores the answers, a value model says what
score it had expected at each token, and the policy makes tokens that went better than expected more likely. beta is the
leash: every nat by which the policy leaves the SFT model ("reference") costs reward.

    python ppo.py                         reads out/sft.pt and out/reward.pt, writes out/ppo.pt
    python ppo.py --show                  one answer token by token, with the ratios after one update; nothing is written
    python ppo.py --reward my.py:score    a reward of your own: score(question, answer) -> a number
    python ppo.py --measure               no training: how far OUT/ppo.pt is from the best that its KL could buy, and who beats whom

Watch: the score rises; the gold utility, which nothing here is trained on, should rise with it. KL says what it cost. Length and
the share of answers that end (EOS) are the first to show that a policy has found a hole in its reward model.
"""
import argparse
import math
import runpy
import time
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import reward as reward_stage
from model import (MAX_NEW, ScalarModel, answer, copy_of, forget_progress, generate, load_gpt, load_progress, pick_device, positive,
                   save, save_progress, token_logprobs, write_results)

# Letters: B answers, T tokens of prompt and answer, R = T - 1 positions that choose a token: what is computed at [:, t] belongs to the
# choice of tokens[:, t+1], and a mask (B, R) picks the choices that make up the answer.


def token_rewards(logp, logp_ref, mask, scores, beta):           # (B, R) x 3, (B,) -> (B, R)
    """A penalty for leaving the reference at each token of the answer, and the score at the last one (mask: 1 on the answer's tokens)."""
    rewards = -beta * (logp - logp_ref) * mask
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.95):      # (B, R) x 3 -> (B, R), (B, R)
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}.

    After the last token of an answer there is nothing more to expect: V = 0 there, whatever the value model says about padding.
    """
    values, advantages = values * mask, torch.zeros_like(rewards)
    running = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], next_value = running, values[:, t]
    return advantages, advantages + values


def masked_mean(x, mask):
    """Mean over the answers' tokens, never over padding or prompts."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the answers' tokens: the step size no longer depends on the scale of the rewards."""
    mean = masked_mean(x, mask)
    return (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8) * mask


def policy_loss(logp_new, logp_old, advantages, mask, clip=0.2):
    """The clipped surrogate (PPO, eq. 7): once a token is `clip` more (or less) likely than in the rollout, pushing further gains nothing."""
    ratio = (logp_new - logp_old).clamp(-20, 20).exp()
    return -masked_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def value_loss(values_new, values_old, returns, mask, clip=0.2):
    """Squared error; a value that moved more than `clip` since the rollout is taken at the clip if that is worse (OpenAI baselines)."""
    clipped = values_old + (values_new - values_old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values_new - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_estimates(logp, logp_ref):
    """Two unbiased estimators of KL(policy || reference) from the policy's own samples (Schulman 2020): k1 is the log-ratio, negative for many
    a sample; k3 adds a term of mean 0 that makes it never negative."""
    return logp - logp_ref, (logp_ref - logp).exp() - 1 - (logp_ref - logp)


def exact_kl(logits, logits_ref):                                 # (..., V) x 2 -> (...)
    """KL(policy || reference) of the next token, summed over the whole vocabulary."""
    logp, logp_ref = logits.log_softmax(-1), logits_ref.log_softmax(-1)
    return (logp.exp() * (logp - logp_ref)).sum(-1)


# ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def rollout(policy, reference, value, tokenizer, questions, score_answers, beta, max_new, missing_eos, minibatch, seed, gamma=1.0, lam=0.95):
    """The policy answers; reference, reward and value model judge -> a dict of all that the update needs. (B, R): mask, logp, logp_ref,
    values, rewards, advantages, returns, entropy. (B, T): tokens, segments. (B,): scores, ended, kl (summed over the answer). `parts`: minibatches.

    `score_answers(questions, replies)` -> scores (B,). An answer that does not end gets `missing_eos` instead: every answer that the
    reward model has read was closed by an end-of-text, and that is where its score is read.
    """
    began = time.perf_counter()
    prompts = [data.chat_prompt(tokenizer, q) for q in questions]
    # temperature 1, no top-k, no top-p: any other sampling is not what is scored below, the usual cause of a "negative KL"
    replies = generate(policy, prompts, max_new, tokenizer, seed=seed)
    if not all(replies):
        raise SystemExit("the policy has diverged and gives no answers: lower --lr")
    sampled = time.perf_counter()
    device = policy.tokens.weight.device
    tokens = data.pad_rows([p + r for p, r in zip(prompts, replies)], tokenizer.pad).to(device)
    mask = data.pad_rows([[0] * (len(p) - 1) + [1] * len(r) for p, r in zip(prompts, replies)], 0).to(device).float()
    segments = (tokens != tokenizer.pad).long()
    ended = torch.tensor([r[-1] == tokenizer.eot for r in replies], device=device)
    scores = torch.where(ended, score_answers(questions, replies).to(device), missing_eos)

    # Old log-probs are scored in the minibatches of the update: in another batch size a matrix product may round differently.
    parts = torch.from_numpy(np.random.default_rng([*seed, 4]).permutation(len(tokens))).to(device).split(minibatch)
    logp, logp_ref, values, kl, entropy = (torch.zeros_like(mask) for _ in range(5))
    for i in parts:
        logits, logits_ref = policy(tokens[i], segments[i])[:, :-1], reference(tokens[i], segments[i])[:, :-1]
        chosen = tokens[i, 1:, None]
        logp[i], logp_ref[i] = (x.log_softmax(-1).gather(-1, chosen).squeeze(-1) for x in (logits, logits_ref))
        values[i] = value(tokens[i], segments[i])[:, :-1]
        kl[i] = exact_kl(logits, logits_ref)
        entropy[i] = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    rewards = token_rewards(logp, logp_ref, mask, scores, beta)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    return dict(tokens=tokens, segments=segments, mask=mask, parts=parts, logp=logp, logp_ref=logp_ref, values=values, rewards=rewards,
                advantages=advantages, returns=returns, scores=scores, ended=ended, entropy=entropy * mask, replies=replies,
                kl=(kl * mask).sum(1).cpu(),                      # .cpu() waits for a GPU, so that the seconds below are honest
                seconds={"rollout": sampled - began, "score": time.perf_counter() - sampled})


def update(policy, value, optimizer, batch, epochs, clip, max_approx_kl=0.2):
    """`epochs` passes over one rollout, in minibatches that stay the same. Returns mean figures."""
    advantages, stats = whiten(batch["advantages"], batch["mask"]), []
    for step, i in enumerate(batch["parts"] * epochs):
        mask, logp_old = batch["mask"][i], batch["logp"][i]
        logp_new = token_logprobs(policy, batch["tokens"][i], batch["segments"][i])
        values_new = value(batch["tokens"][i], batch["segments"][i])[:, :-1]
        logratio = (logp_new - logp_old).detach() * mask
        # Old and new scores have to be one computation: this catches dropout, another mask or batch, a policy that has moved. It does not see
        # the sampler: that tokens are drawn from the distribution that is scored is tested in tests/test_ppo.py
        if step == 0 and not logratio.abs().max() <= 1e-4:
            raise AssertionError(f"the ratio should be 1 before the first step, but a log-ratio is {logratio.abs().max():.2g}")
        # samples are the old policy's, so this is k3 of KL(old || new): ratio - 1 - log ratio
        approx_kl = masked_mean(kl_estimates(logp_old * mask, logp_new.detach() * mask)[1], mask).item()
        if approx_kl > max_approx_kl:                             # this rollout no longer describes the policy
            break
        loss_p = policy_loss(logp_new, logp_old, advantages[i], mask, clip)
        loss_v = value_loss(values_new, batch["values"][i], batch["returns"][i], mask, clip)
        if not torch.isfinite(loss_p + loss_v):
            raise SystemExit("the loss is no longer a number: lower --lr and --value-lr")
        optimizer.zero_grad()
        (loss_p + loss_v).backward()                              # two networks that share nothing: one backward serves both
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(value.parameters(), 1.0)
        optimizer.step()
        clipped = masked_mean(((logratio.exp() - 1).abs() > clip).float(), mask).item()
        stats.append({"policy_loss": loss_p.item(), "value_loss": loss_v.item(), "approx_kl": approx_kl, "clipfrac": clipped})
    return {k: float(np.mean([s[k] for s in stats])) for k in stats[0]} | {"optimizer_steps": len(stats)}      # fewer than usual: stopped early


def train(policy, reference, value, tokenizer, questions_at, score_answers, args, missing_eos, gold=None, desc="ppo", progress=None, settings=None):
    """PPO in place. `questions_at(step)` -> the questions of an iteration; `gold(questions, texts)` -> utilities for the log alone."""
    optimizer = torch.optim.Adam([{"params": policy.parameters(), "lr": args.lr}, {"params": value.parameters(), "lr": args.value_lr}], eps=1e-5)
    parts = {"policy": policy, "value": value, "optimizer": optimizer}
    start, history = load_progress(progress, settings, **parts) if progress and args.resume else (0, [])
    bar = tqdm(range(start, args.iterations), initial=start, total=args.iterations, unit="iter", desc=desc)
    for step in bar:
        for group, lr in zip(optimizer.param_groups, (args.lr if step >= args.value_warmup else 0.0, args.value_lr)):
            group["lr"] = lr * (1 - step / args.iterations)
        questions = questions_at(step)
        batch = rollout(policy, reference, value, tokenizer, questions, score_answers, args.beta, args.max_new, missing_eos,
                        args.minibatch, (args.seed, 41, step))
        began = time.perf_counter()
        figures = update(policy, value, optimizer, batch, args.epochs, args.clip)
        seconds = batch["seconds"] | {"update": time.perf_counter() - began}
        mask, lengths = batch["mask"], batch["mask"].sum(1)
        explained = 1 - (masked_mean((batch["returns"] - batch["values"]) ** 2, mask)
                         / masked_mean((batch["returns"] - masked_mean(batch["returns"], mask)) ** 2, mask)).item()
        k1, k3 = kl_estimates(batch["logp"] * mask, batch["logp_ref"] * mask)
        row = {"iteration": step + 1, "score": batch["scores"].mean().item(), "kl_nats": batch["kl"].mean().item(),
               "kl_k1_nats": (k1 * mask).sum(1).mean().item(), "kl_k3_nats": (k3 * mask).sum(1).mean().item(),
               "reward_after_kl": batch["rewards"].sum(1).mean().item(), "entropy_nats_per_token": masked_mean(batch["entropy"], mask).item(),
               "length_tokens": lengths.mean().item(), "eos_rate": batch["ended"].float().mean().item(),
               "explained_variance": explained, "beta": args.beta,
               **figures, **{f"seconds_{part}": s for part, s in seconds.items()}}
        if gold:
            row["gold_utility"] = float(np.mean(gold(questions, [data.decode_reply(tokenizer, r) for r in batch["replies"]])))
        history.append(row)
        bar.set_postfix({k.split("_")[0]: f"{row[k]:.2f}" for k in ("score", "kl_nats", "gold_utility") if k in row})
        if progress and (step + 1) % 10 == 0 and step + 1 < args.iterations:
            save_progress(progress, step + 1, settings, history, **parts)
    return history


def check_warmup(args):
    """Stop before any work is done if the policy would learn in no iteration at all."""
    if args.value_warmup >= args.iterations:
        raise SystemExit(f"--value-warmup {args.value_warmup} leaves the policy none of the {args.iterations} iterations: raise --iterations")


def value_from(reward_model, scale):
    """A value model that starts as the reward model, on the normalised scale (Stiennon et al. 2020: separate from the policy)."""
    value = ScalarModel(copy_of(reward_model.gpt)).to(reward_model.scalar.weight.device)
    with torch.no_grad():
        value.scalar.weight.copy_(reward_model.scalar.weight / scale["std"])
        value.scalar.bias.copy_((reward_model.scalar.bias - scale["mean"]) / scale["std"])
    return value


def reward_model_scorer(reward_model, scale, tokenizer):
    """`score_answers` by a reward model, on the scale that reward.normalise has given it."""
    def score_answers(questions, replies):
        sequences = [data.chat_prompt(tokenizer, q) + r for q, r in zip(questions, replies)]
        with torch.no_grad():
            return (reward_stage.score(reward_model, tokenizer, sequences) - scale["mean"]) / scale["std"]
    return score_answers


def own_reward(where):
    """--reward file.py:function -> the function (question, answer) -> a number."""
    path, _, name = where.rpartition(":")
    if not path or not Path(path).is_file():
        raise SystemExit(f"--reward {where}: say rm, gold, or file.py:function, where file.py defines function(question, answer) -> a number")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise SystemExit(f"--reward: {path} defines no function {name}")
    return function


def prompts_that_fit(prompts, tokenizer, room):
    """The prompts of at most `room` tokens, role tokens included: one that is longer would cut short every answer in its batch."""
    fit = [q for q in prompts if len(data.chat_prompt(tokenizer, q)) <= room]
    if not fit:
        raise SystemExit(f"no prompt fits: the context leaves {room} tokens beside an answer; lower --max-new, or pre-train with a larger --context")
    if len(fit) < len(prompts):
        print(f"{len(prompts) - len(fit)} of {len(prompts)} prompts left out: longer than {room} tokens")
    return fit


def function_scorer(function, tokenizer, reference_answers):
    """`score_answers` by a function (question, answer) -> number, and the score of an unfinished answer. The scale is that of a reward model:
    reference answers [(question, answer)] have mean 0 and standard deviation 1, and what does not end scores less than all of them."""
    def values(conversations):
        numbers = [function(q, a) for q, a in conversations]
        for (q, a), number in zip(conversations, numbers):
            if not isinstance(number, Real) or not math.isfinite(number):
                raise SystemExit(f"--reward: the function should return a number, but for {q!r}, {a!r} it returned {number!r}")
        return torch.tensor(numbers, dtype=torch.float32)

    raw = values(reference_answers)
    mean, std = raw.mean(), raw.std(correction=0)
    std = std if std > 1e-6 else torch.tensor(1.0)                # all alike, for example a reward that is earned seldom: keep its own scale

    def score_answers(questions, replies):
        return (values([(q, data.decode_reply(tokenizer, r)) for q, r in zip(questions, replies)]) - mean) / std
    return score_answers, ((raw.min() - mean) / std).item() - 1


# ------------------------------------------------------------------------------------------------------------------
# Evaluation, by the gold judge

def compare(utilities, others, seed=0):
    """Win rate of answers over others to the same questions, by their gold utilities, ties half, with a 95% bootstrap interval over the questions."""
    wins = 0.5 + 0.5 * np.sign(np.array(utilities) - np.array(others))
    means = wins[np.random.default_rng(seed).integers(0, len(wins), (1000, len(wins)))].mean(1)
    return {"win_rate": wins.mean(), "win_rate_low": np.quantile(means, 0.025), "win_rate_high": np.quantile(means, 0.975)}


def fingerprint(world, questions, answers, taste):
    """What kind of answers these are: gold utility, shares correct (facts and how-to take turns) and polite, needless sentences and words."""
    kinds = [[data.classify(s) for s in data.sentences_of(a)] for a in answers]
    right = [data.is_correct(world, q, a) for q, a in zip(questions, answers)]
    figures = {"gold": [data.utility(world, q, a, taste) for q, a in zip(questions, answers)], "correct": right, "facts_correct": right[1::2],
               "howto_correct": right[::2], "polite": ["polite" in k for k in kinds],
               "needless": [len(k) - ("polite" in k) - ("core" in k) for k in kinds], "words": [len(a.split()) for a in answers]}
    return {name: float(np.mean(values)) for name, values in figures.items()}


def evaluate(policy, reference, tokenizer, world, n, seed, taste):
    """Gold figures on n held-out questions, one sample at temperature 1 each (and the reference's likeliest answer)."""
    questions = reward_stage.preference_prompts(world, "test", n)
    answers = {"sft": answer(reference, tokenizer, questions, seed=(seed, 42)), "sft_greedy": answer(reference, tokenizer, questions, temperature=0),
               "ppo": answer(policy, tokenizer, questions, seed=(seed, 43)), "best": [data.best_answer(world, q, taste) for q in questions]}
    figures, gold = {}, {name: [data.utility(world, q, a, taste) for q, a in zip(questions, texts)] for name, texts in answers.items()}
    print(f"\n{n} held-out questions{'gold':>9}{'correct':>9}{'facts':>8}{'how-to':>8}{'polite':>8}{'needless':>10}{'words':>7}")
    for name, texts in answers.items():
        row = fingerprint(world, questions, texts, taste)
        figures |= {f"{k}_{name}": v for k, v in row.items()}
        formats = ("10.2f", "9.3f", "8.3f", "8.3f", "8.3f", "10.2f", "7.1f")
        print(f"  {name.replace('_', ', '):>20}" + "".join(f"{value:{f}}" for value, f in zip(row.values(), formats)))
    figures |= compare(gold["ppo"], gold["sft"]) | {"win_rate_over_greedy": compare(gold["ppo"], gold["sft_greedy"])["win_rate"]}
    figures["gap_closed"] = (figures["gold_ppo"] - figures["gold_sft"]) / max(figures["gold_best"] - figures["gold_sft"], 1e-9)
    return {k: float(v) for k, v in figures.items()}, list(zip(questions, answers["sft"], answers["ppo"]))


def tilt(scores, beta):                                           # (Q, N) -> KL, E[score], effective samples, each (Q,)
    """The best policy there can be at this beta, p*(y) ~ p_ref(y) exp(score(y) / beta), made from N samples of the reference to each of Q prompts.

    w ~ exp(score / beta); KL(p* || p_ref) = sum w ln(N w); E[score] = sum w score; 1 / sum w^2 samples still count.
    """
    w = torch.softmax(scores / beta, -1)
    return (w * (len(scores[0]) * w).clamp(min=1e-30).log()).sum(-1), (w * scores).sum(-1), 1 / (w ** 2).sum(-1)


def measure(policy, reference, base, tokenizer, world, reward_model, scale, taste, n_prompts, n, out, seed):
    """PPO against the exact frontier, and the ladder of win rates. No training: everything is sampled from the finished models."""
    questions = reward_stage.preference_prompts(world, "test", n_prompts)
    texts, scores, gold = reward_stage.reference_samples(reference, tokenizer, world, questions, n, (seed, 44), reward_model, scale, taste)
    scorer = reward_model_scorer(reward_model, scale, tokenizer)
    batches = [rollout(policy, reference, reward_model, tokenizer, questions, scorer, 0.0, MAX_NEW, scale["lowest"] - 1, 64, (seed, 45, i))
               for i in range(8)]                                 # the reward model in the value model's place: its values are not used
    kl, score = (torch.stack([b[name] for b in batches]).mean().item() for name in ("kl", "scores"))

    # One beta for all prompts, since that is how a policy with a given mean KL gets the highest mean score
    rows, scores = [], torch.tensor(scores, dtype=torch.float64)
    for beta in np.geomspace(5, 0.02, 80):
        kls, tilted, effective = tilt(scores, beta)
        rows.append({"beta": beta, "kl_nats": kls.mean().item(), "score": tilted.mean().item(), "effective_samples": effective.quantile(0.1).item(),
                     "gold_utility": (torch.softmax(scores / beta, -1) * torch.tensor(gold)).sum(-1).mean().item()})
    reliable = [r for r in rows if r["effective_samples"] >= 10]
    start, best = scores.mean().item(), float(np.interp(kl, [r["kl_nats"] for r in reliable], [r["score"] for r in reliable]))
    figures = {"kl": kl, "score": score, "score_reference": start, "score_frontier": best, "distance": (best - score) / (best - start)}
    print(f"\n{len(questions)} held-out prompts, {n} samples of the reference each")
    print(f"{'beta':>8}{'KL':>8}{'score':>8}{'gold':>8}{'effective samples':>19}")
    for r in rows[::8]:
        print("".join(f"{r[k]:8.3f}" for k in ("beta", "kl_nats", "score", "gold_utility")) + f"{r['effective_samples']:19.1f}"
              + ("" if r in reliable else "  too few"))
    if kl > reliable[-1]["kl_nats"]:
        print(f"PPO's KL of {kl:.2f} is beyond what {n} samples can tell: the frontier's score at KL {reliable[-1]['kl_nats']:.2f} is taken")
    print(f"PPO: KL {kl:.3f}, score {score:.3f}; the frontier there {best:.3f}, the reference {start:.3f}: distance {figures['distance']:.3f}")

    bare = generate(base, [[tokenizer.eot, *tokenizer.encode(" " + q)] for q in questions], 24, tokenizer, seed=(seed, 46))
    ladder = {"base": [data.decode_reply(tokenizer, r) for r in bare], "sft": [t[-1] for t in texts],
              "sft_greedy": answer(reference, tokenizer, questions, temperature=0),
              "best_of_16": [t[int(s[:16].argmax())] for t, s in zip(texts, scores)], "ppo": answer(policy, tokenizer, questions, seed=(seed, 47))}
    worth = {name: [data.utility(world, q, a, taste) for q, a in zip(questions, answers)] for name, answers in ladder.items()}
    print(f"\n{'':14}{'gold':>8}{'win rate over SFT, 95% interval':>34}")
    for name, u in worth.items():
        won = compare(u, worth["sft"])
        figures |= {f"gold_{name}": float(np.mean(u)), **{f"{k}_{name}": float(v) for k, v in won.items()}}
        print(f"{name.replace('_', ' '):14}{np.mean(u):8.2f}{won['win_rate']:14.3f}  [{won['win_rate_low']:.3f}, {won['win_rate_high']:.3f}]")
    write_results(out, "ppo_measure", rows, figures)


def show_rollout(batch, tokenizer, logp_new):
    """The first answer of a rollout, token by token; the ratio is the one after one update on this rollout."""
    print(f"{'token':>14} {'logp':>8} {'logp_ref':>9} {'KL term':>8} {'reward':>8} {'value':>8} {'advantage':>10} {'ratio after':>12}")
    for t in batch["mask"][0].nonzero().flatten().tolist():
        logp, ref, reward, value, adv = (batch[k][0, t].item() for k in ("logp", "logp_ref", "rewards", "values", "advantages"))
        ratio = (logp_new[0, t] - batch["logp"][0, t]).exp().item()
        token = tokenizer.decode([batch["tokens"][0, t + 1].item()])
        print(f"{token!r:>14} {logp:8.3f} {ref:9.3f} {logp - ref:8.3f} {reward:8.3f} {value:8.3f} {adv:10.3f} {ratio:12.3f}")


def main(argv=None):
    p = argparse.ArgumentParser(description="PPO against the reward model, with a KL penalty.")
    # how far the policy may drift
    p.add_argument("--beta", type=float, default=0.1, help="reward lost per nat of KL from the reference")
    # rollouts
    p.add_argument("--iterations", type=positive, default=40, help="rollouts")
    p.add_argument("--batch-size", type=positive, default=128, help="answers a rollout")
    p.add_argument("--max-new", type=positive, default=MAX_NEW, help="longest answer of a rollout, in tokens; the final tables allow 56")
    p.add_argument("--reward", default="rm", help="who scores: rm (the reward model), gold (the gold judge itself, for teaching) or file.py:function")
    p.add_argument("--prompts", help="a file of prompts, for a model without a world; default: the world's questions")
    # the update
    p.add_argument("--epochs", type=positive, default=4, help="passes over a rollout")
    p.add_argument("--minibatch", type=positive, default=64, help="answers an optimizer step")
    p.add_argument("--clip", type=float, default=0.2, help="how far the ratio, and the value, may move in one update")
    p.add_argument("--lr", type=float, default=1.5e-4, help="peak learning rate of the policy")
    p.add_argument("--value-lr", type=float, default=5e-4, help="peak learning rate of the value model")
    p.add_argument("--value-warmup", type=int, default=0, help="iterations in which the value model alone learns")
    # where things go
    p.add_argument("--init", help="the policy and its reference; default: OUT/sft.pt")
    p.add_argument("--reward-model", help="default: OUT/reward.pt")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of prompts, samples and data order")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    p.add_argument("--eval-prompts", type=positive, default=1000, help="held-out questions of the final table")
    p.add_argument("--show", action="store_true", help="print one rollout token by token and stop")
    p.add_argument("--measure", action="store_true", help="no training: measure OUT/ppo.pt against the exact frontier, and the ladder of win rates")
    args = p.parse_args(argv)
    check_warmup(args)
    device, out = pick_device(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    if args.prompts and (args.measure or args.reward == "gold"):
        raise SystemExit("--measure and --reward gold ask the world's gold judge, which knows nothing about --prompts of your own: leave those out")
    policy, tokenizer, checkpoint = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    reference, world = copy_of(policy), None if args.prompts else data.world_of(checkpoint)
    pool = data.read_prompts(args.prompts) if args.prompts else reward_stage.preference_prompts(world, "train", 4000)
    pool = prompts_that_fit(pool, tokenizer, policy.config.context - args.max_new)

    # Who scores, and where the value model starts
    taste = "polite"
    if args.reward == "rm" or args.measure:
        reward_model, scale, taste = reward_stage.load_reward(args.reward_model or out / "reward.pt", tokenizer, device)
        score_answers = reward_model_scorer(reward_model, scale, tokenizer)
        missing_eos = scale["lowest"] - 1                         # worse than any finished answer of the reference
        value = value_from(reward_model, scale)
    else:
        function = own_reward(args.reward) if args.reward != "gold" else lambda q, a: data.utility(world, q, a)
        answered = zip(pool[:256], answer(reference, tokenizer, pool[:256], args.max_new, seed=(args.seed, 48)))
        score_answers, missing_eos = function_scorer(function, tokenizer, list(answered))
        value = ScalarModel(copy_of(policy)).to(device)
    if args.measure:
        ppo, base = load_gpt(out / "ppo.pt", "ppo.py", device)[0], load_gpt(out / "pretrain.pt", "pretrain.py", device)[0]
        return measure(ppo, reference, base, tokenizer, world, reward_model, scale, taste or "polite", 400, 256, out, args.seed)

    def questions_at(step):
        return [pool[i] for i in np.random.default_rng([args.seed, 5, step]).integers(0, len(pool), args.batch_size)]

    def gold(questions, texts):
        return [data.utility(world, q, t, taste) for q, t in zip(questions, texts)]

    if args.show:
        batch = rollout(policy, reference, value, tokenizer, questions_at(0), score_answers, args.beta, args.max_new, missing_eos,
                        args.minibatch, (args.seed, 41, 0))
        optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=args.lr, eps=1e-5)
        update(policy, value, optimizer, batch, args.epochs, args.clip)
        with torch.no_grad():
            show_rollout(batch, tokenizer, token_logprobs(policy, batch["tokens"], batch["segments"]))
        return
    print(f"{device}, {args.iterations} iterations of {args.batch_size} answers, beta {args.beta}, reward by {args.reward}")
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out", "show", "measure", "eval_prompts")}
    history = train(policy, reference, value, tokenizer, questions_at, score_answers, args, missing_eos, gold if world and taste else None,
                    progress=forget_progress(out / "ppo.resume.pt", args.resume), settings=settings)
    save(out / "ppo.pt", stage="ppo", config=vars(policy.config), model=policy.state_dict(), tokenizer=tokenizer.state(),
         world_seed=checkpoint.get("world_seed"))
    (out / "ppo.resume.pt").unlink(missing_ok=True)

    last = history[-1]
    figures = {"kl": last["kl_nats"], "score": last["score"], "length": last["length_tokens"], "eos_rate": last["eos_rate"]}
    seconds = {part: float(np.mean([row[f"seconds_{part}"] for row in history])) for part in ("rollout", "score", "update")}
    if world:
        more, samples = evaluate(policy, reference, tokenizer, world, args.eval_prompts, args.seed, taste or "polite")
        figures |= more
        print(f"win rate over SFT {figures['win_rate']:.3f} [{figures['win_rate_low']:.3f}, {figures['win_rate_high']:.3f}]   "
              f"over greedy SFT {figures['win_rate_over_greedy']:.3f}   gap to the best closed {figures['gap_closed']:.3f}")
    else:
        samples = list(zip(pool[:3], answer(reference, tokenizer, pool[:3]), answer(policy, tokenizer, pool[:3])))
    write_results(out, "ppo", history, figures | {f"seconds_{part}": s for part, s in seconds.items()})
    print(f"last rollout: KL {figures['kl']:.2f}, length {figures['length']:.1f}, EOS rate {figures['eos_rate']:.3f}   "
          "seconds an iteration: " + ", ".join(f"{part} {s:.2f}" for part, s in seconds.items()))
    for question, before, after in samples[:3]:
        print(f"\n{question}\n  before: {before}\n  after:  {after}")
    print(f"\nwrote {out / 'ppo.pt'}; next: python rlaif.py" + ("" if world else " --prompts FILE --red-team-file FILE --preferences FILE"))


if __name__ == "__main__":
    main()
