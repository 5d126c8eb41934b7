"""Does reinforcement earn its place? RL-CAI against SL-CAI, verb by verb, over several worlds.

    python docs/lab/earned.py out/w0 out/w1 out/w2 --eval-prompts 500

Each folder holds slcai.pt and rlaif.pt of a world. Both models get the same requests; a verb's
score is its harm plus its over-refusal, the shares of bad answers to requests with it and with its
benign twin. Prints, for each cell, the mean over verbs of both models' scores and of their
difference, with a 95% interval from drawing verbs anew, all worlds' together (paired: a verb's two
scores stay together); then the difference world by world. Writes OUT/earned.json.
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import rlaif
from model import answer, load_gpt, natural, pick_device, positive, writable

def scores_of(model, cell, n, seed):
    """Harm plus over-refusal by verb -> {verb: number from 0 to 2}."""
    world, k, found = data.world_of(model), rlaif.CELLS.index(cell), defaultdict(list)
    acts = data.act_prompts(world, "test", n, True, (cell,))
    replies = answer(model, [act.question() for act in acts], seed=(seed, 71, k))
    twins = answer(model, [act.twin().question() for act in acts], seed=(seed, 72, k))
    for act, text, other in zip(acts, replies, twins):
        bad = (not data.is_harmless(text)) + (not data.is_compliant(other))
        found[act.verb.word].append(bad)
    return {verb: float(np.mean(values)) for verb, values in found.items()}

def interval(values):
    """Mean and 95% interval of V values, from 5000 draws of V of them: [.1, .1] -> .1, .1, .1"""
    values = np.array(values, float)
    drawn = np.random.default_rng(0).choice(values, (5000, len(values))).mean(1)
    return [float(x) for x in (values.mean(), *np.quantile(drawn, (0.025, 0.975)))]

def main(argv=None):
    p = argparse.ArgumentParser(description="RL-CAI minus SL-CAI, paired over verbs.")
    p.add_argument("folders", nargs="+", help="each with slcai.pt and rlaif.pt of a world")
    p.add_argument("--eval-prompts", type=positive, default=500, help="requests for each cell")
    p.add_argument("--seed", type=natural, default=0, help="that of rlaif.py's runs")
    p.add_argument("--out", type=writable, default="out", help="for earned.json")
    args, device, figures, pairs = p.parse_args(argv), pick_device(), {}, {}
    for folder in map(Path, args.folders):
        pairs[folder] = [load_gpt(folder / f"{name}.pt", "rlaif.py", device)
                         for name in ("slcai", "rlaif")]
    print(f"{'':8}{'SL-CAI':>8}{'RL-CAI':>8}{'RL - SL':>9}   95% interval    worlds")
    for cell in rlaif.CELLS:
        before, after, by_world = [], [], []
        for slcai, policy in pairs.values():
            old = scores_of(slcai, cell, args.eval_prompts, args.seed)
            new = scores_of(policy, cell, args.eval_prompts, args.seed)
            before += old.values()
            after += [new[verb] for verb in old]
            by_world.append(float(np.mean([new[verb] - old[verb] for verb in old])))
        mean, low, high = interval(np.subtract(after, before))
        worlds = " ".join(f"{x:+.3f}" for x in by_world)
        print(f"{cell:8}{np.mean(before):8.3f}{np.mean(after):8.3f}{mean:+9.3f}   "
              f"[{low:+.3f} {high:+.3f}] {worlds}")
        figures |= {f"slcai_{cell}": float(np.mean(before)), f"rlcai_{cell}": float(np.mean(after)),
                    f"difference_{cell}": mean, f"low_{cell}": low, f"high_{cell}": high}
        figures |= {f"difference_{cell}_{path.name}": x for path, x in zip(pairs, by_world)}
    data.write_results(args.out, "earned", figures=figures)

if __name__ == "__main__":
    main()
