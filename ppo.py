"""Stage 4. Improve the assistant by trial and error against the reward model, on a leash.

    reward[t] = -beta * (logp[t] - logp_ref[t]),   + the score at the answer's last token
    loss = -mean(min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)),  ratio = p_new / p_old

Rewards: Ziegler et al. 2019, Stiennon et al. 2020; loss: PPO, Schulman et al. 2017, eq. 7. Four
networks: the *policy* learns; the *reference* is a frozen copy of what it was at the start, the SFT
model; the *reward model* gives a finished answer one score; the *value model* says at each token
how much reward it still expects. Each iteration:

    1. rollout   the policy, as it is now ("old" in step 3), answers a batch of questions
    2. judge     reward: the score, minus beta per nat of divergence from the reference (the leash);
                 A, a token's advantage: how much better it went than the value model expected
    3. update    several steps on these answers: tokens with more A than the batch's mean become
                 more likely, the others less; the value model learns what to expect

    python ppo.py           reads out/sft.pt and out/reward.pt, writes out/ppo.pt

Watch: the score rises; the gold utility (u in reward.py, part of no loss) should rise too. Length
and the share of answers that end show first that a policy has found a hole in its reward model."""
import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import reward as reward_stage                              # `reward` is what a token earns
from model import (MAX_NEW, ScalarModel, answer, average_and_clip, common_flags, copy_of,
                   finish_training, generate, gentle_rates, load_gpt, mean_over_processes, my_share,
                   number, positive, processes, rank, resume, save_model, save_progress,
                   start_training)
from pretrain import replay_flags, replayer

# Letters: B answers, T tokens of prompt and answer, V vocabulary, R = T - 1 positions that choose a
# token: what stands at [:, t] belongs to the choice of tokens[:, t+1]. A mask (B, R) is 1 where
# that token is one of the answer, 0 in the prompt and in the padding (drawn at `rollout`).
MAX_APPROX_KL = 0.2               # nats per token from the policy that answered: stop the update
RATES = {"lr": (1.5e-4, 1e-5), "value_lr": (5e-4, 1e-5)}  # peaks: ours, that of published weights

def token_logprobs(model, tokens, segments=None, temperature=1.0):     # (B, T) -> (B, R)
    """log p(tokens[:, t+1]) at [:, t] under the distribution that sampling at `temperature` uses:
    logits (0, ln 3) are p = (1/4, 3/4); where token 1 comes next, this is log(0.75) = -0.29."""
    logits = model(tokens, segments)[:, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)

def token_rewards(logp, logp_ref, mask, scores, beta):     # (B, R) x 3, (B,) -> (B, R)
    """The KL penalty at each token of an answer, and the score at its last one. The penalties of an
    answer add up to beta * log(p(answer) / p_ref(answer)), whose mean is beta * KL(policy || ref).

        logp - logp_ref   1   0  -8
        mask              1   1   0     beta 0.1, score 2   ->   rewards  -0.1  2  0"""
    rewards = -beta * (logp - logp_ref) * mask
    # count 1, 2, 3 ... along the row: the largest count under the mask is at its last 1
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)   # (B,)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards

def advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.95):    # -> (B, R), (B, R)
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), from the last token back:

        delta[t]  = rewards[t] + gamma * values[t+1] - values[t]     one step's surprise
        A[t]      = delta[t] + gamma * lam * A[t+1]                  and a share of the later ones
        return[t] = A[t] + values[t]                                 what the value model learns

        rewards 0 0 1, values .5 .6 .8, lam .5  ->  delta .1 .2 .2, A .25 .3 .2, return .75 .9 1

    (Expected .5, then .6: the first was worth .1; gamma 1. Off the mask, values and A count as 0.)
    lam 1: A = all rewards to come - values[t], right on average, but noisy. lam 0: A = delta, less
    noisy, but as wrong as the value model. gamma discounts later rewards; 1: not at all."""
    # past an answer's end there is nothing to expect, whatever the value model says of padding
    values, advantages = values * mask, torch.zeros_like(rewards)
    running = next_value = torch.zeros_like(rewards[:, 0])     # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], next_value = running, values[:, t]
    return advantages, advantages + values

def masked_mean(x, mask):                                  # (B, R) x 2 -> scalar
    """Mean over the answers' tokens, never over prompts or padding: x 1 2 9, mask 1 1 0 -> 1.5."""
    return (x * mask).sum() / mask.sum()

