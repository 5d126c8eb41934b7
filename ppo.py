"""Stage 4. Improve the assistant by trial and error against the reward model, on a leash.

    reward[t] = -beta * (logp_policy[t] - logp_ref[t]),   + score at the last token           # Ziegler et al. 2019; Stiennon et al. 2020
    loss = -min(ratio * A, clip(ratio, 1-eps, 1+eps) * A),   ratio = exp(logp_new - logp_old)  # PPO, Schulman et al. 2017, eq. 7

Each iteration: the policy answers a batch of questions (rollout), the reward model scores the answers, a value model says what
score it had expected at each token, and the policy makes tokens that went better than expected more likely. beta is the
leash: every nat by which the policy leaves the SFT model ("reference") costs reward.

    python ppo.py            reads out/sft.pt and out/reward.pt, writes out/ppo.pt
    python ppo.py --show     one answer token by token, with the ratios after one update; nothing is written

Watch: the score rises; the gold utility, which nothing here is trained on, should rise with it. KL says what it cost. Length and
the share of answers that end (EOS) are the first to show that a policy has found a hole in its reward model.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import reward as reward_stage
from model import ScalarModel, answer, copy_of, generate, load_gpt, load_progress, pick_device, save, save_progress, token_logprobs, write_results

# Letters: B answers, T tokens of prompt and answer, R = T - 1 positions that choose a token: what is computed at [:, t] belongs to the
# choice of tokens[:, t+1], and a mask (B, R) picks the choices that make up the answer.


def token_rewards(logp, logp_ref, mask, scores, beta):           # (B, R) x 3, (B,) -> (B, R)
    """A fine for leaving the reference at each token of the answer, and the score at the last one (mask: 1 on the answer's tokens)."""
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
    """Two estimators of KL(policy || reference) from the policy's own samples (Schulman 2020): k1 is unbiased, k3 never negative."""
    return logp - logp_ref, (logp_ref - logp).exp() - 1 - (logp_ref - logp)


def exact_kl(logits, logits_ref):                                 # (..., V) x 2 -> (...)
    """KL(policy || reference) of the next token, summed over the whole vocabulary."""
    logp, logp_ref = logits.log_softmax(-1), logits_ref.log_softmax(-1)
    return (logp.exp() * (logp - logp_ref)).sum(-1)


# ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def rollout(policy, reference, value, tokenizer, questions, score_answers, beta, max_new, missing_eos, seed, gamma=1.0, lam=0.95):
    """The policy answers, everybody comments -> a dict of all that the update needs: tensors (B, R) but for what the names say.

    `score_answers(questions, replies)` -> scores (B,). An answer that does not end gets `missing_eos` instead, since the
    reward model has never seen an unfinished one.
    """
    prompts = [data.chat_prompt(tokenizer, q) for q in questions]
    replies = generate(policy, prompts, max_new, tokenizer, seed=seed)
    device = policy.tokens.weight.device
    tokens = data.pad_rows([p + r for p, r in zip(prompts, replies)], tokenizer.pad).to(device)
    mask = data.pad_rows([[0] * (len(p) - 1) + [1] * len(r) for p, r in zip(prompts, replies)], 0).to(device).float()
    segments = (tokens != tokenizer.pad).long()
    ended = torch.tensor([r[-1] == tokenizer.eot for r in replies], device=device)
    scores = torch.where(ended, score_answers(questions, replies).to(device), missing_eos)

    logits, logits_ref = policy(tokens, segments)[:, :-1], reference(tokens, segments)[:, :-1]
    pick = lambda x: x.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)                         # (B, R)
    logp, logp_ref = pick(logits), pick(logits_ref)
    values = value(tokens, segments)[:, :-1]
    rewards = token_rewards(logp, logp_ref, mask, scores, beta)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    return dict(tokens=tokens, segments=segments, mask=mask, logp=logp, logp_ref=logp_ref, values=values, rewards=rewards, advantages=advantages,
                returns=returns, scores=scores, ended=ended, kl=(exact_kl(logits, logits_ref) * mask).sum(1),
                entropy=-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1) * mask, replies=replies)


