"""PPO, RLOO, GRPO, DPO and best of n on one plane: what each buys with its KL.

    python docs/lab/draw_methods.py         needs matplotlib; reads docs/results/seed*_methods.json

Left the score, right the gold utility, against the exact KL to the SFT model: a point a policy and
world, and for each world the exact frontier, which no policy can cross on the left. On the right
one can: the frontier is the best there is for the reward model's score, not for what people want.
Writes docs/methods.png. The files are docs/lab/methods.py's."""
import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "o^sDvP*X"

def main(argv=None):
    p = argparse.ArgumentParser(description="Draw policies beside the exact frontier.")
    p.add_argument("--results", default=str(ROOT / "docs" / "results"), help="of the files")
    p.add_argument("--to", default=str(ROOT / "docs"), help="the folder of the picture")
    args = p.parse_args(argv)
    files = sorted(Path(args.results).glob("seed*_methods.json"))
    if not files:
        raise SystemExit(f"no seed*_methods.json in {args.results}: run docs/lab/methods.py first")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for k, path in enumerate(files):
        record = json.loads(path.read_text(encoding="utf-8"))
        for axis, what in zip(axes, ("score", "gold_utility")):
            label = None if k else "exact frontier"        # one legend for all worlds
            axis.plot(record["edge"]["kl_nats"], record["edge"][what], "k", lw=0.8, label=label)
            for j, (name, row) in enumerate(record["policies"].items()):
                axis.plot(row["kl_nats"], row[what], MARKERS[j % len(MARKERS)], color=f"C{j}",
                          label=None if k else name)
            axis.set(xlabel="KL to SFT, nats", ylabel=what.replace("_", " "))
    axes[1].legend(fontsize=8)
    figure.savefig(Path(args.to, "methods.png"), dpi=110, bbox_inches="tight")
    print(f"wrote {Path(args.to, 'methods.png')}")

if __name__ == "__main__":
    main()
