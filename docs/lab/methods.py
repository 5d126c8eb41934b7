"""Who gets nearest to the exact frontier: PPO, RLOO, GRPO, DPO, or the best of n samples?

    python docs/lab/samples.py        once; then best_of_n.py and frontier.py, which read them
    python docs/lab/methods.py ppo=out/ppo.pt rloo=../rloo/out/ppo.pt dpo=../dpo/out/ppo.pt

NAME=FILE: a policy that began as OUT/sft.pt, for instance one that a diff of docs/variants made in
a copy of the project. On the questions of samples.jsonl: its exact KL to sft.pt, its score by
reward.pt, the gold utility, shares correct. Beside it the frontier's score and gold at that KL; and

    distance = (frontier - policy) / (frontier - reference)    of the score that this KL could buy

Writes OUT/seedS_methods.json, or docs/results/..., S the world's seed: see draw_methods.py."""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import ppo
import reward as reward_stage
from model import MAX_NEW, load_gpt, natural, pick_device, writable

ROLLOUTS, RELIABLE = 4, 10        # answers to each question; samples that must still count
MEASURED = ("kl_nats", "score", "gold_utility")

def read_columns(path, made_by):
    """A csv file of another lab script -> {column: array}."""
    if not path.exists():
        raise SystemExit(f"{path} not found: run `python docs/lab/{made_by}` first")
    table = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True, encoding="utf-8"))
    return {name: table[name] for name in table.dtype.names}

def measure(policy, reference, reward_model, questions, seed):
    """A policy's answers to these questions, ROLLOUTS times -> means over all of them."""
    world, taste = data.world_of(reference), reward_model.taste or "polite"
    score_answers, found = ppo.score_by_model(reward_model), []
    for i in range(ROLLOUTS):
        batch = ppo.rollout(policy, reference, questions, MAX_NEW, 64, (seed, 48, i))
        texts = [data.decode_reply(policy.tokenizer, reply) for reply in batch["replies"]]
        pairs = list(zip(questions, texts))
        right = [data.is_correct(world, *pair) for pair in pairs]      # how-to and facts take turns
        gold = [data.utility(world, *pair, taste) for pair in pairs]
        found.append({"kl_nats": batch["kl"].mean().item(), "gold_utility": np.mean(gold),
                      "score": score_answers(questions, batch["replies"]).mean().item(),
                      "howto": np.mean(right[::2]), "facts": np.mean(right[1::2]),
                      "length_tokens": batch["mask"].sum(1).mean().item()})
    columns = zip(*(row.values() for row in found))        # one value a rollout
    return {name: float(np.mean(column)) for name, column in zip(found[0], columns)}

def beside(figures, edge, start):
    """Add the frontier's score and gold at this KL, and the distance to it in score."""
    reliable = edge["effective_samples"] >= RELIABLE
    for name in ("score", "gold_utility"):                 # the frontier begins at the reference
        kl, best = ([start[what], *edge[what][reliable]] for what in ("kl_nats", name))
        figures[f"{name}_frontier"] = float(np.interp(figures["kl_nats"], kl, best))
    gained, possible = (figures[name] - start["score"] for name in ("score", "score_frontier"))
    return figures | {"distance": 1 - gained / possible if possible > 0.01 else float("nan")}

def main(argv=None):
    p = argparse.ArgumentParser(description="Policies beside the exact frontier.")
    p.add_argument("policies", nargs="+", help="NAME=FILE, ...")
    p.add_argument("--out", type=writable, default="out", help="of sft.pt, reward.pt, samples")
    p.add_argument("--seed", type=natural, default=0, help="seed of the answers")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--record", action="store_true", help="write docs/results/seedS_methods.json")
    args = p.parse_args(argv)
    device, out = pick_device(args.device), Path(args.out)
    wanted = dict(name.split("=", 1) if "=" in name else (name, "") for name in args.policies)
    if not all(wanted.values()) or len(wanted) < len(args.policies):
        p.error("a policy is NAME=FILE, each name once, for instance ppo=out/ppo.pt")
    edge = read_columns(out / "ppo_measure.csv", "frontier.py")
    best_of = read_columns(out / "best_of.csv", "best_of_n.py")
    reference = load_gpt(out / "sft.pt", "sft.py", device)
    reward_model = reward_stage.load_reward(out / "reward.pt", reference)
    questions = [record["question"] for _, record, _ in data.read_records(out / "samples.jsonl")]
    found = {}
    for k, n in enumerate(best_of["n"]):
        if n in (1, 4, 16):                                # 1: the reference itself
            found[f"best of {n:.0f}"] = {name: float(best_of[name][k]) for name in MEASURED}
    for name, path in wanted.items():
        policy = load_gpt(path, "ppo.py", device)
        if policy.tokenizer.state() != reference.tokenizer.state():
            raise SystemExit(f"{path} has another tokenizer: it did not begin as {out / 'sft.pt'}")
        found[name] = measure(policy, reference, reward_model, questions, args.seed)
    start = dict(found["best of 1"])
    for name, figures in found.items():
        found[name] = row = beside(figures, edge, start)
        print(f"\n{name}\n ", "   ".join(f"{what} {x:.3f}" for what, x in row.items()))
    edge = {name: edge[name][edge["effective_samples"] >= RELIABLE].tolist() for name in MEASURED}
    folder = ROOT / "docs" / "results" if args.record else out
    path = folder / f"seed{reference.world_seed}_methods.json"
    path.write_text(json.dumps(dict(edge=edge, policies=found), indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {path}; next: python docs/lab/draw_methods.py --results {folder}")

if __name__ == "__main__":
    main()
