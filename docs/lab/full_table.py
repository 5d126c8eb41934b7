"""How sure are the figures of Stage 5, and what does its short table leave out?

    python docs/lab/full_table.py --out out --inputs out --eval-prompts 500     rlaif.py's flags
The answers are those of rlaif.py, run with the same flags, and of the base model and OUT's
human_any.pt, human_reason.pt, if there. generic: refused without a reason; intervals: over_verbs.

Found (first edition, seed 0, 500 requests a cell; a/b: G1/G2; generic: G1; win rate over SFT):
           harm G1           harm G2           over-refusal reason generic facts how-to utility win
    base   1.000 [1.00 1.00] 1.000 [1.00 1.00] 1.000/1.000 0.000/0.000 0.000 0.00 0.00 -1.51 0.000
    SFT    0.998 [0.99 1.00] 1.000 [1.00 1.00] 0.008/0.008 0.000/0.000 0.002 0.95 0.99  2.05 0.500
    RLHF   1.000 [1.00 1.00] 1.000 [1.00 1.00] 0.008/0.014 0.000/0.000 0.000 0.96 0.98  2.90 0.819
    SL-CAI 0.002 [0.00 0.01] 0.008 [0.00 0.02] 0.040/0.038 0.986/0.958 0.000 0.92 0.95  2.75 0.778
    RL-CAI 0.006 [0.00 0.01] 0.024 [0.00 0.06] 0.018/0.032 0.966/0.936 0.000 0.94 0.95  2.85 0.806
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import reward
import rlaif
from model import MAX_NEW, answer, load_gpt, pick_device

BASE_TOKENS = 24                  # the base model does not know when to end: a sentence is enough
ROW = "{:8}{:6}" + "{:>18}" * 4 + "{:>13}"
HARMLESS = "fact_accuracy", "howto_accuracy", "utility", "win_rate", "unparseable"

def over_verbs(values, verbs):
    """Mean of N values, 95% interval from 1000 draws of the verbs: requests with one verb succeed
    or fail together. Two verbs, one always right, one never: [.5, 0, 1], for any N."""
    _, which = np.unique(verbs, return_inverse=True)
    sums, counts = np.bincount(which, np.array(values, float)), np.bincount(which)
    drawn = np.random.default_rng(0).integers(0, len(sums), (1000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)      # verbs with more requests weigh more
    return [float(x) for x in (np.mean(values), *np.quantile(means, (0.025, 0.975)))]

def evaluate(name, model, n, seed):
    """By the gold judges -> figures, and utilities on n harmless questions; prints a row a cell."""
    bare, world, unparseable, figures = name == "base", data.world_of(model), [], {}
    ask = lambda questions, *key: answer(model, questions, BASE_TOKENS if bare else MAX_NEW,
                                         seed=(seed, *key), bare=bare)
    for k, cell in enumerate(rlaif.CELLS):
        acts = data.act_prompts(world, "test", n, True, (cell,))
        replies = ask([act.question() for act in acts], 71, k)
        benign = ask([act.twin().question() for act in acts], 72, k)
        said = [list(map(data.classify, data.sentences_of(text))) for text in replies]
        harm = np.array([not data.is_harmless(text) for text in replies])
        found = {"harm": harm, "over_refusal": [not data.is_compliant(text) for text in benign],
                 "reason": [data.gives_reason(act, text) for act, text in zip(acts, replies)],
                 "generic": [not h and "reason" not in kinds for h, kinds in zip(harm, said)]}
        verbs, row = np.array([act.verb.word for act in acts]), []
        for what, values in found.items():
            x, low, high = over_verbs(values, verbs)
            key = f"{what}_{name}_{cell}"
            figures |= {key: x, f"{key}_low": low, f"{key}_high": high}
            row.append(f"{x:.3f} [{low:.2f} {high:.2f}]")
        share, worst = max((harm[verbs == verb].mean(), verb) for verb in set(verbs))
        print(ROW.format(name, cell, *row, f"{worst} {share:.2f}"))
        unparseable += [not data.is_parseable(text) for text in replies + benign]
    questions = reward.preference_prompts(world, "test", n)            # how-to, fact, how-to ...
    texts = ask(questions, 73)
    right = [data.is_correct(world, *both) for both in zip(questions, texts)]
    utilities = [data.utility(world, *both) for both in zip(questions, texts)]
    found = {"fact_accuracy": right[1::2], "howto_accuracy": right[::2], "utility": utilities,
             "unparseable": unparseable}
    return figures | {f"{k}_{name}": float(np.mean(x)) for k, x in found.items()}, utilities

def main(argv=None):
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--record", action="store_true")
    own, rest = p.parse_known_args(argv)
    args = rlaif.read_args(rest)                           # the other flags are rlaif.py's
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, sft_model, helpful = rlaif.load_models(inputs, args, device)
    models = {"sft": sft_model, "base": base, "rlhf": helpful}
    stems = dict(slcai="slcai", rlcai="rlaif", any="human_any", reason="human_reason")
    for name, stem in stems.items():
        if name in ("slcai", "rlcai") or (out / f"{stem}.pt").exists():
            models[name] = load_gpt(out / f"{stem}.pt", "rlaif.py", device)
    figures, against = {}, None
    questions = reward.preference_prompts(data.world_of(base), "test", args.eval_prompts)
    print(ROW.format("", "", "harm", "over-refusal", "reason", "generic", "worst verb"))
    for name, model in models.items():
        new, utilities = evaluate(name, model, args.eval_prompts, args.seed)
        against = against or utilities                     # the first are SFT's
        won = data.win_rate(utilities, against, questions)
        figures |= new | {f"{k}_{name}": float(x) for k, x in won.items()}
        row = [f"{what} {figures[f'{what}_{name}']:.3f}" for what in HARMLESS]
        print(f"{name:9}", *row, sep="  ", end="\n\n")
    data.write_results(out, "full_table", figures=figures)
    if own.record:
        data.write_results(ROOT / "docs" / "results", "full_table", figures=figures)

if __name__ == "__main__":
    main()
