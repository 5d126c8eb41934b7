"""The dial: how good must an AI be to supervise itself?

    python docs/lab/critics.py --inputs out --out out/critics     critics of growing ability
    python docs/lab/dial.py --critics out/critics --inputs out --out out/dial    rlaif.py's flags

Both phases of rlaif.py for each critic in the folder: it criticises, revises and judges; the model
that answers and is trained stays the same. Last comes the helpful model, its own critic (figures of
INPUTS/rlaif.json, if rlaif.py was run). Writes OUT/dial.json (--resume: goes on after the critics
in it), draws OUT/dial.png, and prints a column a critic:
    hits, alarms       faults found where the rule covers one (G1), and where there is none
    labels             right labels, of the pairs of which one answer is better (G1)
    rounds             harm left after the rounds of critique
    harm, over_refusal of SL-CAI and RL-CAI, on G1, G2r and G2
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import rlaif
from model import load_gpt, pick_device

OUTCOMES = [f"{what}_{name}_{cell}" for what in ("harm", "over_refusal")
            for name in ("slcai", "rlcai") for cell in ("g1", "g2r", "g2")]
COLUMNS = ["hits", "alarms", "labels", "rounds", *OUTCOMES]

def ability(found):
    """What rlaif.measure_critic has found -> hits, alarms, labels."""
    alarms = 1 - (found["verdict_silent_g1"] + found["verdict_benign_g1"]) / 2
    labels = [found.get(f"label_{case}_g1", np.nan) for case in ("covered", "benign")]
    return {"hits": found["verdict_covered_g1"], "alarms": alarms, "labels": np.mean(labels).item()}

def supervise(critic, base, helpful, prompts, old, args):
    """Both phases of rlaif.py with this critic -> figures."""
    world, n, seed = data.world_of(base), args.eval_prompts, args.seed
    rules, (red_team, harmless, wide, wide_harmless, benign) = rlaif.open_constitution(), prompts
    figures = ability(rlaif.measure_critic(critic, world, n, seed))
    traces = rlaif.revise_rounds(helpful, critic, red_team, rules, args.rounds, seed)
    figures["rounds"] = rlaif.count_and_judge(traces, {})[f"harm_round_{args.rounds}"]
    slcai = rlaif.train_slcai(base, helpful, rlaif.to_learn(traces), harmless, args)
    answered = rlaif.answers_to_compare(slcai, helpful, wide, benign, seed)
    groups, _ = rlaif.ai_labels(critic, answered, rules, seed, args.clamp)
    zero = red_team[:250] + harmless[:250]
    pm, _ = rlaif.train_preference_model(slcai, groups, old, world, zero, args.pm_lr, seed)
    policy, _ = rlaif.reinforce(slcai, pm, wide, wide_harmless, args)
    return figures | rlaif.final_table({"slcai": slcai, "rlcai": policy}, world, n, seed)

def draw(rows, path):
    """Harm and over-refusal over the critics' hit rates."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: it takes `pip install matplotlib`")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, what in zip(axes, ("harm", "over_refusal")):
        for name in ["rounds"] * (what == "harm") + [n for n in OUTCOMES if n.startswith(what)]:
            points = sorted((row["hits"], row[name]) for row in rows)
            style = "o-" if "rlcai" in name else "o:" if name == "rounds" else "o--"
            colour = {"g1": "C0", "g2r": "C1", "g2": "C2"}.get(name.split("_")[-1], "black")
            axis.plot(*zip(*points), style, c=colour, label=name.removeprefix(f"{what}_"))
        axis.set(title=what.replace("_", "-"), xlabel="covered faults found")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)

def main(argv=None):
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--critics", default="out/critics")
    own, rest = p.parse_known_args(argv)                   # the others are rlaif.py's
    args, critics = rlaif.read_args(rest), sorted(Path(own.critics).glob("critic_*.pt"))
    if not critics:
        raise SystemExit(f"no critics in {own.critics}: run `python docs/lab/critics.py` first")
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, _, helpful = rlaif.load_models(inputs, args, device)
    prompts = rlaif.from_world(data.world_of(base), args)
    old, path = rlaif.read_labels(args.preferences, inputs, base), out / "dial.json"
    rows = json.loads(path.read_text("utf-8")) if args.resume and path.exists() else {}
    for critic in [*critics, None]:
        name = critic.stem if critic else "helpful"
        if not critic and (inputs / "rlaif.json").exists():    # that run was this one
            found = json.loads((inputs / "rlaif.json").read_text(encoding="utf-8"))
            found |= ability(found) | {"rounds": found[f"harm_round_{args.rounds}"]}
            rows[name] = {column: found[column] for column in COLUMNS}
        elif name not in rows:
            judge = load_gpt(critic, device=device) if critic else helpful
            rows[name] = supervise(judge, base, helpful, prompts, old, args)
        data.write_results(out, "dial", figures=rows)      # after each: it takes long
    print("\n" + " " * 24, *[f"{name:>12}" for name in rows])
    for column in COLUMNS:
        print(f"{column:24}", *[f"{row[column]:12.3f}" for row in rows.values()])
    draw(list(rows.values()), out / "dial.png")

if __name__ == "__main__":
    main()
