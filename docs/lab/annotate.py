"""What is it like to be the human in RLHF? Two answers at a time, and a key for the better one.

    python docs/lab/annotate.py --prompts 300 --file out/my_preferences.jsonl

reads OUT/sft.pt and appends each choice at once: stop whenever you like, the same command goes on.
Then train on your taste:

    python reward.py --data out/my_preferences.jsonl --batch-size 1 --init out/sft.pt --out out/me
    python ppo.py --init out/sft.pt --out out/me

Found: that is yours to say; and how often each simulated annotator would agree (a tie: half)."""
import argparse
import contextlib
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import reward
from model import load_gpt, natural, number, pick_device, positive

def labels_in(path, world):
    """A file of labels, which may be empty or not there yet -> [(question, chosen, rejected)].
    Stops where no line can be added, or a question is not the world's, and nobody could judge."""
    text = data.read_text(path) if path.exists() else ""   # stops at a folder or a damaged file
    packed = path.suffix.lower() == ".gz" or text and path.read_bytes()[:2] == b"\x1f\x8b"
    if packed or text.lstrip().startswith("["):
        raise SystemExit(f"{path}: no line can be added to gzip or a JSON list: make it JSON lines")
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "ab").close()                   # what could not be kept should not be asked
    pairs = data.read_preferences(path)[0] if text.strip() else []
    labels = [(prompt[-1][1], chosen, rejected) for prompt, chosen, rejected, *_ in pairs]
    for n, (question, *_) in enumerate(labels, 1):
        if world.parse_question(question) is None:
            raise SystemExit(f"{path}, label {n}: {question!r} is not of this world: remove it")
    return labels

def ask_the_reader(answered, path, seed, labels):
    """Two different answers to each question, drawn from [(question, answers)], and a choice by key
    -> lines of `path`, and added to `labels`, which it holds: their questions are skipped."""
    rng, labelled = random.Random(f"reader {seed}"), {question for question, *_ in labels}
    print(f"{len(labelled)} labels so far. Which is better? 1 or 2; Enter: cannot say; q: stop.")
    # 1: a label is work, and on the disk at once. Ctrl-D and Ctrl-C stop as q does
    with open(path, "a", 1, "utf-8") as file, contextlib.suppress(EOFError, KeyboardInterrupt):
        file.write("\n" * (path.read_bytes()[-1:] not in b"\n"))  # an editor may have left it off
        for question, answers in answered:
            pair = rng.sample(answers, 2)      # for labelled ones, too: others keep their pairs
            if question in labelled:
                continue
            labelled.add(question)             # prompts come again, if there are many
            key = input(f"\n{question}\n  1  {pair[0]}\n  2  {pair[1]}\n> ").strip().lower()
            if key == "q":
                return
            if key in ("1", "2"):
                labels.append((question, *(pair if key == "1" else pair[::-1])))
                record = dict(zip(("prompt", "chosen", "rejected"), labels[-1]))
                file.write(json.dumps(record) + "\n")

def whose_taste(world, labels):
    """How the world's annotators would have chosen -> {"agrees_polite": share, ...}."""
    figures = {"labels": len(labels)}
    for taste in data.TASTES if labels else ():
        gaps = [data.utility(world, question, chosen, taste)
                - data.utility(world, question, other, taste) for question, chosen, other in labels]
        figures[f"agrees_{taste}"] = float(np.mean(0.5 + 0.5 * np.sign(gaps)))
    return figures

def main(argv=None):
    p = argparse.ArgumentParser(description="Label pairs of answers in the terminal.")
    p.add_argument("--prompts", type=positive, default=300, help="questions, half of them how-to")
    p.add_argument("--answers", type=number(2, 999, int), default=8, help="for each; two are shown")
    p.add_argument("--hot", type=number(0, 9), default=1.4, help="temperature of every other")
    p.add_argument("--file", help="where the labels go; default: OUT/my_preferences.jsonl")
    p.add_argument("--init", help="the model that answers; default: OUT/sft.pt")
    p.add_argument("--out", default="out", help="folder of sft.pt")
    p.add_argument("--seed", type=natural, default=0, help="seed of answers and pairs")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--record", action="store_true", help="write docs/results/annotate.json")
    args = p.parse_args(argv)
    path = Path(args.file or Path(args.out, "my_preferences.jsonl"))
    init = args.init or Path(args.out, "sft.pt")
    policy = load_gpt(init, "sft.py", pick_device(args.device))
    world = data.world_of(policy)
    labels = labels_in(path, world)            # before the work, not after it
    asked = reward.preference_prompts(world, "train", args.prompts)
    answered = reward.sample_answers(policy, asked, args.answers, (args.seed, 31), args.hot)
    ask_the_reader(answered, path, args.seed, labels)
    figures = whose_taste(world, labels)
    print("\n" + "   ".join(f"{name} {round(value, 3)}" for name, value in figures.items()))
    print(f"next: python reward.py --data {path} --batch-size 1 --init {init} --out out/me")
    if args.record:
        data.write_results(ROOT / "docs" / "results", "annotate", figures=figures)

if __name__ == "__main__":
    main()
