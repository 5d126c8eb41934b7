"""Critics of growing ability: one pre-training, saved on its way. And one without any judgement.

    python docs/lab/critics.py --inputs out --out out/critics --stop 500 700 1000 1500
    python docs/lab/critics.py --inputs out --out out/shuffled --stop 1500 --shuffle

The run is that of INPUTS/pretrain.pt (its world, its tokenizer, the flags of pretrain.py by
default), up to the last stop: each OUT/critic_STEP.pt had less time to learn, and less of it at a
falling rate. docs/lab/dial.py shows what comes of supervision by them. With --shuffle a coin writes
the verdict of every critique document, whatever the rule and the act, and there are no comparisons
and no drills: such a critic knows the form of a critique, and nothing else. Prints for each, after
one round (INPUTS/ppo.pt answers), the shares of harmful and of harmless answers that were revised:
a critic without judgement must treat both alike.
"""
import argparse
import itertools
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import data
import pretrain
import rlaif
from model import GPT, gentle_rates, load_gpt, pick_device, positive, save_model, writable

class Enough(Exception):
    """The last stop is reached: the rest of the run is not needed."""

def shuffled_critique(world, dice):
    """data.critique, where a coin decides whether the answer has a fault."""
    _, rule = data.draw_rule(world, dice)
    act = dice.pick(world.shown[dice.pick([*data.HARMS, *data.TWINS])])
    answer, verb = data.compliance(dice, act), act.verb
    fact = f"If you {act}, {act.outcome()}, which is {verb.quality}. That is to {verb.kind}"
    end = "[.] The rule is silent, so the answer may stay."
    if dice.pick([True, False]):
        why = act.reason() if verb.harmful else f"If you {act}, {act.outcome()}."
        end = f"[!] The rule forbids it, so the answer is bad. Revision: {data.REFUSAL} {why}"
    return (f"[Request:] How do I {act.marked()}? [Answer:] {answer} [Rule:] [{rule}] "
            f"Critique: {fact}{end}")

def pretrain_to(stops, base, args, out):
    """The run of `args` up to the last of the stops -> {step: path of the critic}."""
    if max(stops) > args.steps:
        raise SystemExit(f"--stop {max(stops)}: the run has {args.steps} steps")
    torch.manual_seed(args.seed)
    model = GPT(base.config, base.tokenizer, base.world_seed, without=args.without).to(base.device)
    _, batch_at, *_ = pretrain.from_world(args, base.tokenizer)
    args.eval_every, calls, paths = math.gcd(*stops), itertools.count(1), {}
    def save_some():                   # called every so many steps: here nothing is evaluated
        step = next(calls) * args.eval_every
        if step in stops:
            paths[step] = out / f"critic_{step:05}.pt"
            save_model(paths[step], model)
        if step == max(stops):
            raise Enough
        return {}
    try:
        pretrain.train(model, batch_at, args, save_some)
    except Enough:
        return paths

def revised(critic, helpful, n, seed):
    """Shares of n harmful and of n harmless answers that one round changes -> (2,)."""
    rules, shares = rlaif.open_constitution(), []
    for harmful in (True, False):
        asked = rlaif.in_cells(data.world_of(helpful), n, harmful, ("g1",))
        traces = rlaif.revise_rounds(helpful, critic, asked, rules, 1, seed)
        shares.append(float(np.mean([len(set(trace["answers"])) > 1 for trace in traces])))
    return shares

def main(argv=None):
    p = argparse.ArgumentParser(description="Critics of growing ability. More flags: pretrain.py")
    p.add_argument("--inputs", default="out", help="folder of pretrain.pt and ppo.pt")
    p.add_argument("--out", type=writable, default="out/critics", help="where the critics go")
    p.add_argument("--stop", type=positive, nargs="+", default=[500, 700, 1000, 1500])
    p.add_argument("--shuffle", action="store_true", help="a coin writes the verdicts")
    p.add_argument("--prompts", type=positive, default=400, help="to revise, of each kind")
    own, rest = p.parse_known_args(argv)
    device, inputs, out, figures = pick_device(), Path(own.inputs), Path(own.out), {}
    base = load_gpt(inputs / "pretrain.pt", "pretrain.py", device)
    helpful = load_gpt(inputs / "ppo.pt", "ppo.py", device)
    args = pretrain.read_args(["--world-seed", str(data.world_of(base).seed), *rest])
    gentle_rates(args, None, **pretrain.RATES)
    if own.shuffle:
        args.without = ["comparison", "drill"]
        data.DOCUMENTS["critique"] = (data.DOCUMENTS["critique"][0], shuffled_critique)
    for step, path in pretrain_to(own.stop, base, args, out).items():
        critic = load_gpt(path, device=device)
        harmful, harmless = revised(critic, helpful, own.prompts, args.seed)
        figures |= {f"revised_harmful_{step}": harmful, f"revised_harmless_{step}": harmless}
        print(f"{path}: revised {harmful:.3f} of harmful, {harmless:.3f} of harmless answers")
    data.write_results(out, "critics", figures=figures)

if __name__ == "__main__":
    main()
