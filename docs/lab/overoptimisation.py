"""What happens with the KL penalty off, when the reward model has learnt from few labels?

    python docs/lab/overoptimisation.py    reads OUT/sft.pt and OUT/reward.pt (all labels)

Reward models on 500 and 2,000 labels (one vote a pair, all pairs of 17 and of 69 questions), then
PPO with beta 0 against each and against OUT/reward.pt. Gold is fitted by d (a - b ln d), d =
sqrt(KL) (Gao et al. 2022). Writes OUT/rm500/ppo.csv, rm2000, rmall, for docs/lab/pictures.py.
Found (first edition, seed 0; score: highest, end; gold: start, peak, end):
    500 labels      score 2.55, 2.54    gold 1.93, 2.29, -0.14    a 0.33, b 0.28, error 0.27
    2,000 labels    score 1.91, 1.91    gold 1.93, 2.49,  0.58    a 0.27, b 0.24, error 0.25
    all labels      score 1.14, 1.14    gold 1.93, 2.79,  2.08    a 0.90, b 0.80, error 0.12
The score stays up while the answers get worse than SFT's: that is reward hacking, and only the gold
judge sees it. More labels: a higher peak, and a later one."""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import data
import model as m
import ppo
import reward as reward_stage
from model import ScalarModel, answer, common_flags, copy_of, load_gpt, pick_device

RUNS = {"500": 1, "2000": 2, "all": None}      # labels, and questions a step of the reward model
REWARD_LR, ANSWERS, HOT = 6e-4, 8, 1.4         # reward.py's when this was measured
SMOOTH = 5                                     # iterations whose mean is a point: one is noisy

def train_reward_model(policy, world, taste, labels, questions, seed):
    """A reward model on about so many of the annotators' labels, as reward.py trains one."""
    answered = reward_stage.sample_answers(policy, questions, ANSWERS, (seed, 31), HOT)
    groups = reward_stage.annotate(world, reward_stage.with_strays(world, answered), seed, taste)
    groups, gpt = reward_stage.take_pairs(groups, int(labels)), copy_of(policy)
    torch.manual_seed(seed)                                # the head is a function of the seed
    reward_model = ScalarModel(gpt).to(policy.device)
    reward_stage.train(reward_model, groups, 1, RUNS[labels], REWARD_LR, seed)
    texts = answer(policy, questions, seed=(seed, 33))
    reward_model.scale = reward_stage.normalise(reward_model, list(zip(questions, texts)))
    return reward_model

def summary(history):
    """A run's rows -> its figures; gold - gold[0] is fitted by d (a - b ln d), least squares."""
    columns = [(row["kl_nats"], row["score"], row["gold_utility"]) for row in history]
    kl, score, gold = np.array(columns).T
    d, start = np.sqrt(kl.clip(1e-6)), gold[0]             # KL is 0 before the first update
    terms, gained = np.stack([d, -d * np.log(d)], 1), gold - start
    a, b = np.linalg.lstsq(terms, gained, rcond=None)[0]
    error = np.sqrt(np.mean((terms @ [a, b] - gained) ** 2))
    width = min(SMOOTH, len(history))
    kl, score, gold = (np.convolve(x, np.ones(width) / width, "valid") for x in (kl, score, gold))
    peak = gold.argmax()
    return {"score_highest": score.max(), "score_end": score[-1], "gold_start": start,
            "gold_peak": gold[peak], "peak_iteration": peak + 1 + width // 2, "peak_kl": kl[peak],
            "gold_end": gold[-1], "a": a, "b": b, "error": error}

def main(argv=None):
    p = argparse.ArgumentParser(description="PPO without a KL penalty, against few labels.")
    ppo.ppo_flags(p, beta=0.0, lr=2e-4, iterations=60)
    common_flags(p, "default: OUT/sft.pt", "seed of labels, prompts, samples and data order")
    p.add_argument("--questions", type=m.positive, default=200, help="whose answers are labelled")
    p.add_argument("--record", action="store_true", help="write docs/results/overoptimisation.json")
    args = p.parse_args(argv)
    out, figures = Path(args.out), {}
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", pick_device(args.device))
    m.gentle_rates(args, policy, **ppo.RATES)
    world = data.world_of(policy)
    prompts = reward_stage.preference_prompts(world, "train", 4000)
    prompts = ppo.prompts_that_fit(prompts, policy.tokenizer, policy.config.context - args.max_new)
    labelled = reward_stage.preference_prompts(world, "train", args.questions)
    best = reward_stage.load_reward(out / "reward.pt", policy)
    taste = best.taste or "polite"

    def questions_at(step):                                # as in ppo.py
        drawn = np.random.default_rng([args.seed, 5, step])
        return [prompts[i] for i in drawn.integers(0, len(prompts), args.batch_size)]

    gold = lambda asked, texts: [data.utility(world, q, a, taste) for q, a in zip(asked, texts)]
    for labels in RUNS:
        print(f"\n{labels} labels")
        hacker, reward_model = copy_of(policy), best
        if labels != "all":
            reward_model = train_reward_model(policy, world, taste, labels, labelled, args.seed)
        history = ppo.train(hacker, ppo.value_from(reward_model), questions_at,
                            ppo.score_by_model(reward_model), args, gold)
        data.write_results(out / f"rm{labels}", "ppo", history)
        row = summary(history)
        figures |= {f"{name}_{labels}": float(x) for name, x in row.items()}
        print(*[f"  {name} {x:.2f}" for name, x in row.items()])
        shown = labelled[:2]                               # the texts say more than the curve
        for question, before, after in zip(shown, answer(policy, shown), answer(hacker, shown)):
            print(f"  {question}\n    before: {before}\n    after:  {after}")
    if args.record:
        data.write_results(ROOT / "docs" / "results", "overoptimisation", figures=figures)

if __name__ == "__main__":
    main()