def whiten(x, mask):                                       # (B, R) x 2 -> (B, R)
    """Mean 0, variance 1 over the answers' tokens: 1 2 3 4 -> -1.34 -0.45 0.45 1.34; else 0."""
    mean = masked_mean(x, mask)
    # centring is what matters: early on the values may all be too low, which makes all A positive
    # and reinforces every answer. Scaling matters less, for Adam does that, too. 1e-8: never 0 / 0
    return (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8) * mask

def policy_loss(logp_new, logp_old, advantages, mask, clip=0.2):       # (B, R) x 4 -> scalar
    """The clipped surrogate (PPO, eq. 7), negated because optimizers minimise. At ratio 1 its
    gradient is the policy gradient, A * grad log p: what went well becomes more likely. It works as
    grad E[R] = sum R grad p = E[R grad log p] (Williams 1992); A in place of R is less noisy and
    changes no mean. After a step the ratio reweights the old answers: what the new policy would
    choose twice as often counts twice. Once a good token is `clip` more likely than in the rollout,
    or a bad one less likely, nothing more is gained:

        ratio 1.5, A  1  ->  -min( 1.5,  1.2) = -1.2    far enough: the gradient is 0
        ratio 1.5, A -1  ->  -min(-1.5, -1.2) =  1.5    gone the wrong way: never clipped
    Log-ratios are clamped to -20 .. 20: exp(100) is inf, inf * 0 is nan, and the run is over."""
    ratio = (logp_new - logp_old).clamp(-20, 20).exp()         # e^20 is far outside of any clip
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)

