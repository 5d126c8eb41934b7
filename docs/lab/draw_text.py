"""What do stages 1 and 2 do with a text? Two pictures, a bar for each token, of real models.

    python docs/lab/draw_text.py --out out                        needs matplotlib
    python docs/lab/draw_text.py --document "Ann lives in Oslo." --question "Where does Ann live?"

docs/how-1-pretraining.png: the loss at each token of a held-out document, or of yours. It is large
where the generator had a choice, and near 0 where what stands before leaves none.
docs/how-2-sft.png: a conversation, before SFT and after: the loss counts the assistant's tokens.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F

import data
from model import load_gpt, natural, writable

GREEN, ORANGE, GREY, BLUE = "#3f9b5f", "#d9822b", "#b0b0b0", "#3b6fb6"


def bars(axis, tokenizer, ids, heights, colours):
    """A bar in nats for each token, whose text stands below it."""
    texts = [tokenizer.decode([i]).strip() or "space" for i in ids]
    axis.bar(range(len(ids)), heights, color=colours)
    axis.set_xticks(range(len(ids)), texts, rotation=60, ha="right", fontsize=8)
    axis.set(ylabel="loss, nats", xlim=(-0.7, len(ids) - 0.3))


@torch.no_grad()
def losses_of(model, ids):
    """The loss in nats at each of these ids but the first."""
    ids = torch.tensor(ids, device=model.device)
    return F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").tolist()


def draw_pretraining(plt, model, given, number):
    """The losses of a document of the world, or of the `given` text, and their mean."""
    tokenizer, text, logp = model.tokenizer, given, None
    if given is None:
        world = data.world_of(model)
        _, text, logp = data.write_document(world, "validation", number, without=model.without)
    ids, forced = data.encode_document(tokenizer, text)
    losses = losses_of(model, [tokenizer.eot, *ids])       # the end-of-text before it: no choice
    figure, axis = plt.subplots(figsize=(11, 2.8))
    bars(axis, tokenizer, ids, losses, [BLUE if f and logp else ORANGE for f in forced])
    title = f"mean {sum(losses) / len(ids):.2f} nats a token"
    if logp:                                               # of a text of yours nobody knows it
        axis.axhline(-logp / len(ids), color="black", lw=1, ls="--")
        title += (f"; what the generator's choices cost it (dashed): {-logp / len(ids):.2f}. "
                  "Orange: a choice; blue: none")
    axis.set_title(title, fontsize=10)
    return figure


def draw_sft(plt, models, question, reply):
    """One conversation, the loss at each token by the models before and after SFT."""
    tokenizer = models["after SFT"].tokenizer
    ids, mask = data.chat_example(tokenizer, question, reply)
    colours = [GREEN if counts else GREY for counts in mask[1:]]   # of all but the first token
    figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharey=True, constrained_layout=True)
    for axis, (name, model) in zip(axes, models.items()):
        losses = losses_of(model, ids)
        counted = [x for x, counts in zip(losses, mask[1:]) if counts]
        bars(axis, tokenizer, ids[1:], losses, colours)
        axis.set_title(f"{name}: {sum(counted) / len(counted):.2f} nats a token of the assistant "
                       "(green), which alone are in the loss", fontsize=10)
    return figure


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw how stages 1 and 2 look at a text.")
    p.add_argument("--out", default="out", help="folder of pretrain.pt and sft.pt")
    p.add_argument("--to", type=writable, default="docs", help="folder of the pictures")
    p.add_argument("--document", help="a text of yours; default: a held-out document")
    p.add_argument("--number", type=natural, default=3, help="which of the held-out documents")
    p.add_argument("--question", default="Where does Ann live?", help="the user's part")
    p.add_argument("--reply", help="the assistant's; default: the right answer, in full")
    args = p.parse_args(argv)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the pictures need matplotlib: pip install matplotlib") from None
    before = load_gpt(Path(args.out, "pretrain.pt"), "pretrain.py")
    models = {"before SFT": before, "after SFT": load_gpt(Path(args.out, "sft.pt"), "sft.py")}
    reply = args.reply or (data.world_of(before).answer(args.question) or [None])[-1]
    if reply is None:
        raise SystemExit(f"{args.question!r} is no question of this village: give --reply, too")
    figures = {"how-1-pretraining": draw_pretraining(plt, before, args.document, args.number),
               "how-2-sft": draw_sft(plt, models, args.question, reply)}
    for name, figure in figures.items():
        figure.savefig(Path(args.to, f"{name}.png"), dpi=110, bbox_inches="tight")
        print(f"wrote {Path(args.to, name)}.png")


if __name__ == "__main__":
    main()
