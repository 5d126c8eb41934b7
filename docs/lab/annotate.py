"""What is it like to be the human in RLHF? Two answers at a time, and a key for the better one.

    python docs/lab/annotate.py --prompts 300 --file out/my_preferences.jsonl

reads OUT/sft.pt and appends each choice at once: stop whenever you like, the same command goes on.
Then train on your taste, as far as so few labels tell it:

    python reward.py --data out/my_preferences.jsonl --batch-size 1 --init out/sft.pt --out out/me
    python ppo.py --init out/sft.pt --out out/me

Found: that is yours to say. The script ends with the share of your choices on which each simulated
annotator would have agreed with you, a tie counting half.
"""
import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import reward
from model import load_gpt, pick_device, positive

def labels_in(path):
    """A file of labels, which may be empty or not there yet -> [(question, chosen, rejected)]."""
    if not path.exists() or not path.stat().st_size:
        return []
    pairs, _ = data.read_preferences(path)
    return [(prompt[-1][1], chosen, rejected) for prompt, chosen, rejected, *_ in pairs]


def ask_the_reader(answered, path, seed):
    """Two different answers to each question, drawn from [(question, answers)], and a choice by key
    -> lines of `path`, {"prompt", "chosen", "rejected"}. Questions with a label are skipped."""
    rng, labelled = random.Random(f"reader {seed}"), {question for question, *_ in labels_in(path)}
    print(f"{len(labelled)} labels so far. Which is better? 1 or 2; Enter: cannot say; q: stop.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for question, answers in answered:
            pair = rng.sample(answers, 2)      # for labelled ones, too: others keep their pairs
            if question in labelled:
                continue
            labelled.add(question)             # prompts come again, if there are many
            try:
                key = input(f"\n{question}\n  1  {pair[0]}\n  2  {pair[1]}\n> ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                break
            if key == "q":
                break
            if key in ("1", "2"):
                chosen, rejected = pair if key == "1" else pair[::-1]
                record = {"prompt": question, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(record) + "\n")
                file.flush()                   # a label is work: it is on the disk before the next


def whose_taste(world, labels):
    """How the world's annotators would have chosen -> {"agrees_polite": share, ...}."""
    figures = {"labels": len(labels)}
    for taste in data.TASTES if labels else ():
        gaps = [data.utility(world, question, chosen, taste)
                - data.utility(world, question, rejected, taste)
                for question, chosen, rejected in labels]
        figures[f"agrees_{taste}"] = float(np.mean(0.5 + 0.5 * np.sign(gaps)))
    return figures


def main(argv=None):
    p = argparse.ArgumentParser(description="Label pairs of answers in the terminal.")
    p.add_argument("--prompts", type=positive, default=300, help="questions, half of them how-to")
    p.add_argument("--answers", type=positive, default=8, help="sampled for each; two are shown")
    p.add_argument("--hot", type=float, default=1.4, help="temperature of every other answer")
    p.add_argument("--file", help="where the labels go; default: OUT/my_preferences.jsonl")
    p.add_argument("--init", help="the model that answers; default: OUT/sft.pt")
    p.add_argument("--out", default="out", help="folder of sft.pt")
    p.add_argument("--seed", type=int, default=0, help="seed of the answers and of the pairs")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--record", action="store_true", help="write docs/results/annotate.json")
    args = p.parse_args(argv)
    path = Path(args.file or Path(args.out, "my_preferences.jsonl"))
    init = args.init or Path(args.out, "sft.pt")
    policy = load_gpt(init, "sft.py", pick_device(args.device))
    world = data.world_of(policy)
    questions = reward.preference_prompts(world, "train", args.prompts)
    answered = reward.sample_answers(policy, questions, args.answers, (args.seed, 31), args.hot)
    ask_the_reader(answered, path, args.seed)
    figures = whose_taste(world, labels_in(path))
    print("\n" + "   ".join(f"{name} {round(value, 3)}" for name, value in figures.items()))
    print(f"next: python reward.py --data {path} --batch-size 1 --init {init} --out out/me")
    if args.record:
        data.write_results(ROOT / "docs" / "results", "annotate", figures=figures)


if __name__ == "__main__":
    main()