def update(policy, value, optimizer, batch, epochs, minibatch, clip, seed, max_approx_kl=0.2):
    """`epochs` passes over one rollout, in minibatches that stay the same. Returns mean figures."""
    device = batch["tokens"].device
    parts = torch.from_numpy(np.random.default_rng([*seed, 4]).permutation(len(batch["tokens"]))).to(device).split(minibatch)
    advantages, stats = whiten(batch["advantages"], batch["mask"]), []

    for epoch in range(epochs):
        for n, i in enumerate(parts):
            mask, logp_old = batch["mask"][i], batch["logp"][i]
            logp_new = token_logprobs(policy, batch["tokens"][i], batch["segments"][i])
            values_new = value(batch["tokens"][i], batch["segments"][i])[:, :-1]
            logratio = (logp_new - logp_old).detach() * mask
            if epoch == n == 0 and logratio.abs().max() > 1e-4:   # most PPO bugs ever reported show here: padding, positions, temperature, dropout
                raise AssertionError(f"the ratio should be 1 before the first step, but a log-ratio is {logratio.abs().max():.2g}")
            # samples are the old policy's, so this is k3 of KL(old || new): ratio - 1 - log ratio
            approx_kl = masked_mean(kl_estimates(-logratio, torch.zeros_like(logratio))[1], mask).item()
            if approx_kl > max_approx_kl:                         # this rollout no longer describes the policy
                return {k: float(np.mean([s[k] for s in stats])) for k in stats[0]}
            loss_p = policy_loss(logp_new, logp_old, advantages[i], mask, clip)
            loss_v = value_loss(values_new, batch["values"][i], batch["returns"][i], mask, clip)
            optimizer.zero_grad()
            (loss_p + loss_v).backward()                          # two networks that share nothing: one backward serves both
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            torch.nn.utils.clip_grad_norm_(value.parameters(), 1.0)
            optimizer.step()
            clipped = masked_mean(((logratio.exp() - 1).abs() > clip).float(), mask).item()
            stats.append({"policy_loss": loss_p.item(), "value_loss": loss_v.item(), "approx_kl": approx_kl, "clipfrac": clipped})
    return {k: float(np.mean([s[k] for s in stats])) for k in stats[0]}


def train(policy, reference, value, tokenizer, questions_at, score_answers, args, missing_eos, gold=None, desc="ppo", progress=None, settings=None):
    """PPO in place. `questions_at(step)` -> the questions of an iteration; `gold(questions, texts)` -> utilities for the log alone."""
    optimizer = torch.optim.Adam([{"params": policy.parameters(), "lr": args.lr}, {"params": value.parameters(), "lr": args.value_lr}], eps=1e-5)
    parts = {"policy": policy, "value": value, "optimizer": optimizer}
    start, history = load_progress(progress, settings, **parts) if progress and args.resume else (0, [])
    bar = tqdm(range(start, args.iterations), initial=start, total=args.iterations, unit="iter", desc=desc)
    for step in bar:
        for group, lr in zip(optimizer.param_groups, (args.lr, args.value_lr)):
            group["lr"] = lr * (1 - step / args.iterations)
        questions = questions_at(step)
        batch = rollout(policy, reference, value, tokenizer, questions, score_answers, args.beta, args.max_new, missing_eos, (args.seed, 41, step))
        figures = update(policy, value, optimizer, batch, args.epochs, args.minibatch, args.clip, (args.seed, step))
        mask, lengths = batch["mask"], batch["mask"].sum(1)
        explained = 1 - (masked_mean((batch["returns"] - batch["values"]) ** 2, mask)
                         / masked_mean((batch["returns"] - masked_mean(batch["returns"], mask)) ** 2, mask)).item()
        k1, k3 = kl_estimates(batch["logp"], batch["logp_ref"])
        row = {"iteration": step + 1, "score": batch["scores"].mean().item(), "kl_nats": batch["kl"].mean().item(),
               "kl_k1_nats": (k1 * mask).sum(1).mean().item(), "kl_k3_nats": (k3 * mask).sum(1).mean().item(),
               "reward_after_kl": batch["rewards"].sum(1).mean().item(), "entropy_nats_per_token": masked_mean(batch["entropy"], mask).item(),
               "length_tokens": lengths.mean().item(), "eos_rate": batch["ended"].float().mean().item(), "explained_variance": explained, **figures}
        if gold:
            row["gold_utility"] = float(np.mean(gold(questions, [data.decode_reply(tokenizer, r) for r in batch["replies"]])))
        history.append(row)
        bar.set_postfix({k.split("_")[0]: f"{row[k]:.2f}" for k in ("score", "kl_nats", "gold_utility") if k in row})
        if progress and (step + 1) % 10 == 0 and step + 1 < args.iterations:
            save_progress(progress, step + 1, settings, history, **parts)
    return history


