"""What if nobody sorts the prompts beforehand?

    python docs/lab/unsorted.py --inputs out --out out/unsorted     all of rlaif.py's flags

rlaif.py sends harmful requests through its loop of critique and harmless ones past it, as the paper
does; so the list of red-team prompts is itself a label of harm, given by whoever wrote it. Here
harmful requests and their benign twins go through the same loop, shuffled, and SL-CAI learns what
comes out last, revised or not; for the rest it learns the helpful model's answers to questions of
fact. Phase 2 asks about the same mixture, more verbs included, half of the time. Writes
OUT/unsorted_sl.pt, unsorted_rl.pt, unsorted.json, and prints rlaif.py's table of both.
"""
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import rlaif
from model import load_gpt, pick_device, save_model

def mixture(world, n, cells, seed):
    """n harmful requests and n benign twins, of these cells by turns, shuffled: nobody knows which
    is which."""
    asked = rlaif.in_cells(world, n, True, cells) + rlaif.in_cells(world, n, False, cells)
    return random.Random(f"unsorted {seed}").sample(asked, len(asked))

def shares(world, traces):
    """-> what the rounds have made of the mixture: harm_revised, benign_revised (shares of requests
    whose answer was changed at all), harm_left and over_refusal (by the last answers)."""
    found = {"harm_revised": [], "benign_revised": [], "harm_left": [], "over_refusal": []}
    for trace in traces:
        harmful = world.parse_question(trace["question"]).verb.harmful
        first, last = trace["answers"][0], trace["answers"][-1]
        found["harm_revised" if harmful else "benign_revised"].append(first != last)
        if harmful:
            found["harm_left"].append(not data.is_harmless(last))
        else:
            found["over_refusal"].append(not data.is_compliant(last))
    return {name: float(np.mean(values)) for name, values in found.items()}

def main(argv=None):
    args = rlaif.read_args(argv)
    if args.resume or args.prompts:
        raise SystemExit("this experiment starts afresh, in a world: no --resume, no --prompts")
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, _, helpful = rlaif.load_models(inputs, args, device)
    world, critic = data.world_of(base), helpful if args.critic == "self" else base
    rules = rlaif.open_constitution(args.constitution, world)
    old = rlaif.read_labels(args.preferences, inputs, base)
    facts = rlaif.harmless_prompts(world, args.helpful)[::2]       # the others are how-to

    asked = mixture(world, args.red_team // 2, ("g1",), args.seed)
    traces = rlaif.revise_rounds(helpful, critic, asked, rules, args.rounds, args.seed)
    slcai = rlaif.train_slcai(base, helpful, rlaif.to_learn(traces, "last"), facts, args)
    save_model(out / "unsorted_sl.pt", slcai)
    wide = mixture(world, args.red_team // 2, ("g1", "g2r"), args.seed)
    # nobody knows which are harmful: every other one, whatever it is, gets a forced refusal
    answered = rlaif.answers_to_compare(slcai, helpful, wide[::2], wide[1:args.label_prompts:2],
                                       args.seed)
    harm, _ = rlaif.ai_labels(critic, answered, rules, args.seed, args.clamp)
    zero = asked[:250] + facts[:250]
    pm, counts = rlaif.train_preference_model(slcai, harm, old, world, zero, args.pm_lr, args.seed)
    policy, _ = rlaif.reinforce(slcai, pm, wide, facts, args)
    save_model(out / "unsorted_rl.pt", policy)
    models = {"slcai": slcai, "rlcai": policy}
    for name in ("slcai", "rlaif"):                        # with the prompts sorted, if it was run
        if (inputs / f"{name}.pt").exists():
            models[f"{name[:2]}_sort"] = load_gpt(inputs / f"{name}.pt", device=device)
    figures = counts | shares(world, traces)
    print("", *[f"{name} {x:.3f}" for name, x in figures.items()], sep="\n")
    figures |= rlaif.final_table(models, world, args.eval_prompts, args.seed)
    data.write_results(out, "unsorted", figures=figures)

if __name__ == "__main__":
    main()
