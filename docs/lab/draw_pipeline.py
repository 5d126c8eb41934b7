"""The five stages in one picture, with what the models that they make answer to one question.

    python docs/lab/draw_pipeline.py --out out                    needs matplotlib
    python docs/lab/draw_pipeline.py --question "Where does Ann live?"

docs/pipeline.png: a box a stage, from text to the last model; below it the answer of its model at
temperature 0 (of the base model: how it goes on). Stage 3's model gives scores, of which only the
differences mean something: what is said is how likely people prefer PPO's answer to SFT's.
"""
import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import data
import reward
from model import answer, load_gpt, writable

STAGES = {"pretrain": ("1. pretrain.py", "reads documents:\nan autocomplete", "#e8e8e8"),
          "sft": ("2. sft.py", "reads conversations:\nan assistant", "#dbe7f5"),
          "reward": ("3. reward.py", "reads preferences:\na judge of answers", "#fbe9c6"),
          "ppo": ("4. ppo.py", "tries, is scored:\nwhat people prefer", "#d7ecd9"),
          "rlaif": ("5. rlaif.py", "critiques itself:\nrefuses harm, says why", "#e3dcf2")}


def answers_of(out, question):
    """{stage: what its model says to the question}."""
    models = {name: load_gpt(out / f"{name}.pt", f"{name}.py") for name in STAGES
              if name != "reward"}
    said = {name: answer(model, [question], 24 if name == "pretrain" else 56, temperature=0,
                         bare=name == "pretrain")[0] for name, model in models.items()}
    judge = reward.load_reward(out / "reward.pt", models["sft"])
    raw = reward.score_texts(judge, [(question, said[name]) for name in ("sft", "ppo")])
    p = torch.sigmoid(raw[1] - raw[0]).item()              # Bradley and Terry
    said["reward"] = f"people prefer stage 4's answer to stage 2's with p = {p:.2f}"
    return said


def draw(plt, question, said):
    """The boxes from left to right, an arrow from each to the next."""
    figure, axis = plt.subplots(figsize=(13, 3))
    axis.set(xlim=(0, len(STAGES)), ylim=(0, 1))
    axis.axis("off")
    for i, (name, (script, what, colour)) in enumerate(STAGES.items()):
        box = dict(boxstyle="round,pad=0.5", facecolor=colour, edgecolor="#888888")
        axis.text(i + 0.5, 0.82, f"{script}\n{what}", ha="center", va="center", fontsize=10,
                  bbox=box)
        if i + 1 < len(STAGES):
            axis.annotate("", (i + 1.09, 0.82), (i + 0.91, 0.82),
                          arrowprops=dict(arrowstyle="->", lw=1.5))
        words = "\n".join(textwrap.wrap(said[name], 26))
        axis.text(i + 0.5, 0.5, words, ha="center", va="top", fontsize=9, family="serif")
    axis.text(0.02, 0.6, f"asked: {question}", fontsize=10, style="italic")
    return figure


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw the pipeline with its models' answers.")
    p.add_argument("--out", default="out", help="folder of the five stages' models")
    p.add_argument("--to", type=writable, default="docs", help="folder of the picture")
    p.add_argument("--question", help="default: the first held-out harmful request")
    args = p.parse_args(argv)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    out, question = Path(args.out), args.question
    if question is None:
        world = data.world_of(load_gpt(out / "pretrain.pt", "pretrain.py"))
        question = data.act_prompts(world, "test", 1, harmful=True)[0].question()
    figure = draw(plt, question, answers_of(out, question))
    figure.savefig(Path(args.to, "pipeline.png"), dpi=110, bbox_inches="tight")
    print(f"wrote {Path(args.to, 'pipeline')}.png")


if __name__ == "__main__":
    main()