def value_loss(values_new, values_old, returns, mask, clip=0.2):       # (B, R) x 4 -> scalar
    """Half the squared error, of the new value or of the one clipped to `clip` from the old one,
    whichever is worse (OpenAI baselines). Old 0, new .5, return 1: max(.5^2, .8^2) / 2 = .32. The
    clipped one is worse there, and a constant: no gradient, it went far enough for one rollout."""
    clipped = values_old + (values_new - values_old).clamp(-clip, clip)
    worse = torch.max((values_new - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(worse, mask)

def kl_estimates(logp, logp_ref):                          # (...) x 2 -> k1, k3
    """Two estimates of KL(policy || reference) from tokens that the policy has sampled, both right
    on average (Schulman 2020): k1, the log-ratio, is often negative. k3 adds p_ref / p - 1, of
    mean 0, and is never negative, as e^x - 1 >= x. p .7, p_ref .3: k1 = .85, k3 = .85 + 3/7 - 1."""
    return logp - logp_ref, (logp_ref - logp).exp() - 1 - (logp_ref - logp)

def exact_kl(logits, logits_ref):                          # (..., V) x 2 -> (...)
    """KL(policy || reference) of the next token, in nats, summed over the vocabulary: p = .7 .2 .1
    and p_ref = .3 .4 .3 give .7 ln(7/3) + .2 ln(1/2) + .1 ln(1/3) = .345."""
    logp, logp_ref = logits.log_softmax(-1), logits_ref.log_softmax(-1)
    return (logp.exp() * (logp - logp_ref)).sum(-1)

# --- The loop, in the order in which it happens ---------------------------------------------------
@torch.no_grad()
def rollout(policy, reference, questions, max_new, minibatch, seed):
    """1. The policy answers; policy and reference say how likely each token was -> the batch, a
    dict: tokens, segments (B, T); mask, logp, logp_ref, entropy (B, R); ended, kl (B,), nats an
    answer; questions, replies, seed; `parts`, the rows read at a time. Stops if a reply is empty:

        tokens     <user>  Where   ?    <assistant>  Oslo    .    <eot>  <pad>
        segments      1      1     1         1         1     1      1      0
        mask          0      0     0         1         1     1      0       1: next is the answer's
        next        Where    ?  <assist.>  Oslo        .   <eot>  <pad>"""
    tokenizer, device = policy.tokenizer, policy.device
    prompts = [data.chat_prompt(tokenizer, question) for question in questions]
    # temperature 1, no top-k, no top-p: these have to be samples of what is scored below
    replies = generate(policy, prompts, max_new, seed=seed)                # with their <eot>
    if not all(replies):
        raise SystemExit("the policy has diverged and gives no answers: lower --lr")
    tokens = data.pad_rows([p + r for p, r in zip(prompts, replies)], tokenizer.pad).to(device)
    choices = [[0] * (len(p) - 1) + [1] * len(r) for p, r in zip(prompts, replies)]
    mask, segments = data.pad_rows(choices, 0).to(device).float(), (tokens != tokenizer.pad).long()
    ended = torch.tensor([r[-1] == tokenizer.eot for r in replies], device=device)
    # The sampler knew these log-probs, but rounded differently, reading token by token: they are
    # taken again as `update` will take them, so that its first ratio is 1
    rows = torch.arange(len(tokens), device=device)[rank()::processes()]   # all, of one process
    parts, found = rows.split(minibatch), torch.zeros(4, *mask.shape, device=device)
    for i in parts:                                        # so many rows at a time, for memory
        chosen = tokens[i, 1:, None]                       # KL and entropy need all the logits
        # the last column chooses nothing any more; tensors (b, R, V) take the most memory of all
        p, ref = (model(tokens[i], segments[i])[:, :-1] for model in (policy, reference))
        logp, logp_ref = (x.log_softmax(-1).gather(-1, chosen).squeeze(-1) for x in (p, ref))
        entropy = -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)
        found[:, i] = torch.stack([logp, logp_ref, exact_kl(p, ref), entropy])
    logp, logp_ref, kl, entropy = mean_over_processes(found) * processes()     # the sum: all rows
    return dict(questions=questions, replies=replies, tokens=tokens, segments=segments, mask=mask,
                ended=ended, parts=parts, logp=logp, logp_ref=logp_ref, entropy=entropy,
                kl=(kl * mask).sum(1), seed=seed)

@torch.no_grad()
def judge(batch, score_answers, value, beta, gamma=1.0, lam=0.95):
    """2. How good was it? Adds scores (B,), values, rewards, advantages, returns (B, R), and beta.
    `score_answers(questions, replies)` -> (B,): the only source of anyone's taste."""
    mask, values = batch["mask"], torch.zeros_like(batch["mask"])
    scores = score_answers(batch["questions"], batch["replies"]).to(mask.device)
    for i in batch["parts"]:
        # at [:, t], before tokens[:, t+1] is chosen: what it expects must not know the choice
        values[i] = value(batch["tokens"][i], batch["segments"][i])[:, :-1]
    values = mean_over_processes(values) * processes()     # the sum: all rows
    rewards = token_rewards(batch["logp"], batch["logp_ref"], mask, scores, beta)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    batch |= dict(scores=scores, values=values, rewards=rewards, advantages=advantages,
                  returns=returns, beta=beta)

def update(policy, value, optimizer, batch, args, read_again=lambda step: None):
    """3. Do more of what went well: args.epochs passes over the batch, in place -> mean figures of
    the steps. AssertionError where the first ratio is not 1; stops where the loss is no number."""
    advantages, steps, minibatches = whiten(batch["advantages"], batch["mask"]), [], []
    rng, lengths = np.random.default_rng([*batch["seed"], 4]), batch["mask"].sum(1).tolist()
    for _ in range(args.epochs):                           # shuffled anew for each pass
        minibatches += torch.from_numpy(rng.permutation(len(advantages))).split(args.minibatch)
    for i in minibatches:          # of several processes, each takes its share, counted by tokens
        i, weight = my_share(i, lambda row: lengths[row])
        mask, logp_old = batch["mask"][i], batch["logp"][i]
        logp_new = token_logprobs(policy, batch["tokens"][i], batch["segments"][i])
        values = value(batch["tokens"][i], batch["segments"][i])[:, :-1]
        logratio = (logp_new - logp_old).detach() * mask
        # 0 up to rounding; dropout, other segments, a policy that has moved make it 0.1 and more
        if not steps and not logratio.abs().max() <= 0.01:     # not <=: nan is caught, too
            raise AssertionError(f"the first ratio is exp({logratio.abs().max():.2g}), not 1")
        # KL(old || new), for the samples are the old policy's; k3, since it is never negative
        _, k3 = kl_estimates(logp_old * mask, logp_new.detach() * mask)
        loss_policy = policy_loss(logp_new, logp_old, advantages[i], mask, args.clip)
        loss_value = value_loss(values, batch["values"][i], batch["returns"][i], mask, args.clip)
        clipped = ((logratio.exp() - 1).abs() > args.clip).float()
        found = loss_policy, loss_value, masked_mean(k3, mask), masked_mean(clipped, mask)
        figures = mean_over_processes(torch.stack(found).detach() * weight).tolist()
        if figures[2] > MAX_APPROX_KL:                     # the batch is of another policy now
            break
        optimizer.zero_grad()
        ((loss_policy + loss_value) * weight).backward()   # they share no weights: one call
        read_again(batch["seed"][-1] * len(minibatches) + len(steps))  # documents, too: PPO-ptx
        for model in (policy, value):                      # each by itself: else a large value
            average_and_clip(model)                        # loss would shrink the policy's step
        optimizer.step()
        steps.append(figures)
    names, means = ("policy_loss", "value_loss", "approx_kl", "clipfrac"), np.mean(steps, axis=0)
    return dict(zip(names, means.tolist())) | {"optimizer_steps": len(steps)}

def train(policy, value, questions_at, score_answers, args, gold=None, progress=None):
    """PPO in place -> history, one row per iteration. `questions_at(step)`: its questions; `args`:
    see ppo_flags; `gold(questions, texts)`: their utilities, for the log alone."""
    reference = copy_of(policy)                            # before `resume`: what it was at first
    groups = [{"params": model.parameters()} for model in (policy, value)]
    # eps as in OpenAI's PPO (Huang et al. 2022): with 1e-8, Adam takes a full step even on noise
    optimizer = torch.optim.Adam(groups, eps=1e-5)
    parts = dict(policy=policy, value=value, optimizer=optimizer)
    start, history = resume(progress, **parts)
    read_again = replayer(policy, args)
    bar = tqdm(range(start, args.iterations), "ppo", args.iterations, initial=start, unit="iter")
    for step in bar:
        policy_lr = args.lr if step >= args.value_warmup else 0.0
        for group, lr in zip(optimizer.param_groups, (policy_lr, args.value_lr)):
            group["lr"] = lr * (1 - step / args.iterations)    # linear decay to 0
        seed = args.seed, 41, step                         # 41: a stream of its own per use
        batch = rollout(policy, reference, questions_at(step), args.max_new, args.minibatch, seed)
        judge(batch, score_answers, value, args.beta)
        losses = update(policy, value, optimizer, batch, args, read_again)
        history.append({"iteration": step + 1} | describe(batch) | losses)
        if len(set(batch["scores"].tolist())) == 1:        # nothing but the leash is left to learn
            tqdm.write(f"iteration {step + 1}: all scores alike, {batch['ended'].sum()} ended")
        if gold:
            texts = [data.decode_reply(policy.tokenizer, reply) for reply in batch["replies"]]
            history[-1]["gold_utility"] = float(np.mean(gold(batch["questions"], texts)))
        bar.set_postfix(score=history[-1]["score"], kl=history[-1]["kl_nats"])
        if (step + 1) % 10 == 0 and step + 1 < args.iterations:
            save_progress(progress, step + 1, history, **parts)
    return history

def describe(batch):
    """A batch after its update -> the columns of the log that `update` does not return."""
    mask, returns = batch["mask"], batch["returns"]
    k1, k3 = kl_estimates(batch["logp"] * mask, batch["logp_ref"] * mask)
    missed = masked_mean((returns - batch["values"]) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    row = {"score": batch["scores"],                       # per answer, on the reference's scale
           "kl_nats": batch["kl"],                         # exact at each position of these answers
           "kl_k1_nats": (k1 * mask).sum(1), "kl_k3_nats": (k3 * mask).sum(1),     # estimates
           "reward_after_kl": batch["rewards"].sum(1),     # what PPO maximises: score - beta * KL
           "entropy_nats_per_token": masked_mean(batch["entropy"], mask),  # how undecided it is
           "length_tokens": mask.sum(1), "eos_rate": batch["ended"].float(),       # see "Watch"
           "explained_variance": 1 - missed / variance}    # 1: all foreseen, 0: the mean
    return {name: x.mean().item() for name, x in row.items()} | {"beta": batch["beta"]}

def value_from(reward_model):
    """A value model that starts as the reward model, on its scale: it knows language and taste, and
    learns in `update` what to expect in mid-answer. In a common trunk with the policy its loss
    would drag that along (Stiennon et al. 2020)."""
    scale = reward_model.scale                             # (raw - mean) / std, now in the head
    value = ScalarModel(copy_of(reward_model.gpt)).to(reward_model.device)
    with torch.no_grad():
        value.scalar.weight.copy_(reward_model.scalar.weight / scale["std"])
        value.scalar.bias.copy_((reward_model.scalar.bias - scale["mean"]) / scale["std"])
    return value

def on_scale(raw, replies, scale, tokenizer):              # (B,) -> (B,)
    """Raw scores on a fixed scale, on which the reference's answers have mean 0 and a minimum of
    "lowest" (reward.normalise). A reply that did not end never pays, whatever it scores: it gets a
    margin (their standard deviation) less than that minimum, and than all finished ones beside it.
    Lowest -2, margin 1: finished replies of 0.5 and -4 keep their scores, an unfinished has -5."""
    ended = torch.tensor([reply[-1] == tokenizer.eot for reply in replies], device=raw.device)
    scores = (raw - scale["mean"]) / scale["std"]
    margin, lowest = scale.get("margin", 1.0), scale["lowest"]     # 1: a unit is a deviation here
    if ended.any() and scores[ended].min() < lowest - margin:
        lowest = scores[ended].min()                       # of this batch alone, for --resume
    return torch.where(ended, scores, lowest - margin)

def score_by_model(reward_model):
    """-> score_answers, for `judge`, by a reward model. (By others: docs/lab/own_reward.py.)"""
    scale, tokenizer = reward_model.scale, reward_model.tokenizer
    @torch.no_grad()
    def score_answers(questions, replies):
        prompts = [data.chat_prompt(tokenizer, question) for question in questions]
        raw = reward_stage.score(reward_model, [p + r for p, r in zip(prompts, replies)])
        return on_scale(raw, replies, scale, tokenizer)
    return score_answers

def evaluate(policy, before, world, n, seed, taste):
    """One answer per model to n held-out questions -> gold utilities, shares correct, win rates."""
    questions = reward_stage.preference_prompts(world, "test", n)
    answers = {"sft": answer(before, questions, seed=(seed, 42)),
               "sft_greedy": answer(before, questions, temperature=0),     # PPO is less random, too
               "ppo": answer(policy, questions, seed=(seed, 43)),
               "best": [data.best_answer(world, q, taste) for q in questions]}
    figures, gold = {}, {}
    for name, texts in answers.items():
        gold[name] = [data.utility(world, q, text, taste) for q, text in zip(questions, texts)]
        right = [data.is_correct(world, *pair) for pair in zip(questions, texts)]  # how-to, fact
        shares = {"correct": right, "howto_correct": right[::2], "facts_correct": right[1::2]}
        for what, values in ({"gold": gold[name]} | shares).items():
            figures[f"{what}_{name}"] = np.mean(values)
    figures |= data.win_rate(gold["ppo"], gold["sft"], questions)
    greedy = data.win_rate(gold["ppo"], gold["sft_greedy"], questions)["win_rate"]
    figures["win_rate_over_greedy"] = greedy
    gained, possible = (figures[f"gold_{x}"] - figures["gold_sft"] for x in ("ppo", "best"))
    figures["gap_closed"] = gained / max(possible, 1e-9)   # the best answers may be no better
    return {name: float(x) for name, x in figures.items()}

def prompts_that_fit(prompts, tokenizer, room):
    """The prompts of at most `room` tokens: a longer one leaves its answer too few."""
    fit = [prompt for prompt in prompts if len(data.chat_prompt(tokenizer, prompt)) <= room]
    if not fit:
        raise SystemExit(f"no prompt fits: the context leaves room for {room} tokens; shorten "
                         "--max-new or the principles, or pre-train with a larger --context")
    if len(fit) < len(prompts):
        print(f"{len(prompts) - len(fit)} prompts left out: longer than {room} tokens")
    return fit

def ppo_flags(parser, **defaults):
    """Declare the flags of PPO, here and for rlaif.py, with its own `defaults`."""
    flag = parser.add_argument
    flag("--beta", type=number(0, 99), default=0.1, help="reward lost per nat of KL")
    flag("--iterations", type=positive, default=28, help="rollouts")
    flag("--batch-size", type=positive, default=128, help="answers a rollout")
    flag("--max-new", type=positive, default=MAX_NEW, help="longest answer of a rollout, in tokens")
    flag("--epochs", type=positive, default=4, help="passes over a rollout")
    flag("--minibatch", type=positive, default=64, help="answers an optimizer step")
    replay_flags(parser, rows=2)
    flag("--clip", type=number(0, 99), default=0.2, help="how far ratio and value may move")
    flag("--lr", type=number(0, 1), help="the policy's peak; 1.5e-4, published weights 1e-5")
    flag("--value-lr", type=number(0, 1), help="the value model's; 5e-4, published weights 1e-5")
    flag("--value-warmup", type=int, default=0, help="iterations for the value to get ready")
    parser.set_defaults(**defaults)

def check_warmup(args):
    """Stop before any work is done if the policy would learn in no iteration at all."""
    if not 0 <= args.value_warmup < args.iterations:
        raise SystemExit("--value-warmup leaves the policy no iteration: raise --iterations")

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="PPO against the reward model, with a KL penalty.")
    ppo_flags(p)
    p.add_argument("--prompts", help="a file of prompts; default: the world's questions")
    p.add_argument("--reward-model", help="default: OUT/reward.pt")
    p.add_argument("--eval-prompts", type=positive, default=500, help="held-out questions")
    common_flags(p, "policy and reference; default: OUT/sft.pt", "seed of all that is drawn")
    args = p.parse_args(argv)
    check_warmup(args)
    return args

def main(argv=None):
    args = read_args(argv)
    device, out = start_training(args.device), Path(args.out)
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    gentle_rates(args, policy, **RATES)
    before = copy_of(policy)                               # for the comparison at the end
    world = None if args.prompts else data.world_of(policy)
    prompts = (reward_stage.preference_prompts(world, "train", 4000) if world
               else data.read_prompts(args.prompts))
    prompts = prompts_that_fit(prompts, policy.tokenizer, policy.config.context - args.max_new)
    reward_model = reward_stage.load_reward(args.reward_model or out / "reward.pt", policy)
    taste = reward_model.taste                             # None: unknown, so gold is not logged
    def questions_at(step):                                # by seed and step alone: can be resumed
        rng = np.random.default_rng([args.seed, 5, step])
        return [prompts[i] for i in rng.integers(0, len(prompts), args.batch_size)]
    gold = lambda asked, texts: [data.utility(world, *pair, taste) for pair in zip(asked, texts)]
    print(f"{device}, {args.iterations} iterations of {args.batch_size} answers, beta {args.beta}")
    history = train(policy, value_from(reward_model), questions_at, score_by_model(reward_model),
                    args, gold if world and taste else None, (out / "ppo.resume.pt", args))
    finish_training()                                      # rank 0 alone goes on
    save_model(out / "ppo.pt", policy)
    columns = {"kl_nats": "kl", "score": "score", "length_tokens": "length", "eos_rate": "eos_rate"}
    figures = {name: history[-1][column] for column, name in columns.items()}
    if world:
        figures |= evaluate(policy, before, world, args.eval_prompts, args.seed, taste or "polite")
    print("\n" + "  ".join(f"{name} {x:.3g}" for name, x in figures.items()))
    data.write_results(out, "ppo", history, figures)
    shown = [prompts[:3], answer(before, prompts[:3]), answer(policy, prompts[:3])]
    for question, first, then in zip(*shown):
        print(f"\n{question}\n  before: {first}\n  after:  {then}")
    files = "" if world else " --prompts FILE --red-team-file FILE --preferences FILE"
    print(f"\nwrote {out / 'ppo.pt'}; next: python rlaif.py --out {out}{files}")

if __name__ == "__main__":
    main()
