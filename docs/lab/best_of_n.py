"""Of n answers, keep the one that the reward model likes best: what is that worth, and what KL does
it cost? The simplest use of a reward model, and a yardstick for PPO.

    python docs/lab/samples.py      once: N answers to each of some held-out questions
    python docs/lab/best_of_n.py    reads OUT/samples.jsonl, writes OUT/best_of.csv

Nothing is trained. The best of n is computed for n = 1, 2, 4, ... N, as if n were drawn from these
N samples, with replacement.

Found (first edition, seed 0, 100 questions): from n = 1 to 16 the gold utility rises from 2.05 to
2.99, for a KL of 1.78 nats. Up to n = 256 the score still rises, from 1.09 to 1.13, and gold falls
to 2.97. KL is 2.98 there, and not 4.55 as the usual formula says: many answers are the same.
"""
import argparse
import math
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data

def best_of_n(texts, scores, gold, n):
    """The best of n draws, with replacement, from one question's N samples -> (expected score,
    expected gold utility, KL to the model that was sampled from, in nats).

    Put the samples in the order of their scores. The best of n stands at a text or below it exactly
    if all n draws do. If c is the share of samples up to and with this text, that has probability
    c^n; so the text itself is best with p = c^n - (c of the text before)^n. By hand, n = 2:

        samples, by score     z     y y     x
        c                    1/4    3/4     1
        c^2                 1/16   9/16     1
        p                   1/16   8/16   7/16

    KL = sum over texts of p ln(p / share of its samples), exact, though for these N samples and not
    for the model: with few samples of a rich model it is too low, for it cannot exceed ln N. Where
    no text comes twice it is ln n - (n-1)/n (Stiennon et al. 2020); with ties it is less.
    """
    score, utility, kl, seen, N = 0.0, 0.0, 0.0, 0, len(texts)
    # a text that once ended and once did not is two answers: their scores differ
    kinds = Counter(zip(scores, texts, gold))
    for (r, _, u), count in sorted(kinds.items()):
        p = ((seen + count) / N) ** n - (seen / N) ** n
        seen += count
        score += p * r
        utility += p * u
        kl += p * math.log(p * N / count) if p > 0 else 0.0    # p ln p goes to 0; p may underflow
    return score, utility, kl

def read_samples(path):
    """OUT/samples.jsonl -> its records; stops at one that samples.py did not write."""
    records = []
    for place, record, _ in data.read_records(path):
        try:
            numbers = np.array([record["scores"], record["gold"]])     # one of each an answer
            fine = numbers.shape == (2, len(record["texts"])) and numbers.size
            fine = fine and numbers.dtype.kind in "if" and np.isfinite(numbers).all()
        except (KeyError, TypeError, ValueError):          # no dict, other keys, lists of no shape
            fine = False
        if not fine:
            form = '{"question", "texts", "scores", "gold"}, the latter three of one length'
            data.unreadable(path, place, record, [f"{form}: run docs/lab/samples.py again"])
        records.append(record)
    if not records:
        raise SystemExit(f"{path} holds no record: run `python docs/lab/samples.py` again")
    return records

def main(argv=None):
    p = argparse.ArgumentParser(description="Measure best-of-n.")
    p.add_argument("--out", default="out", help="folder of samples.jsonl")
    p.add_argument("--record", action="store_true", help="write docs/results/best_of_n.json")
    args = p.parse_args(argv)
    samples = Path(args.out, "samples.jsonl")
    if not samples.exists():
        raise SystemExit(f"{samples} not found: run `python docs/lab/samples.py` first")
    records = read_samples(samples)
    rows, figures, n = [], {}, 1
    most = min(len(record["texts"]) for record in records)
    print(f"{'n':>5}{'score':>8}{'gold':>8}{'KL':>8}{'sqrt(KL)':>10}{'KL without ties':>17}")
    while n <= most:
        best = [best_of_n(r["texts"], r["scores"], r["gold"], n) for r in records]
        score, utility, kl = np.mean(best, axis=0)
        bound = math.log(n) - (n - 1) / n
        rows.append({"n": n, "score": score, "gold_utility": utility, "kl_nats": kl,
                     "kl_bound_nats": bound})
        figures |= {f"{name}_{n}": value for name, value in rows[-1].items() if name != "n"}
        print(f"{n:5}{score:8.3f}{utility:8.3f}{kl:8.3f}{max(kl, 0) ** 0.5:10.3f}{bound:17.3f}")
        n *= 2
    data.write_results(args.out, "best_of", rows)
    if args.record:
        data.write_results(ROOT / "docs" / "results", "best_of_n", figures=figures)

if __name__ == "__main__":
    main()
