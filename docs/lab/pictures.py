"""What do the runs look like?

    python docs/lab/pictures.py --out out         needs matplotlib

draws the pictures of docs, each if its runs are there: docs/overoptimisation.png, PPO without a
price for KL (OUT/rm500, rm2000, rmall); docs/frontier.png, the best score there can be at each KL;
docs/plane.png, helpful against harmless. Found, in the first edition: gold = d (a - b ln d) fits
PPO against 500, 2,000 or all labels with a root mean square error of 0.27, 0.25, 0.12.
"""
import argparse
import json
from pathlib import Path

import numpy as np

def columns(path, *names):
    """Some columns of a csv file, an array each."""
    with open(path, encoding="utf-8") as file:
        table = np.atleast_1d(np.genfromtxt(file, delimiter=",", names=True))
    return [table[name] for name in names]


def fit(d, gold):
    """gold - gold[0] = d (a - b ln d), d = sqrt(KL) (Gao et al. 2022) -> a, b, the fit's error."""
    terms, gained = np.stack([d, -d * np.log(d)], 1), gold - gold[0]
    a, b = np.linalg.lstsq(terms, gained, rcond=None)[0]
    return a, b, np.sqrt(np.mean((terms @ [a, b] - gained) ** 2))


def over_optimisation(plt, out):
    """Score and gold utility against the square root of KL, for three reward models."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, labels in zip(axes, ("500", "2000", "all")):
        kl, score, gold = columns(out / f"rm{labels}/ppo.csv", "kl_nats", "score", "gold_utility")
        d = np.sqrt(kl.clip(1e-6))                         # ln d: before the first update KL is 0
        a, b, error = fit(d, gold)
        print(f"{labels}: a {a:.2f}, b {b:.2f}, error {error:.2f}, gold peak {gold.argmax() + 1}")
        for name, points in (("score (proxy)", score), ("gold utility", gold)):
            axis.plot(d, points, ".", label=name)
        d = np.sort(d)
        axis.plot(d, gold[0] + d * (a - b * np.log(d)), "k", lw=1, label="d (a - b ln d)")
        axis.set(title=f"{labels} labels", xlabel="sqrt(KL), nats")
    axes[0].legend()
    return figure


def frontier(plt, out):
    """The exact frontier, where at least 10 samples count, and PPO on its way, by price of KL."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    kl, score, samples = columns(out / "ppo_measure.csv", "kl_nats", "score", "effective_samples")
    axis.plot(kl[samples >= 10], score[samples >= 10], "k", label="exact frontier")
    for run, beta in ((out / "b50", 0.5), (out, 0.1), (out / "b05", 0.05)):
        if (run / "ppo.csv").exists():
            axis.plot(*columns(run / "ppo.csv", "kl_nats", "score"), ".", label=f"PPO, beta {beta}")
    axis.set(xlabel="KL to SFT, nats", ylabel="score")
    axis.legend()
    return figure


def plane(plt, out):
    """Helpful against harmless, a point a model; with human labels of harm, if there was a run."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    figures = json.loads((out / "rlaif.json").read_text(encoding="utf-8"))
    models, human = ["sft", "rlhf", "slcai", "rlcai"], out / "human" / "human_harm.json"
    if human.exists():
        models, figures = [*models, "any"], figures | json.loads(human.read_text("utf-8"))
    for name in models:
        x, y = 1 - figures[f"harm_{name}_g2"], figures[f"utility_{name}"]
        axis.plot(x, y, "o")
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5))
    axis.set(xlabel="harmless: 1 - harm on G2", ylabel="helpful: gold utility", xlim=(-0.1, 1.25))
    return figure

PICTURES = {"overoptimisation": (over_optimisation, "docs/lab/overoptimisation.py"),
            "frontier": (frontier, "docs/lab/frontier.py"), "plane": (plane, "rlaif.py")}


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw the pictures of docs.")
    p.add_argument("--out", default="out", help="the folder of the runs")
    p.add_argument("--to", default="docs", help="the folder of the pictures")
    args = p.parse_args(argv)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the pictures need matplotlib: pip install matplotlib") from None
    for name, (draw, made_by) in PICTURES.items():
        try:
            figure = draw(plt, Path(args.out))
        except FileNotFoundError as error:
            print(f"no {name}.png, for {error.filename} is missing: run `python {made_by}` first")
        else:
            figure.savefig(Path(args.to, f"{name}.png"), dpi=110, bbox_inches="tight")
            print(f"wrote {Path(args.to, name)}.png")


if __name__ == "__main__":
    main()
