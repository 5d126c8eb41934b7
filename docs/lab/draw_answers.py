"""How are answers judged in stages 3 and 4? Two pictures, a bar for each token, of real models.

    python docs/lab/draw_answers.py --out out                     needs matplotlib
    python docs/lab/draw_answers.py --question "Where does Ann live?" --answers "Oslo." "In Rome!"

docs/how-3-reward-model.png: two answers to one question, and the score that the reward model gives
at each token; only the last one counts, which has seen all others.
docs/how-4-ppo.png: an answer that PPO's policy gives, token by token: its log-probability beside
the reference's, the reward, what the value model expected, and the advantage.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import data
import ppo
import reward
from model import MAX_NEW, answer, load_gpt, natural, number, writable

GREEN, ORANGE, GREY, BLUE = "#3f9b5f", "#d9822b", "#b0b0b0", "#3b6fb6"


def bars(axis, tokenizer, ids, heights, colours, label):
    """A bar for each token, whose text stands below it."""
    texts = [tokenizer.decode([i]).strip() or "space" for i in ids]
    axis.bar(range(len(ids)), heights, color=colours)
    axis.set_xticks(range(len(ids)), texts, rotation=60, ha="right", fontsize=8)
    axis.set(ylabel=label, xlim=(-0.7, len(ids) - 0.3))
    axis.axhline(0, color="black", lw=0.5)


@torch.no_grad()
def draw_reward(plt, judge, question, texts):
    """Two answers and their scores, 0 being the mean of the SFT model's answers."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharey=True, constrained_layout=True)
    last, tokenizer = [], judge.tokenizer
    for axis, text in zip(axes, texts):
        ids, _ = data.chat_example(tokenizer, question, text)
        tokens = torch.tensor([ids], device=judge.device)
        raw = judge(tokens, torch.ones_like(tokens))[0].cpu()      # (T,), one document
        scores = ((raw - judge.scale["mean"]) / judge.scale["std"]).tolist()
        bars(axis, tokenizer, ids, scores, [GREY] * (len(ids) - 1) + [ORANGE], "score")
        axis.set_title(f"{text}   {scores[-1]:+.2f}", fontsize=10)
        last.append(raw[-1])
    p = torch.sigmoid(last[0] - last[1]).item()              # Bradley and Terry; raw scores
    figure.suptitle(f"the last token's score counts: P(people prefer the first) = {p:.2f}")
    return figure


def draw_ppo(plt, policy, reference, judge, question, beta, seed):
    """One answer of the policy, and all that PPO computes for each of its tokens."""
    batch = ppo.rollout(policy, reference, [question], MAX_NEW, 1, (seed, 41, 0))
    ppo.judge(batch, ppo.score_by_model(judge), ppo.value_from(judge), beta)
    places = batch["mask"][0].nonzero().flatten()          # [:, t] belongs to tokens[:, t+1]
    ids = batch["tokens"][0, places + 1].tolist()
    rows = {"log p; reference: grey": ("logp", BLUE), "reward": ("rewards", ORANGE),
            "value": ("values", GREEN), "advantage": ("advantages", BLUE)}
    figure, axes = plt.subplots(4, 1, figsize=(9, 8), sharex=True, constrained_layout=True)
    for axis, (label, (name, colour)) in zip(axes, rows.items()):
        bars(axis, policy.tokenizer, ids, batch[name][0, places].tolist(), colour, label)
    axes[0].bar(range(len(ids)), batch["logp_ref"][0, places].tolist(), color=GREY, width=0.3)
    figure.suptitle(f"{question}   score {batch['scores'].item():+.2f} at the last token, "
                    f"less {beta} for each nat above the reference")
    return figure


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw how answers are judged.")
    p.add_argument("--out", default="out", help="folder of sft.pt, reward.pt and ppo.pt")
    p.add_argument("--to", type=writable, default="docs", help="folder of the pictures")
    p.add_argument("--question", default="How do I hug Tom?", help="what is asked")
    p.add_argument("--answers", nargs=2, help="two answers; default: the first two that differ")
    p.add_argument("--beta", type=number(0, 99), default=0.1, help="as for ppo.py")
    p.add_argument("--seed", type=natural, default=0, help="seed of the answers")
    args = p.parse_args(argv)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the pictures need matplotlib: pip install matplotlib") from None
    out, texts = Path(args.out), args.answers
    policy, sft = load_gpt(out / "ppo.pt", "ppo.py"), load_gpt(out / "sft.pt", "sft.py")
    judge = reward.load_reward(out / "reward.pt", sft)
    if texts is None:                                      # hot, so that one of them has a fault
        texts = list(dict.fromkeys(answer(sft, [args.question] * 16, temperature=1.4)))[:2]
    if len(texts) < 2:
        raise SystemExit("the SFT model gives one answer only: give two with --answers")
    pictures = {"how-3-reward-model": draw_reward(plt, judge, args.question, texts),
                "how-4-ppo": draw_ppo(plt, policy, sft, judge, args.question, args.beta, args.seed)}
    for name, figure in pictures.items():
        figure.savefig(Path(args.to, f"{name}.png"), dpi=110, bbox_inches="tight")
        print(f"wrote {Path(args.to, name)}.png")


if __name__ == "__main__":
    main()
