"""The alignment tax: what does fine-tuning make a model forget, and what does replay cost?

    python docs/lab/tax.py --inputs out --out out/tax      SFT and PPO once more, without replay

Fine-tuning teaches to answer; of nothing else do its examples speak, and the weights that held the
rest are free to move. Replay shows a row or two of documents beside each step (replayer in
pretrain.py). Prints a row for the base model; for SFT without and with replay; for PPO, from the
SFT model with replay, without and with it:

    faults     covered faults that the model, asked as in its documents, calls faults: verbs of g1,
               of g2, of g1 under unseen rules
    alarms     faults found where the rule is silent or the act is benign (g1)
    labels     right answers to "which is better?" (g1: a rule that covers the act, a benign twin)
    facts      about people in no demonstration, answered right, and how-to; not of the base model,
               which does not answer
    loss       nats a token on fresh documents above the floor

Replayed documents hold refusals and verdicts too, and still the model complies with everything it
is asked: what it reads as a document it does not take for its own part in a chat.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import ppo
import pretrain
import rlaif
import sft
from model import load_gpt, pick_device, positive, writable

ROW = "{:14}" + "{:>10}" * 8

def measure(model, world, n, answers):
    """-> {column: number} of one model; `answers`: does it answer questions?"""
    found = rlaif.measure_critic(model, world, n, 0)
    mean = lambda *names: float(np.mean([found.get(name, np.nan) for name in names]))
    valid, _, floor = pretrain.validation_set(world, model.tokenizer, 1000, model.config.context)
    row = {f"faults_{cell}": mean(f"verdict_covered_{cell}") for cell in ("g1", "g2", "unseen")}
    row["alarms"] = 1 - mean("verdict_silent_g1", "verdict_benign_g1")
    row["labels"] = mean("label_covered_g1", "label_benign_g1")
    if answers:
        people = data.fact_questions(world, "train") + data.fact_questions(world, "test")
        acts = [data.act_prompts(world, "test", 84, harmful) for harmful in (False, True)]
        how_to = [act.question() for act in sum(acts, [])]
        for name, asked in (("facts", people), ("how_to", how_to)):
            right, _ = sft.judge_answers(model, world, asked, asked, temperature=1)
            row[name] = float(np.mean(right))
    row["loss"] = pretrain.token_losses(model, valid)[0].mean().item() - floor
    return row

def main(argv=None):
    p = argparse.ArgumentParser(description="What fine-tuning forgets, without and with replay.")
    p.add_argument("--inputs", default="out", help="pretrain.pt, sft.pt, reward.pt and ppo.pt")
    p.add_argument("--out", type=writable, default="out/tax", help="two models, and tax.json")
    p.add_argument("--eval-prompts", type=positive, default=400, help="requests for each cell")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    args = p.parse_args(argv)
    inputs, out, device = Path(args.inputs), Path(args.out), pick_device(args.device)
    flags = ["--out", str(out), "--replay-rows", "0"]
    flags += ["--device", args.device] if args.device else []
    if not (out / "sft.pt").exists():
        sft.main(["--init", str(inputs / "pretrain.pt"), *flags])
    if not (out / "ppo.pt").exists():
        judge = str(inputs / "reward.pt")
        ppo.main(["--init", str(inputs / "sft.pt"), "--reward-model", judge, *flags])
    models = {"base": inputs / "pretrain.pt",
              "sft_without": out / "sft.pt", "sft_with": inputs / "sft.pt",
              "ppo_without": out / "ppo.pt", "ppo_with": inputs / "ppo.pt"}
    rows = {}
    for name, path in models.items():
        model = load_gpt(path, device=device)
        rows[name] = measure(model, data.world_of(model), args.eval_prompts, name != "base")
    columns = list(rows["ppo_with"])
    print("\n" + ROW.format("", *[column.removeprefix("faults_") for column in columns]))
    figures = {}
    for name, row in rows.items():
        shown = [f"{row[column]:.3f}" if column in row else "-" for column in columns]
        print(ROW.format(name, *shown))
        figures |= {f"{column}_{name}": x for column, x in row.items()}
    data.write_results(out, "tax", figures=figures)

if __name__ == "__main__":
    main()
