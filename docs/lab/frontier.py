"""How good could a policy be at PPO's KL? And who beats whom, from the base model to PPO?

    python docs/lab/samples.py     once: many answers of OUT/sft.pt, the reference
    python docs/lab/frontier.py    reads these, and OUT/pretrain.pt, sft.pt, reward.pt, ppo.pt

Nothing is trained. The best policy that a KL can buy tilts the reference: p*(y) ~ p_ref(y)
exp(score(y) / beta). With N samples of the reference to each prompt it can be computed; the
distance of PPO to that curve, in score, is what its optimisation left undone.

Found (first edition, seeds 0, 1, 2): PPO misses 0.098, 0.082, 0.078 of what the frontier gains over
the reference. Win rates over SFT, seed 0: greedy SFT 0.479, best of 16 0.849, PPO 0.820."""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import data
import ppo
import reward as reward_stage
from model import MAX_NEW, answer, load_gpt, natural, pick_device, writable

BEST_OF, BASE_MAX_NEW = 16, 24    # a base model does not stop by itself: a sentence is enough
RELIABLE = 10                     # so many samples must still count

def tilt(scores, beta):                                    # (Q, N) -> KL, E[score], samples: (Q,)
    """p* at this beta, from N samples a prompt, with weights w ~ exp(score / beta). KL(p* || p_ref)
    = sum w ln(N w); E[score] = sum w score; 1 / sum w^2 samples still count. Scores 0 1, beta 1: w
    = .27 .73, KL = .27 ln .54 + .73 ln 1.46 = .11, E[score] = .73, samples 1.65."""
    w = torch.softmax(scores / beta, -1)
    kl = w * (scores.shape[-1] * w).clamp(min=1e-30).log()     # 0 ln 0 is 0, not nan
    return kl.sum(-1), (w * scores).sum(-1), 1 / (w ** 2).sum(-1)

def frontier(scores, gold):                                # (Q, N) x 2 -> rows
    """One beta for all prompts: that is how a given mean KL buys the highest mean score."""
    rows, scores, gold = [], torch.tensor(scores), torch.tensor(gold)      # float64
    for beta in np.geomspace(5, 0.02, 80):
        kl, score, samples = tilt(scores, beta)
        utility = (torch.softmax(scores / beta, -1) * gold).sum(-1)
        rows.append({"beta": beta, "kl_nats": kl.mean().item(), "score": score.mean().item(),
                     "effective_samples": samples.quantile(0.1).item(),    # of the poorest prompts
                     "gold_utility": utility.mean().item()})
    return rows

def main(argv=None):
    p = argparse.ArgumentParser(description="PPO against the exact frontier; who beats whom.")
    p.add_argument("--out", type=writable, default="out", help="of the models and of the figures")
    p.add_argument("--seed", type=natural, default=0, help="seed of the other models' answers")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--record", action="store_true", help="write docs/results/frontier.json")
    args = p.parse_args(argv)
    out, device, seed = Path(args.out), pick_device(args.device), args.seed
    samples = out / "samples.jsonl"
    there = data.read_records(samples) if samples.exists() else ()
    base, reference, policy = (load_gpt(out / f"{stage}.pt", f"{stage}.py", device)
                               for stage in ("pretrain", "sft", "ppo"))
    reward_model = reward_stage.load_reward(out / "reward.pt", reference)
    world, taste = data.world_of(reference), reward_model.taste or "polite"
    records = [record for _, record, _ in there]
    try:                                                   # a list of dicts, all with the same N
        questions, texts = [r["question"] for r in records], [r["texts"] for r in records]
        scores, gold = map(np.array, ([r["scores"] for r in records], [r["gold"] for r in records]))
        rows, _ = frontier(scores, gold), scores[0, 0]     # IndexError if there are none
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{samples} is missing or of another form ({error!r}): "
                         "run `python docs/lab/samples.py` first") from None
    reached, score_answers = [], ppo.score_by_model(reward_model)
    for i in range(8):                                     # answers of PPO's to each question
        batch = ppo.rollout(policy, reference, questions, MAX_NEW, 64, (seed, 45, i))
        reached.append((batch["kl"].mean(), score_answers(questions, batch["replies"]).mean()))
    (kl, score), start = np.array(reached, dtype=float).mean(0), scores.mean()
    reliable = [r for r in rows if r["effective_samples"] >= RELIABLE] or rows[:1]
    best = np.interp(kl, [r["kl_nats"] for r in reliable], [r["score"] for r in reliable])
    figures = {"kl": kl, "score": score, "score_reference": start, "score_frontier": best,
               "distance": (best - score) / (best - start)}
    if kl > reliable[-1]["kl_nats"]:
        print("PPO's KL is more than so few samples can tell: compared with the last that they can")
    for row in rows[::8] + [figures]:
        print("".join(f"{name} {x:.3f}   " for name, x in row.items()))
    ladder = {"base": answer(base, questions, BASE_MAX_NEW, seed=(seed, 46), bare=True),
              "sft": [t[-1] for t in texts],
              "sft_greedy": answer(reference, questions, temperature=0),
              f"best_of_{BEST_OF}": [t[s[:BEST_OF].argmax()] for t, s in zip(texts, scores)],
              "ppo": answer(policy, questions, seed=(seed, 47))}
    worth = lambda answers: [data.utility(world, q, a, taste) for q, a in zip(questions, answers)]
    for name, answers in ladder.items():
        won = {"gold": np.mean(worth(answers))}
        won |= data.win_rate(worth(answers), worth(ladder["sft"]), questions)
        figures |= {f"{what}_{name}": x for what, x in won.items()}
        print(f"{name:12}", *[f"  {what} {x:.3f}" for what, x in won.items()])
    data.write_results(out, "ppo_measure", rows, figures)
    if args.record:
        data.write_results(ROOT / "docs" / "results", "frontier", figures=figures)

if __name__ == "__main__":
    main()
