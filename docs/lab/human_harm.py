"""What if people label harm, as in ordinary RLHF, and like any refusal of a harmful request?

    python docs/lab/human_harm.py --inputs out --out out/human     all of rlaif.py's flags

Phase 2 of rlaif.py with other labels of harm: its preference model, its PPO. There is no SL-CAI:
PPO starts from the helpful model, fine-tuned on fifty bare refusals among helpful answers, and only
red-team prompts are labelled for harm. Writes OUT/human_harm.pt and other human_harm files; where
INPUTS or OUT holds rlaif.pt, it is measured beside.

Found (first edition, seed 0, 200 requests a cell, G1 / G2), the comparison of Bai et al. 2022b:
                            harm           right reason    no reason at all   utility
    human labels of harm    0.000 / 0.005  0.000 / 0.000   1.000 / 0.995      2.87
    RL-CAI                  0.005 / 0.035  0.965 / 0.940   0.000 / 0.000      2.84
Both are harmless; only one says why, and only one did without people's labels of harm.
"""
import argparse
import itertools
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import rlaif
import sft
from model import answer, copy_of, load_gpt, pick_device, save_model

REFUSALS, HELPED = 50, 450        # few: PPO can only make more of what the policy tries at times

def prefers_refusal(world, question, first, second):
    """An annotator of harm -> P(the first reply is chosen): to a harmful request any refusal is
    better than none, with a reason or without. In all other cases 0.5, a coin."""
    asked = world.parse_question(question)
    harmful = asked is None or isinstance(asked, data.Act) and asked.verb.harmful
    a, b = (data.REFUSAL in data.sentences_of(reply) for reply in (first, second))
    return 0.5 + 0.5 * (a - b) * harmful

def human_labels(world, answered, seed):
    """One person's choice between every two answers -> groups, and a record, one dict per pair."""
    rng, groups, record = random.Random(f"harm annotator {seed}"), [], []
    for question, answers in answered:
        groups.append((question, answers, []))
        for (i, a), (j, b) in itertools.combinations(enumerate(answers), 2):
            label = float(rng.random() < prefers_refusal(world, question, a, b))
            groups[-1][2].append((i, j, label))
            record.append({"prompt": question, "a": a, "b": b, "label": label})
    return groups, record

def without_a_reason(model, world, g2, n, seed):
    """Share of harmful requests refused without any reason; the answers are those of the table."""
    acts, bare = data.act_prompts(world, "test", n, harmful=True, g2=g2), []
    for text in answer(model, [act.question() for act in acts], seed=(seed, 71, g2)):
        kinds = map(data.classify, data.sentences_of(text))
        bare.append(data.is_harmless(text) and "reason" not in kinds)
    return float(np.mean(bare))

def main(argv=None):
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--record", action="store_true")
    own, rest = p.parse_known_args(argv)
    args = rlaif.read_args(rest)                           # the other flags are rlaif.py's
    if args.resume or args.prompts:
        raise SystemExit("this experiment starts afresh, in a world: no --resume, no --prompts")
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, sft_model, helpful = rlaif.load_models(inputs, args.init, device)
    world, cells = data.world_of(base), ("g1", "g2")
    red_team, harmless, benign = rlaif.from_world(world, args)
    old = rlaif.read_labels(args.preferences, inputs, base)

    start, asked = copy_of(helpful), harmless[:HELPED]
    helped = list(zip(asked, answer(helpful, asked, seed=(args.seed, 58))))
    refused = [(question, data.REFUSAL) for question in red_team[:REFUSALS]]
    sft.train(start, refused + helped, rlaif.SL_EPOCHS, 32, args.sl_lr, args.seed)
    answered = rlaif.answers_to_compare(start, helpful, red_team[:len(benign)], args.seed)
    harm, record = human_labels(world, answered, args.seed)
    rlaif.write_lines(out / "human_harm_labels.jsonl", record)
    both = red_team[:250] + harmless[:250]
    pm, counts = rlaif.train_preference_model(start, harm, old, world, both, args.pm_lr, args.seed)
    counts = {"human_harm_labels": counts.pop("ai_labels"), "ai_labels": 0, **counts}
    save_model(out / "human_harm_pm.pt", pm, scale=pm.scale, counts=counts)
    policy, history = rlaif.reinforce(start, pm, red_team, harmless, args)
    save_model(out / "human_harm.pt", policy)
    models = {"sft": sft_model, "rlhf": helpful, "humanharm": policy}
    for path in (inputs / "rlaif.pt", out / "rlaif.pt"):
        if path.exists():
            models["rlcai"] = load_gpt(path, device=device)
    figures = counts | rlaif.final_table(models, world, cells, args.eval_prompts, args.seed)
    for name, cell in itertools.product(models, cells):
        share = without_a_reason(models[name], world, cell == "g2", args.eval_prompts, args.seed)
        print(f"{name} refuses without a reason, {cell}: {share:.3f}")
        figures[f"generic_{name}_{cell}"] = share
    data.write_results(out, "human_harm", history, figures)
    if own.record:
        data.write_results(ROOT / "docs" / "results", "human_harm", figures=figures)

if __name__ == "__main__":
    main()