def value_from(reward_model, scale):
    """A value model that starts as the reward model, on the normalised scale (Stiennon et al. 2020: separate from the policy)."""
    value = ScalarModel(copy_of(reward_model.gpt)).to(reward_model.scalar.weight.device)
    with torch.no_grad():
        value.scalar.weight.copy_(reward_model.scalar.weight / scale["std"])
        value.scalar.bias.copy_((reward_model.scalar.bias - scale["mean"]) / scale["std"])
    return value


def reward_model_scorer(reward_model, scale, tokenizer):
    """`score_answers` by a reward model, on the scale on which the reference samples have mean 0 and standard deviation 1."""
    def score_answers(questions, replies):
        sequences = [data.chat_prompt(tokenizer, q) + r for q, r in zip(questions, replies)]
        with torch.no_grad():
            return (reward_stage.score(reward_model, tokenizer, sequences) - scale["mean"]) / scale["std"]
    return score_answers


def compare(world, questions, answers, other_answers, seed=0):
    """Win rate of `answers` over `other_answers` by the gold utility, ties half, with a 95% bootstrap interval over the questions."""
    wins = np.array([0.5 + 0.5 * np.sign(data.utility(world, q, a) - data.utility(world, q, b)) for q, a, b in zip(questions, answers, other_answers)])
    means = wins[np.random.default_rng(seed).integers(0, len(wins), (1000, len(wins)))].mean(1)
    return {"win_rate": wins.mean(), "win_rate_low": np.quantile(means, 0.025), "win_rate_high": np.quantile(means, 0.975)}


def evaluate(policy, reference, tokenizer, world, n, seed):
    """Gold figures on n held-out questions, one sample at temperature 1 each."""
    questions = reward_stage.preference_prompts(world, "test", n)
    sft, greedy, ppo = (answer(reference, tokenizer, questions, seed=(seed, 42)), answer(reference, tokenizer, questions, temperature=0),
                        answer(policy, tokenizer, questions, seed=(seed, 43)))

    def gold(answers):
        return np.mean([data.utility(world, q, a) for q, a in zip(questions, answers)])

    def correct(answers, part=slice(None)):                       # how-to and facts take turns
        return np.mean([data.is_correct(world, q, a) for q, a in list(zip(questions, answers))[part]])

    howto, facts = slice(0, None, 2), slice(1, None, 2)
    figures = {"gold_sft": gold(sft), "gold_sft_greedy": gold(greedy), "gold_ppo": gold(ppo),
               "gold_best": gold([data.best_answer(world, q) for q in questions]),
               **compare(world, questions, ppo, sft), "win_rate_over_greedy": compare(world, questions, ppo, greedy)["win_rate"],
               "correct_sft": correct(sft), "correct_ppo": correct(ppo), "facts_correct_sft": correct(sft, facts), "facts_correct_ppo": correct(ppo, facts),
               "howto_correct_sft": correct(sft, howto), "howto_correct_ppo": correct(ppo, howto)}
    return {k: float(v) for k, v in figures.items()}, list(zip(questions, sft, ppo))


def show_rollout(batch, tokenizer, logp_new):
    """The first answer of a rollout, token by token; the ratio is the one after one update on this rollout."""
    print(f"{'token':>14} {'logp':>8} {'logp_ref':>9} {'KL term':>8} {'reward':>8} {'value':>8} {'advantage':>10} {'ratio after':>12}")
    for t in batch["mask"][0].nonzero().flatten().tolist():
        logp, ref, reward, value, adv = (batch[k][0, t].item() for k in ("logp", "logp_ref", "rewards", "values", "advantages"))
        ratio = (logp_new[0, t] - batch["logp"][0, t]).exp().item()
        print(f"{tokenizer.decode([batch['tokens'][0, t + 1].item()])!r:>14} {logp:8.3f} {ref:9.3f} {logp - ref:8.3f} {reward:8.3f} {value:8.3f} {adv:10.3f} {ratio:12.3f}")


