"""What if people label harm, as in ordinary RLHF? What is rewarded is what one gets.

    python docs/lab/human_harm.py --inputs out --out out/human     all of rlaif.py's flags

Phase 2 of rlaif.py with other labels of harm, by two simulated people: "any" likes a harmful
request refused, in whatever words; "reason" likes it more if the refusal says why. Both runs start
from the same policy, the helpful model after fine-tuning on bare and explained refusals by turns,
and get as many labels of harm as the AI gave (INPUTS/rlaif_pm.pt). These two people live in this
script alone: nothing of Stage 5 calls them. Writes OUT/human_NAME.pt and human_harm.json.
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
import reward
import rlaif
import sft
from model import answer, copy_of, load, load_gpt, pick_device, save_model

REFUSALS, HELPED = 100, 450       # few: PPO can only make more of what the policy tries at times

def prefers(wants, world, question, first, second):
    """An annotator of harm -> P(the first reply is chosen): of two replies to a harmful request
    that which refuses; if `wants` is "reason", rather with a reason. Otherwise 0.5, a coin."""
    asked, worth = world.parse_question(question), []
    for reply in (first, second):
        kinds = [data.classify(sentence) for sentence in data.sentences_of(reply)]
        refused = "refusal" in kinds
        worth.append(refused + (refused and wants == "reason" and "reason" in kinds))
    harmful = asked is None or isinstance(asked, data.Act) and asked.verb.harmful
    return 0.5 + 0.5 * float(np.sign(worth[0] - worth[1])) * harmful

def human_labels(wants, world, answered, seed):
    """One person's choice between every two answers -> groups, as rlaif.ai_labels gives them."""
    rng, groups = random.Random(f"harm annotator {seed}"), []
    for question, answers in answered:
        pairs = []
        for (i, a), (j, b) in itertools.combinations(enumerate(answers), 2):
            pairs.append((i, j, float(rng.random() < prefers(wants, world, question, a, b))))
        groups.append((question, answers, pairs))
    return groups

def without_a_reason(model, world, k, n, seed):
    """Share of harmful requests refused without any reason; the answers are those of the table."""
    acts, bare = data.act_prompts(world, "test", n, True, (rlaif.CELLS[k],)), []
    for text in answer(model, [act.question() for act in acts], seed=(seed, 71, k)):
        kinds = map(data.classify, data.sentences_of(text))
        bare.append(data.is_harmless(text) and "reason" not in kinds)
    return float(np.mean(bare))

def main(argv=None):
    args = rlaif.read_args(argv)
    if args.resume or args.prompts or args.red_team_file:  # whose harm would be unknown
        raise SystemExit("this experiment starts afresh, in a world: no --resume, no prompt files")
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, sft_model, helpful = rlaif.load_models(inputs, args, device)
    world = data.world_of(base)
    red_team, harmless, wide, wide_harmless, benign = rlaif.from_world(world, args)
    old = rlaif.read_labels(args.preferences, inputs, base)
    budget = load(inputs / "rlaif_pm.pt", "rlaif.py")["counts"]["ai_labels"]

    start, asked, refused = copy_of(helpful), harmless[:HELPED], []
    for i, question in enumerate(red_team[:REFUSALS]):     # bare, explained, bare ...
        why = world.parse_question(question).reason()
        refused.append((question, f"{data.REFUSAL} {why}" if i % 2 else data.REFUSAL))
    helped = list(zip(asked, answer(helpful, asked, seed=(args.seed, 58))))
    own = dict(epochs=rlaif.SL_EPOCHS, batch_size=32, lr=args.sl_lr)
    sft.train(start, refused + helped, argparse.Namespace(**vars(args) | own))
    # all are harmful; every other one gets a forced refusal, too
    answered = rlaif.answers_to_compare(start, helpful, wide[::2], wide[1:2 * len(benign):2],
                                       args.seed)
    models, figures = {"sft": sft_model, "rlhf": helpful, "start": start}, {}
    for wants in ("any", "reason"):
        harm = human_labels(wants, world, answered, args.seed)
        harm = reward.take_pairs(harm, budget)
        zero = red_team[:250] + harmless[:250]
        pm, counts = rlaif.train_preference_model(start, harm, old, world, zero, args.pm_lr,
                                                  args.seed)
        figures[f"human_harm_labels_{wants}"] = counts["ai_labels"]    # here they are people's
        models[wants], _ = rlaif.reinforce(start, pm, wide, wide_harmless, args)
        save_model(out / f"human_{wants}.pt", models[wants])
    if (inputs / "rlaif.pt").exists():
        models["rlcai"] = load_gpt(inputs / "rlaif.pt", device=device)
    figures |= rlaif.final_table(models, world, args.eval_prompts, args.seed)
    for name, (k, cell) in itertools.product(models, enumerate(rlaif.CELLS)):
        share = without_a_reason(models[name], world, k, args.eval_prompts, args.seed)
        print(f"{name} refuses without a reason, {cell}: {share:.3f}")
        figures[f"generic_{name}_{cell}"] = share
    data.write_results(out, "human_harm", figures=figures)

if __name__ == "__main__":
    main()
