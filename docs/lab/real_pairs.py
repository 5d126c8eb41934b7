"""Real preferences for all stages: a file of pairs becomes what sft.py, reward.py, ppo.py and
rlaif.py read, no question on both sides; and how good is a reward model on those held out?

    python docs/lab/real_pairs.py split FILE --out out/real     HH-RLHF's lines, or other pairs
    python sft.py --init FOLDER --data out/real/talks.jsonl --out out/real
    python reward.py --data out/real/pairs.jsonl --out out/real
    python docs/lab/real_pairs.py judge --out out/real

`split` writes talks.jsonl (the chosen sides), pairs.jsonl (both), held_out.jsonl (300 pairs whose
first questions are in neither) and asked.jsonl (first questions, for ppo.py and rlaif.py). `judge`
reads held_out.jsonl and OUT/reward.pt: its accuracy, with a 95% interval from drawing questions
anew, beside that of a coin, .5, and of "the longer answer wins"."""
import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import data
import reward
from model import load_gpt, natural, pick_device, positive, writable

def as_messages(turns):
    """[(role, text)] -> what {"messages"} and "prompt" hold."""
    return [{"role": role, "content": text} for role, text in turns]

def split(args, out):
    """Shuffle the questions; hold out pairs until there are enough; write the files."""
    files = [out / f"{name}.jsonl" for name in ("held_out", "pairs", "talks", "asked")]
    if Path(args.file).resolve() in [file.resolve() for file in files]:
        raise SystemExit(f"{args.file} would be overwritten: choose another --out")
    pairs, skipped = data.read_preferences(args.file)
    by_question = defaultdict(list)                        # a talk and its continuation: one side
    for pair in pairs:
        by_question[pair[0][0][1]].append(pair)
    questions, held_out = sorted(by_question), []
    random.Random(f"real pairs {args.seed}").shuffle(questions)
    while questions and len(held_out) < args.held_out:
        held_out += by_question[questions.pop()]
    learn = [pair for question in questions for pair in by_question[question]]
    if not learn:
        raise SystemExit(f"{args.file}: {len(pairs)} pairs, all held out: lower --held-out")
    record = lambda prompt, chosen, rejected, won, lost: {
        "prompt": as_messages(prompt), "chosen": chosen, "rejected": rejected, "votes": [won, lost]}
    talks = [[*prompt, ("assistant", chosen)] for prompt, chosen, *_ in learn]
    contents = ([record(*pair) for pair in held_out], [record(*pair) for pair in learn],
                [{"messages": as_messages(talk)} for talk in talks],
                [{"prompt": question} for question in questions])
    for file, records in zip(files, contents):
        data.write_lines(file, records)
    print(f"skipped: {data.reasons(skipped)}\n{out}: {len(learn)} pairs and talks to learn from, "
          f"{len(questions)} first questions, {len(held_out)} pairs held out")

def longer_wins(answers, labels):
    """How often "the longer one wins" agrees with the labels of one question; of equal length: one
    half. Ties are left out, as in reward.agreement; nan if there is nothing else."""
    words = [len(answer.split()) for answer in answers]
    right = [np.sign(words[i] - words[j]) * np.sign(t - 0.5) for i, j, t in labels if t != 0.5]
    return (np.mean(right) + 1) / 2 if right else np.nan

def judge(args, out):
    """Accuracy on the held-out pairs that fit the context -> figures, printed and written."""
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", pick_device(args.device))
    model = reward.load_reward(out / "reward.pt", policy)
    groups = reward.groups_from_file(out / "held_out.jsonl", policy)
    with torch.no_grad():
        figures = reward.agreement(model, groups)
    figures["longer_wins"] = float(np.nanmean([longer_wins(*group[1:]) for group in groups]))
    print("\n" + "  ".join(f"{name} {x:.4g}" for name, x in figures.items()) + "  (a coin: 0.5)")
    data.write_results(out, "real_pairs", figures=figures)

def main(argv=None):
    p = argparse.ArgumentParser(description="Split real preferences; judge a reward model.")
    p.add_argument("what", choices=["split", "judge"])
    p.add_argument("file", nargs="?", help="of the pairs, for split")
    p.add_argument("--held-out", type=positive, default=300, help="pairs, at least")
    p.add_argument("--init", help="what reward.pt began as, for judge; default: OUT/sft.pt")
    p.add_argument("--out", type=writable, default="out/real", help="of all files")
    p.add_argument("--seed", type=natural, default=0, help="of the split")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    args = p.parse_args(argv)
    if args.what == "split" and not args.file:
        p.error("split needs the file of the pairs")
    {"split": split, "judge": judge}[args.what](args, Path(args.out))

if __name__ == "__main__":
    main()
