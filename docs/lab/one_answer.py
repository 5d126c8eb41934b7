"""Where do the numbers of one answer come from? One rollout and one update of PPO, one answer of it
token by token; nothing is written.

    python docs/lab/one_answer.py    reads out/sft.pt and out/reward.pt; all of ppo.py's flags

A line a token: its log-probability by policy and reference; their difference, the KL term, of which
beta is fined; the reward, the fine and, at the last token, the score; what the value model expected
from here on; the advantage; and how much likelier the update made this token (the ratio: 1 before
it, within 1 - clip and 1 + clip or not far beyond).

Found: KL terms are 0 in a first rollout, for the policy still is its reference; so all reward comes
at the last token, and it is the advantages that say which tokens have earned it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import data
import ppo
import reward
from model import copy_of, gentle_rates, load_gpt, pick_device

COLUMNS = ("logp", "logp_ref", "rewards", "values", "advantages")


def show(batch, tokenizer, logp_new):
    """The first answer of a batch, token by token; `logp_new` (B, R): the updated policy's."""
    print(f"{'token':>14}{'logp':>9}{'logp_ref':>10}{'KL term':>9}{'reward':>9}{'value':>9}"
          f"{'advantage':>11}{'ratio after':>13}")
    for t in batch["mask"][0].nonzero().flatten().tolist():    # the answer's places
        logp, logp_ref, reward, value, advantage = (batch[name][0, t].item() for name in COLUMNS)
        ratio = (logp_new[0, t] - batch["logp"][0, t]).exp().item()
        token = tokenizer.decode([batch["tokens"][0, t + 1].item()])       # chosen at t
        print(f"{token!r:>14}{logp:9.3f}{logp_ref:10.3f}{logp - logp_ref:9.3f}{reward:9.3f}"
              f"{value:9.3f}{advantage:11.3f}{ratio:13.3f}")


def main(argv=None):
    args = ppo.read_args(argv)
    out = Path(args.out)
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", pick_device(args.device))
    gentle_rates(args, policy, **ppo.RATES)
    reference = copy_of(policy)
    world = None if args.prompts else data.world_of(policy)
    prompts = (reward.preference_prompts(world, "train", 4000) if world
               else data.read_prompts(args.prompts))
    prompts = ppo.prompts_that_fit(prompts, policy.tokenizer, policy.config.context - args.max_new)
    reward_model = reward.load_reward(args.reward_model or out / "reward.pt", policy)
    value = ppo.value_from(reward_model)
    # the first iteration of ppo.py with these flags: its questions, its samples
    rng = np.random.default_rng([args.seed, 5, 0])
    questions = [prompts[i] for i in rng.integers(0, len(prompts), args.batch_size)]
    seed = (args.seed, 41, 0)
    batch = ppo.rollout(policy, reference, questions, args.max_new, args.minibatch, seed)
    ppo.judge(batch, ppo.score_by_model(reward_model), value, args.beta)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, eps=1e-5)
    ppo.update(policy, value, optimizer, batch, args)
    print(questions[0])
    with torch.no_grad():
        logp_new = ppo.token_logprobs(policy, batch["tokens"], batch["segments"])
    show(batch, policy.tokenizer, logp_new)


if __name__ == "__main__":
    main()
