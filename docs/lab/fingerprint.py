"""What kind of answers does a model give: right, polite, to the point, long?

    python reward.py --annotator curt --init out/sft.pt --out out/curt    (and so for chatty)
    python ppo.py --init out/sft.pt --out out/curt
    python docs/lab/fingerprint.py out/sft.pt out/ppo.pt out/curt/ppo.pt out/chatty/ppo.pt

A line a model, on the same held-out questions, how-to and facts by turns. `needless` counts the
sentences that neither answer nor are the one polite phrase; `gold` is what the answers are worth to
an annotator of --taste.

Found (first edition, seed 0): three annotators make three products of one base model.
    words, polite, needless, correct    SFT     8.2  0.31  0.36  0.948
                                        polite  8.7  0.98  0.02  0.980
                                        curt    4.7  0.00  0.00  0.988
                                        chatty 16.9  0.00  2.00  0.978
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import reward
from model import answer, load_gpt, natural, pick_device, positive

def fingerprint(world, questions, answers, taste):
    """Answers to questions -> the mean of each trait; how-to questions and facts take turns."""
    kinds = [list(map(data.classify, data.sentences_of(text))) for text in answers]
    right = [data.is_correct(world, q, text) for q, text in zip(questions, answers)]
    traits = {"gold": [data.utility(world, q, text, taste) for q, text in zip(questions, answers)],
              "correct": right, "howto_correct": right[::2], "facts_correct": right[1::2],
              "polite": ["polite" in kind for kind in kinds],
              "needless": [len(kind) - ("polite" in kind) - ("core" in kind) for kind in kinds],
              "words": [len(text.split()) for text in answers]}
    return {trait: float(np.mean(values)) for trait, values in traits.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description="What kind of answers each model gives.")
    p.add_argument("checkpoints", nargs="+", help="models of one world, such as out/sft.pt")
    p.add_argument("--taste", choices=data.TASTES, default="polite", help="whose gold utility")
    p.add_argument("--prompts", type=positive, default=1000, help="held-out questions")
    p.add_argument("--seed", type=natural, default=0, help="seed of the answers")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--record", action="store_true", help="write docs/results/fingerprint.json")
    args = p.parse_args(argv)
    device, figures = pick_device(args.device), {}
    models = {path: load_gpt(path, device=device) for path in args.checkpoints}
    first = models[args.checkpoints[0]]
    world, width = data.world_of(first), max(map(len, models))
    for path, model in models.items():
        if model.world_seed != first.world_seed:
            raise SystemExit(f"{path} and {args.checkpoints[0]} are of different worlds: the same "
                             "questions would be about other people")
    questions = reward.preference_prompts(world, "test", args.prompts)
    for path, model in models.items():
        # the seed of the PPO model's answers in ppo.py: there its figures are the same
        texts = answer(model, questions, seed=(args.seed, 43))
        row = fingerprint(world, questions, texts, args.taste)
        figures |= {f"{trait}_{path}": x for trait, x in row.items()}
        print(f"{path:{width}}", *[f"  {trait} {x:.3f}" for trait, x in row.items()])
    if args.record:
        data.write_results(ROOT / "docs" / "results", "fingerprint", figures=figures)


if __name__ == "__main__":
    main()
