"""Does harm fall with the rounds of revision as it should?

    python docs/lab/harm_by_round.py     reads rlaif.py's OUT/rlaif_traces.jsonl and slcai.pt

After k rounds (1 - h q)^k of it should be left. The chance h that a drawn principle covers a fault
is known from the constitution; q, the chance that a covered fault is mended, is taken from round 1
on the second half of the prompts, and what it predicts is compared with the first half. A line a
round: measured, predicted, and predicted with a q for each verb: verbs that are never mended stay.

Found (first edition, seed 0; h = 0.500): measured 0.495, 0.276, 0.149, 0.077; predicted 0.501,
0.251, 0.126, 0.063. What is left falls a little more slowly than predicted."""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import rlaif
from model import load_gpt

def predicted_harm(h, q, k):
    """Harm left after k rounds, (1 - h q)^k: h = .5 and q = .9 leave .55, then .3025, and so on.
    Arrays (N,), an entry for each prompt, make a mixture: the mean over them."""
    return float(np.mean((1 - np.asarray(h) * np.asarray(q)) ** k))

def mended_by_verb(traces, verbs):
    """Round 1 of these prompts -> {verb: [was the fault mended?, ...]}, of those faults that the
    drawn principle covered."""
    mended = {}
    for trace, verb in zip(traces, verbs):
        before, after = (not data.is_harmless(text) for text in trace["answers"][:2])
        if before and data.covers(trace["steps"][0]["principle"], verb.kind):
            mended.setdefault(verb, []).append(not after)
    return mended

def compare(traces, world, constitution):
    """-> figures: h, q, and for each round k harm_measured_k, harm_predicted_k, harm_mixture_k."""
    acts, half = [world.parse_question(trace["question"]) for trace in traces], len(traces) // 2
    if not all(isinstance(act, data.Act) for act in acts):
        raise SystemExit("these requests are not the world's: nobody knows their kind of harm")
    verbs = [act.verb for act in acts]
    mended = mended_by_verb(traces[half:], verbs[half:])
    here = [i for i in range(half) if not data.is_harmless(traces[i]["answers"][0])]
    if not mended or not here:
        raise SystemExit("no harmful answer that a principle covers: there is nothing to predict")
    q = float(np.mean(sum(mended.values(), [])))
    q_of = {verb: np.mean(values) for verb, values in mended.items()}
    h_of = {}
    for kind in data.HARMS:
        h_of[kind] = np.mean([data.covers(rule, kind) for rule in constitution])
    hs, qs = [h_of[verbs[i].kind] for i in here], [q_of.get(verbs[i], q) for i in here]
    figures = {"h": float(np.mean(hs)), "q": q}
    for k in range(1, len(traces[0]["answers"])):
        harmful = [not data.is_harmless(traces[i]["answers"][k]) for i in here]
        figures |= {f"harm_measured_{k}": float(np.mean(harmful)),
                    f"harm_predicted_{k}": predicted_harm(np.mean(hs), q, k),
                    f"harm_mixture_{k}": predicted_harm(hs, qs, k)}
    return figures

def read_traces(path):
    """OUT/rlaif_traces.jsonl -> its records; stops at one that rlaif.py did not write."""
    traces = []
    for place, trace, _ in data.read_records(path):
        try:
            steps, answers = trace["steps"], trace["answers"]
            texts = [trace["question"], *answers, *[step["principle"] for step in steps]]
            # a first answer and one a round; and all requests went through as many rounds
            fine = len(answers) - 1 == len(steps) == len((traces or [trace])[0]["steps"]) > 0
        except (KeyError, TypeError):                      # no dict, or other keys
            fine = False
        if not fine or not all(isinstance(text, str) for text in texts):
            form = '{"question", "answers", "steps"}, alike in all lines'
            data.unreadable(path, place, trace, [f"{form}: run `python rlaif.py` again"])
        traces.append(trace)
    return traces

def main(argv=None):
    p = argparse.ArgumentParser(description="Harm after each round, beside (1 - hq)^k.")
    p.add_argument("--out", default="out", help="folder of rlaif_traces.jsonl and slcai.pt")
    p.add_argument("--constitution", help="that of the run: unseen, or a file; default: rlaif.py's")
    p.add_argument("--record", action="store_true", help="write docs/results/harm_by_round.json")
    args = p.parse_args(argv)
    path = Path(args.out, "rlaif_traces.jsonl")
    traces = read_traces(path) if path.exists() else []
    if not traces:
        raise SystemExit(f"{path} is not there, or holds nothing: run `python rlaif.py` first")
    world = data.world_of(load_gpt(Path(args.out, "slcai.pt"), "rlaif.py"))
    figures = compare(traces, world, rlaif.open_constitution(args.constitution, world))
    print(f"h = {figures['h']:.3f}, q = {figures['q']:.3f}\n round  measured  predicted  by verb")
    for k in range(1, len(traces[0]["answers"])):
        row = [figures[f"harm_{name}_{k}"] for name in ("measured", "predicted", "mixture")]
        print(f"{k:6}{row[0]:10.3f}{row[1]:11.3f}{row[2]:9.3f}")
    if args.record:
        data.write_results(ROOT / "docs" / "results", "harm_by_round", figures=figures)

if __name__ == "__main__":
    main()
