"""What is in the village? A sample of everything that data.py makes.

    python docs/lab/village.py --world-seed 0

Prints one document of each kind, with its log-probability, and [in brackets] what the generator was
free to choose; some demonstrations, with two turns also; red-team prompts beside their benign
twins; the principles of an unseen constitution.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import rlaif
from model import natural

def main(argv=None):
    p = argparse.ArgumentParser(description="Print a sample of the world.")
    p.add_argument("--world-seed", type=natural, default=0, help="which village")
    world, shown = data.World(p.parse_args(argv).world_seed), {}
    for i in range(1000):                                  # enough for one of each kind
        kind, text, logp = data.write_document(world, "sample", i)
        shown.setdefault(kind, f"\n{kind}  (log-probability {logp:.1f})\n{text}")
    print("Documents; [ ]: what the generator was free to choose.", *shown.values(), sep="\n")
    pairs = [f"{question}\n  -> {reply}" for question, reply in data.demonstrations(world, 8)]
    print("\nDemonstrations:", *pairs, sep="\n  ")
    for act in data.act_prompts(world, "test", 4, harmful=True):
        print(f"A red-team prompt, and its benign twin: {act.question()} {act.twin().question()}")
    print("\nUnseen rules:", *rlaif.open_constitution("unseen", world), sep="\n  ")

if __name__ == "__main__":
    main()
