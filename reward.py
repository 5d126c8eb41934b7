"""Stage 3. Learn to score answers the way people rank them.

    P(chosen beats rejected) = sigmoid(r_chosen - r_rejected)        # Bradley & Terry 1952
    loss = -log sigmoid(r_chosen - r_rejected)                       # Ouyang et al. 2022, eq. 1

Several answers to each prompt are sampled from the SFT model, and a simulated annotator ranks them in pairs. The annotator has a
known taste u (correct, polite, to the point) and prefers A with probability sigmoid(u_A - u_B): people disagree, also with
themselves. The reward model sees only the labels, never u.

    python reward.py         reads out/sft.pt, writes out/reward.pt and out/preferences.jsonl

Watch: accuracy leaves 0.50 and climbs towards the annotator's own consistency (printed as "ceiling").
"""
import argparse
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, GPTConfig, ScalarModel, answer, autocast, finish_training, from_rank_0, load, load_gpt, load_progress, mean_over_processes, my_share,
                   parallel, rank, save, save_progress, start_training, write_results)


def preference_loss(r_first, r_second, target):                  # (N,), (N,), (N,) -> scalar
    """Cross-entropy of P(first wins) against `target`: 1 or 0 for a choice, in between for a soft label. ln 2 where the scores are equal."""
    margin = r_first - r_second
    return -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin)).mean()     # logsigmoid: log(sigmoid(x)) overflows


def last_token_score(scalars, segments):                         # (B, T), (B, T) -> (B,)
    """The score of a sequence is read at its last real token, whatever padding follows."""
    return scalars.gather(1, segments.sum(1, keepdim=True) - 1).squeeze(1)


def score(reward_model, tokenizer, sequences):
    """Raw scores (N,) of sequences (lists of ids, prompt and answer with its end-of-text), with gradients."""
    tokens = data.pad_rows(sequences, tokenizer.pad).to(next(reward_model.parameters()).device)
    segments = (tokens != tokenizer.pad).long()
    return last_token_score(reward_model(tokens, segments), segments)


@torch.no_grad()
def score_texts(reward_model, tokenizer, conversations, batch_size=128):
    """Raw scores (N,), on the CPU, of (question, answer) pairs."""
    sequences = [data.chat_example(tokenizer, q, a)[0] for q, a in conversations]
    return torch.cat([score(reward_model, tokenizer, sequences[i:i + batch_size]).cpu() for i in range(0, len(sequences), batch_size)])


# ------------------------------------------------------------------------------------------------------------------
# Preferences. A group is (question, [different answers], [(i, j, target)]): `target` is 1 if answer i won over answer j, 0 if it lost,
# or a probability in between.

def sample_answers(model, tokenizer, questions, k, seed, hot=None, fewest=2):
    """k answers to each question at temperature 1 -> [(question, [the different ones])], questions with fewer than `fewest` left out.
    With `hot`, every other answer is sampled at that temperature instead."""
    texts = answer(model, tokenizer, [q for q in questions for _ in range(k)], seed=seed)
    if hot:
        texts[1::2] = answer(model, tokenizer, [q for q in questions for _ in range(k)][1::2], temperature=hot, seed=(*seed, 1))
    answers = [list(dict.fromkeys(texts[i * k:(i + 1) * k])) for i in range(len(questions))]
    return [(q, a) for q, a in zip(questions, answers) if len(a) >= fewest]


def annotate(world, answered, seed, taste=data.TASTE):
    """The simulated annotator: every pair of answers to a question gets one noisy choice -> groups."""
    rng, groups = random.Random(f"annotator {seed}"), []
    for question, answers in answered:
        u = [data.utility(world, question, a, taste) for a in answers]
        pairs = [(i, j, float(rng.random() < sigmoid(u[i] - u[j]))) for i, j in itertools.combinations(range(len(answers)), 2)]
        groups.append((question, answers, pairs))
    return groups


def sigmoid(x):
    """1 / (1 + exp(-x)) of a number, in double precision."""
    return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))


