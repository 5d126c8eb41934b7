"""What has the base model learnt of each kind of document, and what not yet?

    python docs/lab/losses_by_kind.py            reads out/pretrain.pt; prints a table

For each kind the loss on fresh documents; beside it the floor, the entropy of their generator; and
the share of tokens that the model gets right where the generator had no choice.

Found (`python pretrain.py --world-seed 100 --seed 100`, first edition): every kind is within 0.04
nats of its floor, critiques and comparisons within 0.01. Most is left in questions (1.240, floor
1.206), loose facts (1.217, 1.189) and biographies (0.626, 0.606): the names of a village. Forced
tokens are right everywhere but in questions (0.979).
"""
import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import model as m
import pretrain

RESULTS = Path(__file__).resolve().parents[1] / "results"


def measure(gpt, world, n, without):
    """{kind: (loss, floor, share right where forced)} on n documents of the world, losses and
    floors in nats a token; the last kind is "all"."""
    context, tokenizer = gpt.config.context, gpt.tokenizer
    valid, forced, floor = pretrain.validation_set(world, tokenizer, n, context, without)
    losses, hits = pretrain.token_losses(gpt, valid)
    kinds, kind_of_tokens, nats = list(data.DOCUMENTS), [], Counter()
    for i in range(n):                                     # the documents of validation_set again
        kind, text, logp = data.write_document(world, "validation", i, without=without)
        length = len(data.encode_document(tokenizer, text)[0])
        kind_of_tokens.append([kinds.index(kind)] * length)
        nats[kind] -= logp
    # packed like the documents, lists of the same lengths: one number for each target
    packed = torch.from_numpy(data.pack(kind_of_tokens, context, -1, -1))
    kind_of_target = packed[packed >= 0]
    table = {}
    for i, kind in enumerate(kinds):
        chosen = kind_of_target == i
        if chosen.any():                                   # none, where training left the kind out
            right = hits[chosen & forced].float().mean().item()
            table[kind] = losses[chosen].mean().item(), nats[kind] / chosen.sum().item(), right
    table["all"] = losses.mean().item(), floor, hits[forced].float().mean().item()
    return table


def main(argv=None):
    p = argparse.ArgumentParser(description="Loss beside its floor, for each kind of document.")
    p.add_argument("--out", default="out", help="folder of pretrain.pt")
    p.add_argument("--documents", type=m.positive, default=2000, help="how many to measure on")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--record", action="store_true", help="write docs/results/losses_by_kind.json")
    args = p.parse_args(argv)
    path = Path(args.out, "pretrain.pt")
    gpt = m.load_gpt(path, "pretrain.py", m.pick_device(args.device))
    world = data.world_of(gpt)                             # stops, if there is none
    # a kind that training left out (--without) is left out here, or the floor would be another
    without, figures = gpt.without, {}
    print(f"{'document':14}{'loss':>8}{'floor':>8}{'right where forced':>20}")
    for kind, (loss, floor, right) in measure(gpt, world, args.documents, without).items():
        print(f"{kind:14}{loss:8.3f}{floor:8.3f}{right:20.4f}")
        end = "" if kind == "all" else "_" + kind.replace(" ", "_")
        figures |= {f"val_loss{end}": loss, f"entropy_floor{end}": floor,
                    f"forced_accuracy{end}": right}
    if args.record:
        data.write_results(RESULTS, "losses_by_kind", figures=figures)


if __name__ == "__main__":
    main()