def main(argv=None):
    p = argparse.ArgumentParser(description="PPO against the reward model, with a KL penalty.")
    # how far the policy may drift
    p.add_argument("--beta", type=float, default=0.15, help="reward lost per nat of KL from the reference")
    # rollouts
    p.add_argument("--iterations", type=int, default=25, help="rollouts")
    p.add_argument("--batch-size", type=int, default=128, help="answers a rollout")
    p.add_argument("--max-new", type=int, default=48, help="longest answer, in tokens")
    p.add_argument("--reward", choices=["rm", "gold"], default="rm", help="who scores: the reward model, or (for teaching) the gold judge itself")
    # the update
    p.add_argument("--epochs", type=int, default=4, help="passes over a rollout")
    p.add_argument("--minibatch", type=int, default=64, help="answers an optimizer step")
    p.add_argument("--clip", type=float, default=0.2, help="how far the ratio, and the value, may move in one update")
    p.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of the policy")
    p.add_argument("--value-lr", type=float, default=5e-4, help="peak learning rate of the value model")
    # where things go
    p.add_argument("--init", help="the policy and its reference; default: OUT/sft.pt")
    p.add_argument("--reward-model", help="default: OUT/reward.pt")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of prompts, samples and data order")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    p.add_argument("--show", action="store_true", help="print one rollout token by token and stop")
    args = p.parse_args(argv)
    device, out = pick_device(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    policy, tokenizer, checkpoint = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    reward_model, scale = reward_stage.load_reward(args.reward_model or out / "reward.pt", device)
    world = data.world_of(checkpoint)
    if reward_model.gpt.config.vocab_size != tokenizer.n_vocab:
        raise SystemExit("policy and reward model have different vocabularies: run `python reward.py` again")
    reference, value = copy_of(policy), value_from(reward_model, scale)

    pool = reward_stage.preference_prompts(world, "train", 4000)

    def questions_at(step):
        return [pool[i] for i in np.random.default_rng([args.seed, 5, step]).integers(0, len(pool), args.batch_size)]

    def gold(questions, texts):
        return [data.utility(world, q, t) for q, t in zip(questions, texts)]

    def gold_scorer(questions, replies):                          # about centred: SFT answers are worth 2
        return torch.tensor(gold(questions, [data.decode_reply(tokenizer, r) for r in replies])).float() - 2

    score_answers = reward_model_scorer(reward_model, scale, tokenizer) if args.reward == "rm" else gold_scorer
    missing_eos = scale["lowest"] - 1 if args.reward == "rm" else -5.0       # worse than any finished answer of the reference
    if args.show:
        batch = rollout(policy, reference, value, tokenizer, questions_at(0), score_answers, args.beta, args.max_new, missing_eos,
                        (args.seed, 41, 0))
        optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=args.lr, eps=1e-5)
        update(policy, value, optimizer, batch, args.epochs, args.minibatch, args.clip, (args.seed, 0))
        with torch.no_grad():
            show_rollout(batch, tokenizer, token_logprobs(policy, batch["tokens"], batch["segments"]))
        return
    print(f"{device}, {args.iterations} iterations of {args.batch_size} answers, beta {args.beta}, reward by {args.reward}")
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out", "show")}
    history = train(policy, reference, value, tokenizer, questions_at, score_answers, args, missing_eos, gold,
                    progress=out / "ppo.resume.pt", settings=settings)
    save(out / "ppo.pt", stage="ppo", config=vars(policy.config), model=policy.state_dict(), tokenizer=tokenizer.state(), world_seed=world.seed)
    (out / "ppo.resume.pt").unlink(missing_ok=True)

    figures, samples = evaluate(policy, reference, tokenizer, world, 600, args.seed)
    last = history[-1]
    figures |= {"kl": last["kl_nats"], "score": last["score"], "length": last["length_tokens"], "eos_rate": last["eos_rate"]}
    write_results(out, "ppo", history, figures)
    print(f"\nheld-out questions, gold utility: SFT {figures['gold_sft']:.2f} (greedy {figures['gold_sft_greedy']:.2f})   "
          f"PPO {figures['gold_ppo']:.2f}   best {figures['gold_best']:.2f}   KL of the last rollout {figures['kl']:.2f}")
    print(f"win rate over SFT {figures['win_rate']:.3f} [{figures['win_rate_low']:.3f}, {figures['win_rate_high']:.3f}]   "
          f"over greedy SFT {figures['win_rate_over_greedy']:.3f}")
    print(f"correct: facts {figures['facts_correct_sft']:.3f} -> {figures['facts_correct_ppo']:.3f}   "
          f"how-to {figures['howto_correct_sft']:.3f} -> {figures['howto_correct_ppo']:.3f}")
    for question, before, after in samples[:3]:
        print(f"\n{question}\n  before: {before}\n  after:  {after}")
    print(f"\nwrote {out / 'ppo.pt'}; next: python rlaif.py")


if __name__ == "__main__":
    main()