def preference_prompts(world, use, n):
    """n harmless questions, half about facts and half how-to. Prompts come again, if n is large, for other answers."""
    facts = data.fact_questions(world, use) + (data.fact_questions(world, "demo") if use == "train" else [])
    facts = random.Random(f"{world.seed} {use}").sample(facts, len(facts))
    acts = [a.question() for a in data.act_prompts(world, use, n, harmful=False)]
    return [facts[i // 2 % len(facts)] if i % 2 else acts[i // 2] for i in range(n)]


# ------------------------------------------------------------------------------------------------------------------

def train(reward_model, tokenizer, groups, batch_size, lr, seed, desc="reward", progress=None, resume=False, settings=None):
    """One epoch over the groups, in place; all pairs of a question share a batch, so that each answer is read once (Ouyang et al. 2022)."""
    per_batch = [groups[i:i + batch_size] for i in range(0, len(groups), batch_size)]
    order = np.random.default_rng([seed, 3]).permutation(len(per_batch))
    device = reward_model.scalar.weight.device
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda" or None)
    start, history = load_progress(progress, settings, model=reward_model, optimizer=optimizer) if resume else (0, [])
    network = parallel(reward_model.train())
    bar = tqdm(range(start, len(order)), initial=start, total=len(order), unit="step", desc=desc)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / len(order))
        mine, weight = my_share(per_batch[order[step]], lambda group: len(group[2]))       # all of it and 1, unless torchrun started several processes
        sequences, first, second, targets = [], [], [], []
        for question, answers, pairs in mine:
            first += [len(sequences) + i for i, _, _ in pairs]
            second += [len(sequences) + j for _, j, _ in pairs]
            targets += [target for _, _, target in pairs]
            sequences += [data.chat_example(tokenizer, question, a)[0] for a in answers]
        target = torch.tensor(targets, device=device)
        with autocast(device):
            r = score(network, tokenizer, sequences).float()      # (answers,)
            loss = preference_loss(r[first], r[second], target) * weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9 or step + 1 == len(order):
            agree = ((r[first] > r[second]) == (target > 0.5)).float().mean() * weight
            loss, agree = mean_over_processes(loss).item(), mean_over_processes(agree).item()
            bar.set_postfix(loss=f"{loss:.3f}", agree=f"{agree:.2f}")
            history.append({"step": step + 1, "train_loss_nats": loss, "train_agreement": agree})
            if progress and step + 1 < len(order):
                save_progress(progress, step + 1, settings, history, model=reward_model, optimizer=optimizer)
    reward_model.eval()
    return history


def normalise(reward_model, tokenizer, conversations):
    """Mean and standard deviation of the raw score over reference samples, and the lowest score once these are 0 and 1.
    KL coefficient and value clip only mean something on a fixed scale."""
    raw = score_texts(reward_model, tokenizer, conversations)
    mean, std = raw.mean().item(), raw.std().item()
    return {"mean": mean, "std": std, "lowest": (raw.min().item() - mean) / std}


def evaluate(reward_model, tokenizer, world, answered, taste=data.TASTE):
    """Held-out pairs, all as expectations under the annotator's known probabilities: accuracy, the ceiling (the accuracy of a judge
    who knows the taste but not the coin) and the mean gap between predicted and known probability."""
    predicted, known = [], []
    for question, answers in answered:
        r = score_texts(reward_model, tokenizer, [(question, a) for a in answers])
        u = torch.tensor([data.utility(world, question, a, taste) for a in answers])
        i, j = torch.combinations(torch.arange(len(answers))).T
        predicted.append(torch.sigmoid(r[i] - r[j]))
        known.append(torch.sigmoid(u[i] - u[j]))
    predicted, known = torch.cat(predicted), torch.cat(known)
    return {"accuracy": torch.where(predicted > 0.5, known, 1 - known).mean().item(),
            "ceiling": torch.maximum(known, 1 - known).mean().item(),
            "calibration_error": (predicted - known).abs().mean().item(), "pairs_heldout": len(known)}


def load_reward(path, device="cpu"):
    """out/reward.pt -> (ScalarModel in eval mode, its scale)."""
    checkpoint = load(path, "reward.py")
    if "scale" not in checkpoint:
        raise SystemExit(f"{path} holds no reward model: run `python reward.py` first")
    model = ScalarModel(GPT(GPTConfig(**checkpoint["config"])))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint["scale"]


def main(argv=None):
    p = argparse.ArgumentParser(description="Train a reward model on preferences.")
    # what is compared
    p.add_argument("--prompts", type=int, default=2000, help="questions, half about facts and half how-to")
    p.add_argument("--answers", type=int, default=8, help="answers sampled for each question; all pairs of different ones are labelled")
    p.add_argument("--hot", type=float, default=1.3, help="temperature of every other answer: a model that is nearly always right makes too few mistakes to learn from")
    # how to train
    p.add_argument("--batch-size", type=int, default=8, help="questions a step, with all their pairs, on all GPUs together")
    p.add_argument("--lr", type=float, default=3e-4, help="peak learning rate of AdamW")
    # where things go
    p.add_argument("--init", help="the model that answers and that the reward model starts from; default: OUT/sft.pt")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of samples, labels and data order")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    args = p.parse_args(argv)
    device, out = start_training(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    policy, tokenizer, checkpoint = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    world = data.world_of(checkpoint)

    answered = from_rank_0(lambda: sample_answers(policy, tokenizer, preference_prompts(world, "train", args.prompts), args.answers, (args.seed, 31), args.hot))
    groups = annotate(world, answered, args.seed)
    n_pairs = sum(len(pairs) for _, _, pairs in groups)
    if not n_pairs:
        raise SystemExit("the SFT model gave one answer only to every question, so there is nothing to compare: raise --prompts or --answers")
    print(f"{device}, {n_pairs} labelled pairs of {sum(len(a) for _, a in answered)} different answers to {len(groups)} questions")
    out.mkdir(parents=True, exist_ok=True)
    with open(os.devnull if rank() else out / "preferences.jsonl", "w", encoding="utf-8") as file:
        for question, answers, pairs in groups:
            for i, j, target in pairs:
                chosen, rejected = (i, j) if target else (j, i)
                file.write(json.dumps({"prompt": question, "chosen": answers[chosen], "rejected": answers[rejected]}) + "\n")

    questions = preference_prompts(world, "train", 500)
    reference = list(zip(questions, answer(policy, tokenizer, questions, seed=(args.seed, 33))))
    heldout = sample_answers(policy, tokenizer, preference_prompts(world, "test", 300), args.answers, (args.seed, 32))
    torch.manual_seed(args.seed)                                  # the new head is a function of the seed, whatever ran before
    reward_model = ScalarModel(policy).to(device)                 # starts as the SFT model; from here on `policy` has the reward model's weights
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out")}
    history = train(reward_model, tokenizer, groups, args.batch_size, args.lr, args.seed,
                    progress=out / "reward.resume.pt", resume=args.resume, settings=settings)
    if not finish_training():
        return
    scale = normalise(reward_model, tokenizer, reference)
    save(out / "reward.pt", stage="reward", config=vars(policy.config), model=reward_model.state_dict(), scale=scale,
         tokenizer=tokenizer.state(), world_seed=world.seed)
    (out / "reward.resume.pt").unlink(missing_ok=True)

    figures = {"pairs": n_pairs, **evaluate(reward_model, tokenizer, world, heldout)}
    figures["share_of_ceiling"] = (figures["accuracy"] - 0.5) / max(figures["ceiling"] - 0.5, 1e-9)
    write_results(out, "reward", history, figures)
    print(f"\nheld-out pairs: accuracy {figures['accuracy']:.3f} (chance 0.500, ceiling {figures['ceiling']:.3f})   "
          f"calibration error {figures['calibration_error']:.3f}")
    question = heldout[0][0]
    _, full = world.answer(question)
    print(f"\n{question}")
    samples = [full, f"{data.POLITE[0]} {full}", f"{data.RAMBLE[0]} {full} {data.RAMBLE[3]}", data.REFUSAL]
    raw = score_texts(reward_model, tokenizer, [(question, s) for s in samples])
    for text, r in zip(samples, raw.tolist()):
        print(f"  {(r - scale['mean']) / scale['std']:+.2f}  {text}")
    print(f"\nwrote {out / 'reward.pt'} and {out / 'preferences.jsonl'}; next: python ppo.py")


if __name__ == "__main__":
    main()
