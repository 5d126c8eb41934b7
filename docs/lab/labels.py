"""What are soft labels, both orders and a thought worth, where the judge errs?

    python docs/lab/critics.py --inputs out --out out/critics     critics of growing ability
    python docs/lab/labels.py --critics out/critics --inputs out --out out/labels  rlaif.py's flags

Every critic, and the helpful model last, judges pairs of which one answer is better (held-out verbs
of G1 and G2r). A label p for the better one costs (1 - p)^2: 0.25 if always undecided. Then two
preference models learn from the critic's labels of INPUTS/slcai.pt's answers, as they are and
rounded. Prints a column a critic, writes OUT/labels.json:

    soft, hard         cost of the mean of both orders, as it is, and rounded to 0, 0.5 or 1
    one_order          cost with the better answer always first, and always second, on average
    no_thought         cost if the verdict is asked for at once (both orders)
    first              mean P(A), whichever answer stands there: 0.5 but for a liking for a place
    missing            share of thoughts without a verdict
    pm_soft, pm_hard   share of these pairs that a preference model of such labels gets right
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import data
import reward
import rlaif
from model import load_gpt, pick_device

def cases_of(world, n, seed):
    """Held-out pairs of which one answer is better -> questions, better, worse, principles."""
    acts = data.act_prompts(world, "test", n, True, ("g1", "g2r"))
    found = data.critic_cases(acts, rlaif.open_constitution(), seed)
    _, asked, _, better, worse, named = zip(*[case for case in found if case[0] != "silent"])
    return [act.question() for act in asked], better, worse, named

def rounded(label):
    """0.9 -> 1, 0.5 -> 0.5, 0.2 -> 0."""
    return float(np.sign(label - 0.5) + 1) / 2

def cost(labels):
    """Mean of (1 - p)^2, pairs without a verdict (nan) left out, as rlaif.py does: 1, .5 -> .125"""
    return (1 - labels).square().nanmean().item()

def label_costs(critic, pairs, seed):
    """What labels cost by four ways to ask -> figures."""
    questions, better, worse, named = pairs
    soft, first, second = rlaif.both_orders(critic, questions, better, worse, named, (seed, 81))
    ask = lambda a, b: rlaif.prefer_first(critic, questions, a, b, named, (seed, 82), think=False)
    at_once = (ask(better, worse) + 1 - ask(worse, better)) / 2
    return {"soft": cost(soft), "hard": cost(soft.apply_(rounded)), "no_thought": cost(at_once),
            "one_order": (cost(first) + cost(1 - second)) / 2,
            "first": torch.cat([first, second]).nanmean().item(),
            "missing": torch.cat([first, second]).isnan().float().mean().item()}

def learnt(slcai, groups, old, prompts, pairs, args):
    """Share of the pairs that a preference model gets right, having learnt from these labels."""
    world, (questions, better, worse, _) = data.world_of(slcai), pairs
    pm, _ = rlaif.train_preference_model(slcai, groups, old, world, prompts, args.pm_lr, args.seed)
    scores = [reward.score_texts(pm, [*zip(questions, side)]) for side in (better, worse)]
    return (scores[0] > scores[1]).float().mean().item()

def main(argv=None):
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--critics", default="out/critics")
    own, rest = p.parse_known_args(argv)                   # the others are rlaif.py's
    args, critics = rlaif.read_args(rest), sorted(Path(own.critics).glob("critic_*.pt"))
    if not critics:
        raise SystemExit(f"{own.critics} holds no critics: run `python docs/lab/critics.py` first")
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, _, helpful = rlaif.load_models(inputs, args, device)
    slcai = load_gpt(inputs / "slcai.pt", "rlaif.py", device)
    red_team, harmless, wide, _, benign = rlaif.from_world(data.world_of(base), args)
    old = rlaif.read_labels(args.preferences, inputs, base)
    answered = rlaif.answers_to_compare(slcai, helpful, wide, benign, args.seed)
    pairs, rows = cases_of(data.world_of(base), args.eval_prompts, args.seed), {}
    for path in [*critics, None]:
        critic = load_gpt(path, device=device) if path else helpful
        row = label_costs(critic, pairs, args.seed)
        soft, _ = rlaif.ai_labels(critic, answered, rlaif.open_constitution(), args.seed)
        hard = []
        for question, answers, labels in soft:
            hard.append((question, answers, [(i, j, rounded(p)) for i, j, p in labels]))
        for name, groups in (("pm_soft", soft), ("pm_hard", hard)):
            zero = red_team[:250] + harmless[:250]
            row[name] = learnt(slcai, groups, old, zero, pairs, args)
        rows[path.stem if path else "helpful"] = row
    print(" " * 12, *[f"{name:>12}" for name in rows])
    for column in row:
        print(f"{column:12}", *[f"{found[column]:12.3f}" for found in rows.values()])
    data.write_results(out, "labels", figures=rows)

if __name__ == "__main__":
    main()
