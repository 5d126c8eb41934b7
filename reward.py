"""Stage 3. Learn to score answers the way people rank them.

    P(chosen beats rejected) = sigmoid(r_chosen - r_rejected)        # Bradley & Terry 1952
    loss = -log sigmoid(r_chosen - r_rejected)                       # Ouyang et al. 2022, eq. 1

Several answers to each prompt are sampled from the SFT model, and simulated annotators compare them in pairs, three of them each pair. They
share a known taste u (correct, polite, to the point) and prefer A with probability sigmoid(u_A - u_B): people disagree, also with
themselves. The reward model sees only the labels, never u.

    python reward.py                      reads out/sft.pt, writes out/reward.pt and out/preferences.jsonl
    python reward.py --annotator curt     another taste (or chatty); --annotator me: you are the annotator
    python reward.py --data FILE          preferences from a file instead (prompt / chosen / rejected, or HH-RLHF's)
    python reward.py --best-of 256        no training: what the reward model picks among n answers, and what that is worth

Watch: in the bar, loss starts near ln 2 = 0.69 and `agree` near 0.50; the loss cannot reach 0, for annotators disagree with themselves. At
the end, accuracy on held-out pairs stands beside the annotator's own consistency ("ceiling").
"""
import argparse
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (MAX_NEW, GPT, GPTConfig, ScalarModel, answer, autocast, finish_training, forget_progress, freeze_words, from_rank_0,
                   generate, load, load_gpt, load_progress, mean_over_processes, my_share, parallel, positive, processes,
                   rank, save, save_progress, start_training, write_results)


def preference_loss(r_first, r_second, target):                  # (N,), (N,), (N,) -> scalar
    """Cross-entropy of P(first wins) against `target`: 1 or 0 for a choice, in between for a soft label. ln 2 where the scores are equal."""
    margin = r_first - r_second
    return -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin)).mean()     # logsigmoid: log(sigmoid(x)) overflows


def last_token_score(scalars, segments):                         # (B, T), (B, T) -> (B,)
    """The score of a sequence is read at its last real token, whatever padding follows."""
    return scalars.gather(1, segments.sum(1, keepdim=True) - 1).squeeze(1)


def score(reward_model, tokenizer, sequences, batch_size=24):
    """Raw scores (N,) of sequences (lists of ids, prompt and answer with its end-of-text), with gradients. Those of like length are read
    together, for padding costs as much as text."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    device, scores = next(reward_model.parameters()).device, []
    for i in range(0, len(order), batch_size):
        tokens = data.pad_rows([sequences[k] for k in order[i:i + batch_size]], tokenizer.pad).to(device)
        segments = (tokens != tokenizer.pad).long()
        scores.append(last_token_score(reward_model(tokens, segments), segments))
    return torch.cat(scores)[torch.tensor(order).argsort().to(device)]                    # back in the order of `sequences`


@torch.no_grad()
def score_texts(reward_model, tokenizer, conversations):
    """Raw scores (N,), on the CPU, of (question, answer) pairs."""
    return score(reward_model, tokenizer, [data.chat_example(tokenizer, q, a)[0] for q, a in conversations]).cpu()


# ------------------------------------------------------------------------------------------------------------------
# Preferences. A group is (question, [different answers], [(i, j, target)]): `target` is 1 if answer i won over answer j, 0 if it lost,
# or a probability in between.

def sample_answers(model, tokenizer, questions, k, seed, hot=None, fewest=2):
    """k answers to each question at temperature 1 -> [(question, [the different ones])], questions with fewer than `fewest` left out.
    With `hot`, every other answer is sampled at that temperature instead."""
    texts = [q for q in questions for _ in range(k)]              # each makes room for its answer
    texts[::2] = answer(model, tokenizer, texts[::2], seed=seed)
    texts[1::2] = answer(model, tokenizer, texts[1::2], temperature=hot or 1.0, seed=(*seed, 1))
    answers = [list(dict.fromkeys(texts[i * k:(i + 1) * k])) for i in range(len(questions))]
    return [(q, a) for q, a in zip(questions, answers) if len(a) >= fewest]


def with_strays(world, answered):
    """Add to each question's answers three that were given to other questions: one of the same sort (facts, how-to), one about the same person, one
    of the same form (the same verb, or the same attribute of somebody else). The model itself seldom misses the point; but a judge that never
    read such an answer cannot know that it is a fault, and PPO exploits that. The last kind differs in a name: it has to be checked."""
    about, form, n = defaultdict(list), defaultdict(list), len(answered)
    asked = [world.parse_question(q) for q, _ in answered]
    keys = [(a.person, a.verb) if isinstance(a, data.Act) else a for a in asked]              # (person, verb or attribute)
    for i, (person, what) in enumerate(keys):
        about[person].append(i)
        form[what].append(i)

    def after(i, pool):                                           # the next question of a pool, in a ring
        return pool[(pool.index(i) + 1) % len(pool)]

    added = []
    for i, ((question, answers), (person, what)) in enumerate(zip(answered, keys)):
        others = (i + 2) % n, after(i, about[person]), after(i, form[what])                   # facts and how-to take turns: i + 2 is of the same sort
        added.append((question, list(dict.fromkeys(answers + [answered[j][1][0] for j in others]))))
    return added


def annotate(world, answered, seed, taste="polite", votes=1):
    """The simulated annotators: every pair of answers to a question gets this many noisy choices, and its target is their mean -> groups."""
    rng, groups = random.Random(f"annotator {seed}"), []
    for question, answers in answered:
        u = [data.utility(world, question, a, taste) for a in answers]
        p_first = {(i, j): sigmoid(u[i] - u[j]) for i, j in itertools.combinations(range(len(answers)), 2)}
        pairs = [(i, j, sum(rng.random() < p for _ in range(votes)) / votes) for (i, j), p in p_first.items()]
        groups.append((question, answers, pairs))
    return groups


def ask_the_reader(answered, path, seed):
    """You are the annotator: two answers to each question, a choice by key -> the lines of `path`, where each choice is written at once.
    Stop whenever you like; the next time it goes on with the questions that have no label yet."""
    rng = random.Random(f"reader {seed}")
    labelled = {record["prompt"] for _, record, *_ in data.read_records(path)} if path.exists() and path.stat().st_size else set()
    print(f"{len(labelled)} labels so far. Which answer do you like better? 1 or 2; Enter: cannot say; q: stop and train on what there is.")
    with open(path, "a", encoding="utf-8") as file:
        for question, answers in answered:
            pair = rng.sample(answers, 2)                         # drawn for labelled questions too: the others keep their pairs
            if question in labelled:
                continue
            labelled.add(question)
            try:
                key = input(f"\n{question}\n  1  {pair[0]}\n  2  {pair[1]}\n> ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                break
            if key == "q":
                break
            if key in ("1", "2"):
                chosen, rejected = pair if key == "1" else pair[::-1]
                file.write(json.dumps({"prompt": question, "chosen": chosen, "rejected": rejected}) + "\n")
                file.flush()


def groups_of(pairs):
    """[(prompt, chosen, rejected)], as data.read_preferences gives them -> groups: the answers to one prompt together, and of several votes
    on the same two answers the mean."""
    groups = {}
    for prompt, chosen, rejected in pairs:
        _, answers, votes = groups.setdefault(json.dumps(prompt), (prompt, {}, defaultdict(list)))
        i, j = (answers.setdefault(text, len(answers)) for text in (chosen, rejected))
        votes[min(i, j), max(i, j)].append(float(i < j))
    return [(prompt, list(answers), [(i, j, sum(v) / len(v)) for (i, j), v in votes.items()]) for prompt, answers, votes in groups.values()]


def write_preferences(path, groups, votes=1):
    """One line a pair: {"prompt", "chosen", "rejected"}, and "votes": how many of several were for chosen and for rejected."""
    with open(path, "w", encoding="utf-8") as file:
        for question, answers, pairs in groups:
            prompt = question if isinstance(question, str) else [{"role": role, "content": text} for role, text in question]
            for i, j, target in pairs:
                chosen, rejected, won = (i, j, round(votes * target)) if target > 0.5 else (j, i, round(votes * (1 - target)))
                more = {"votes": [won, votes - won]} if votes > 1 else {}
                file.write(json.dumps({"prompt": prompt, "chosen": answers[chosen], "rejected": answers[rejected]} | more) + "\n")


def sigmoid(x):
    """1 / (1 + exp(-x)) of a number, in double precision."""
    return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))


def preference_prompts(world, use, n):
    """n harmless questions, facts and how-to by turns. In training, every other fact is about people in no demonstration, of whom the model is
    less sure: where it is always right there is nothing to compare. Prompts come again, if n is large, for other answers."""
    pools = [data.fact_questions(world, part) for part in (["train", "demo"] if use == "train" else [use])]
    facts = [pools[i % len(pools)][i // len(pools) % len(pools[i % len(pools)])] for i in range(n // 2)]
    acts = [a.question() for a in data.act_prompts(world, use, n, harmful=False)]
    return [facts[i // 2] if i % 2 else acts[i // 2] for i in range(n)]


# ------------------------------------------------------------------------------------------------------------------

def train(reward_model, tokenizer, groups, batch_size, lr, seed, epochs=1, desc="reward", progress=None, resume=False, settings=None):
    """Fit the scores to the labels, in place. All pairs of a question share a batch, so that each answer is read once an epoch and one
    epoch is enough: shuffled pairs show an answer again and again, and the model learns it by heart (Ouyang et al. 2022)."""
    per_batch = [groups[i:i + batch_size] for i in range(0, len(groups), batch_size)]
    order = np.concatenate([np.random.default_rng([seed, 3, epoch]).permutation(len(per_batch)) for epoch in range(epochs)])
    device = reward_model.scalar.weight.device
    freeze_words(reward_model, tokenizer)
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda" or None)
    start, history = load_progress(progress, settings, model=reward_model, optimizer=optimizer) if resume else (0, [])
    network = parallel(reward_model.train())
    bar = tqdm(range(start, len(order)), initial=start, total=len(order), unit="step", desc=desc)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / len(order))
        mine, weight = my_share(per_batch[order[step]], lambda group: len(group[2]))     # all and 1, unless torchrun started several processes
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


def normalise(reward_model, tokenizer, conversations, std=None):
    """Mean and standard deviation of the raw score over reference samples (or the `std` given), and the lowest score once these are 0 and 1.
    KL coefficient and value clip only mean something on a fixed scale."""
    raw = score_texts(reward_model, tokenizer, conversations)
    mean, std = raw.mean().item(), std or raw.std().item()
    if not std > 0:                                               # 0, or not a number
        raise SystemExit(f"the {len(raw)} reference answers have no spread of scores to serve as a scale: raise --prompts, or lower --lr")
    return {"mean": mean, "std": std, "lowest": (raw.min().item() - mean) / std}


def expected_calibration_error(predicted, known, bins=10):       # (N,), (N,) -> number
    """Pairs sorted into bins by the predicted probability; in each, the gap between the mean prediction and what came true (Guo et al. 2017)."""
    which = (predicted * bins).long().clamp(max=bins - 1)
    return sum((predicted[which == b] - known[which == b]).sum().abs() for b in range(bins)).item() / len(predicted)


def evaluate(reward_model, tokenizer, world, answered, taste="polite"):
    """Held-out answers against what the world knows about the annotator. All are expectations over the pairs of a question.

    accuracy, ceiling    agreement with a fresh label; that of a judge who knows the taste but not the coin
    calibration_error    mean gap, pair by pair, between predicted and known probability
    ece                  the same gap by bins, in which the errors of single pairs cancel
    correlation          of score and gold utility
    longer_wins          mean predicted probability that the longer of two equally good answers wins; above 0.5, length alone is rewarded
    """
    predicted, known, longer, scores, utilities = [], [], [], [], []
    for question, answers in answered:
        r = score_texts(reward_model, tokenizer, [(question, a) for a in answers])
        u = torch.tensor([data.utility(world, question, a, taste) for a in answers])
        length = torch.tensor([len(a.split()) for a in answers])
        i, j = torch.combinations(torch.arange(len(answers))).T
        predicted.append(torch.sigmoid(r[i] - r[j]))
        known.append(torch.sigmoid(u[i] - u[j]))
        equal = (u[i] == u[j]) & (length[i] != length[j])
        longer.append(torch.sigmoid((r[i] - r[j]) * (length[i] - length[j]).sign())[equal])
        scores.append(r)
        utilities.append(u)
    predicted, known = torch.cat(predicted), torch.cat(known)
    return {"accuracy": torch.where(predicted > 0.5, known, 1 - known).mean().item(), "ceiling": torch.maximum(known, 1 - known).mean().item(),
            "calibration_error": (predicted - known).abs().mean().item(), "pairs_heldout": len(known),
            "ece": expected_calibration_error(predicted, known),
            "correlation": torch.corrcoef(torch.stack([torch.cat(scores), torch.cat(utilities)]))[0, 1].item(),
            "longer_wins": torch.cat(longer).mean().item()}


def agreement(reward_model, tokenizer, groups):
    """Held-out labels whose coin is unknown (a file's, or the reader's): share on which the model agrees, with a 95% interval over the prompts."""
    hits = []
    for question, answers, pairs in groups:
        r = score_texts(reward_model, tokenizer, [(question, a) for a in answers])
        hits.append(np.mean([(r[i] > r[j]).item() == (target > 0.5) for i, j, target in pairs]))
    means = np.array(hits)[np.random.default_rng(0).integers(0, len(hits), (1000, len(hits)))].mean(1)
    return {"accuracy": float(np.mean(hits)), "accuracy_low": float(np.quantile(means, 0.025)), "accuracy_high": float(np.quantile(means, 0.975)),
            "prompts_heldout": len(hits)}


# ------------------------------------------------------------------------------------------------------------------
# Best-of-n: sample n answers, keep the one with the highest score. The simplest use of a reward model, and a yardstick for PPO.

def reference_samples(policy, tokenizer, world, questions, n, seed, reward_model, scale, taste):
    """n answers of the policy to each question, T = 1 -> texts, normalised scores and gold utilities, each (questions, n).
    As in PPO, an answer that does not end gets the fixed low score."""
    texts, scores, gold = [], [], []
    for k, question in enumerate(tqdm(questions, desc=f"{n} answers each", unit="prompt")):
        replies = generate(policy, [data.chat_prompt(tokenizer, question)] * n, MAX_NEW, tokenizer, seed=(*seed, k))
        texts.append([data.decode_reply(tokenizer, r) for r in replies])
        different = list(dict.fromkeys(texts[-1]))                # the same text comes again and again: score it once
        raw = score_texts(reward_model, tokenizer, [(question, t) for t in different]).tolist()
        score_of = {t: (r - scale["mean"]) / scale["std"] for t, r in zip(different, raw)}
        gold_of = {t: data.utility(world, question, t, taste) for t in different}
        scores.append([score_of[t] if r[-1] == tokenizer.eot else scale["lowest"] - 1 for t, r in zip(texts[-1], replies)])
        gold.append([gold_of[t] for t in texts[-1]])
    return texts, np.array(scores), np.array(gold)


def best_of_n(texts, scores, gold, n):
    """Best of n draws from one question's N samples (with replacement) -> (score, gold utility, KL to the sampling model in nats).

    With the texts in the order of their scores and c the share of samples up to a text, that text is the best of n with probability
    c^n - (c of the text before)^n. If no text came twice, KL = ln n - (n-1)/n (Stiennon et al. 2020); with ties it is less.
    """
    best, kl = np.zeros(2), 0.0
    kinds = sorted(dict.fromkeys(zip(scores, texts, gold)))
    counts, seen = Counter(texts), 0
    for r, text, u in kinds:
        p = ((seen + counts[text]) / len(texts)) ** n - (seen / len(texts)) ** n
        seen += counts[text]
        best += p * np.array([r, u])
        kl += p * np.log(p * len(texts) / counts[text]) if p > 0 else 0.0
    return best[0], best[1], kl


def load_reward(path, tokenizer, device="cpu"):
    """out/reward.pt -> (ScalarModel in eval mode, its scale, the annotator's taste or None where that is not known). Stops if it was trained
    with another tokenizer than this one: the same text would be other tokens to it."""
    checkpoint = load(path, "reward.py")
    if "scale" not in checkpoint:
        raise SystemExit(f"{path} holds no reward model: run `python reward.py` first")
    if checkpoint["tokenizer"] != tokenizer.state():
        raise SystemExit(f"{path} comes from another pre-training (its tokenizer differs): run `python reward.py` again")
    model = ScalarModel(GPT(GPTConfig(**checkpoint["config"])))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint["scale"], checkpoint.get("taste")


def main(argv=None):
    p = argparse.ArgumentParser(description="Train a reward model on preferences.")
    # what is compared, and by whom
    p.add_argument("--annotator", choices=[*data.TASTES, "me"], default="polite", help="whose taste; me: you label pairs here in the terminal")
    p.add_argument("--data", help="read preferences from this file instead: lines of prompt / chosen / rejected, or of HH-RLHF")
    p.add_argument("--prompts", type=positive, default=8000, help="questions, half about facts and half how-to")
    p.add_argument("--answers", type=positive, default=8, help="answers sampled for each question; all pairs of different ones are labelled")
    p.add_argument("--hot", type=float, default=1.4, help="temperature of every other answer, so that there are mistakes to compare; 0: off")
    p.add_argument("--votes", type=positive, default=3, help="annotators who are asked about each pair; their share is what is learnt")
    p.add_argument("--pairs", type=positive, help="pairs to learn from, up to the end of a question's; default: all")
    # how to train
    p.add_argument("--epochs", type=positive, default=1, help="times each pair is read; more than one only if pairs are few")
    p.add_argument("--batch-size", type=positive, default=8, help="questions a step, with all their pairs, on all GPUs together")
    p.add_argument("--lr", type=float, default=6e-4, help="peak learning rate of AdamW")
    # where things go
    p.add_argument("--init", help="the model that answers and that the reward model starts from; default: OUT/sft.pt")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of samples, labels and data order")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    p.add_argument("--best-of", type=positive, metavar="N", help="no training: measure best-of-n for n up to N with OUT/reward.pt, and stop")
    args = p.parse_args(argv)
    device, out = start_training(args.device), Path(args.out)
    if processes() > 1 and (args.best_of or args.annotator == "me"):
        raise SystemExit("--best-of and --annotator me run as one process: start this with python and not with torchrun")
    torch.manual_seed(args.seed)
    policy, tokenizer, checkpoint = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    if args.best_of:
        return measure_best_of(policy, tokenizer, data.world_of(checkpoint), args.best_of, out, args.seed)
    world = None if args.data else data.world_of(checkpoint)
    out.mkdir(parents=True, exist_ok=True)

    # The labels
    if args.data:
        groups = from_file(args.data, tokenizer, policy.config.context)
    else:
        questions = preference_prompts(world, "train", args.prompts)
        answered = from_rank_0(lambda: sample_answers(policy, tokenizer, questions, args.answers, (args.seed, 31), args.hot))
        if not answered:
            raise SystemExit("the SFT model gave one answer only to every question, so there is nothing to compare: raise --prompts or --answers")
        if args.annotator == "me":
            ask_the_reader(answered, out / "my_preferences.jsonl", args.seed)
            groups = from_file(out / "my_preferences.jsonl", tokenizer, policy.config.context)
        else:
            groups = annotate(world, with_strays(world, answered), args.seed, args.annotator, args.votes)
    if args.pairs:
        totals = np.cumsum([len(pairs) for _, _, pairs in groups])
        groups = groups[:int(np.searchsorted(totals, args.pairs)) + 1]
    known = world and args.annotator != "me"                      # is it known how the annotator decides?
    if known:
        tested, write = preference_prompts(world, "test", 300), groups
        tests = from_rank_0(lambda: sample_answers(policy, tokenizer, tested, args.answers, (args.seed, 32)))
    else:
        if len(groups) < 20:
            raise SystemExit(f"{len(groups)} labelled prompts are too few: a tenth is held out, and 20 are the least")
        write = groups
        groups = random.Random(f"held out {args.seed}").sample(groups, len(groups))           # a file may be sorted by subject
        tests, groups = groups[:len(groups) // 10], groups[len(groups) // 10:]
    n_pairs = sum(len(pairs) for _, _, pairs in groups)
    print(f"{device}, {n_pairs} labelled pairs of {sum(len(a) for _, a, _ in groups)} different answers to {len(groups)} prompts")
    if not args.data and rank() == 0:
        write_preferences(out / "preferences.jsonl", write, args.votes if known else 1)

    # The scale: what the SFT model says to prompts of training is 0 on average, with standard deviation 1
    if world:
        reference = list(zip(questions[:500], from_rank_0(lambda: answer(policy, tokenizer, questions[:500], seed=(args.seed, 33)))))
    else:
        reference = [(q, a) for q, answers, _ in groups[:500] for a in answers]
    torch.manual_seed(args.seed)                                  # the new head is a function of the seed, whatever ran before
    reward_model = ScalarModel(policy).to(device)                 # starts as the SFT model; from here on `policy` has the reward model's weights
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out")}
    history = train(reward_model, tokenizer, groups, args.batch_size, args.lr, args.seed, args.epochs,
                    progress=forget_progress(out / "reward.resume.pt", args.resume), resume=args.resume, settings=settings)
    if not finish_training():
        return
    scale = normalise(reward_model, tokenizer, reference)
    save(out / "reward.pt", stage="reward", config=vars(policy.config), model=reward_model.state_dict(), scale=scale,
         tokenizer=tokenizer.state(), world_seed=checkpoint.get("world_seed"), taste=args.annotator if known else None)
    (out / "reward.resume.pt").unlink(missing_ok=True)

    figures = {"pairs": n_pairs}
    if known:
        figures |= evaluate(reward_model, tokenizer, world, tests, args.annotator)
        figures["share_of_ceiling"] = (figures["accuracy"] - 0.5) / max(figures["ceiling"] - 0.5, 1e-9)
        print(f"\nheld-out pairs: accuracy {figures['accuracy']:.3f} (chance 0.500, ceiling {figures['ceiling']:.3f})   "
              f"calibration error {figures['calibration_error']:.3f}, by bins {figures['ece']:.3f}\n"
              f"correlation with gold {figures['correlation']:.3f}   the longer of two equals wins {figures['longer_wins']:.3f}")
    else:
        figures |= agreement(reward_model, tokenizer, tests)
        print(f"\nheld-out prompts: accuracy {figures['accuracy']:.3f} [{figures['accuracy_low']:.3f}, {figures['accuracy_high']:.3f}], "
              f"chance 0.500, {figures['prompts_heldout']} prompts")
    write_results(out, "reward", history, figures)
    show(reward_model, tokenizer, world if known else None, tests, scale)
    print(f"\nwrote {out / 'reward.pt'}" + (f" and {out / 'preferences.jsonl'}" if world else "") + "; next: python ppo.py"
          + (" --prompts FILE" if checkpoint.get("world_seed") is None else ""))


def from_file(path, tokenizer, context):
    """Preferences of a file that fit the context -> groups; says what was left out and why, and shows the first as the model will read it."""
    pairs, skipped = data.read_preferences(path)
    fits = [(q, a, b) for q, a, b in pairs if max(len(data.chat_example(tokenizer, q, x)[0]) for x in (a, b)) <= context]
    skipped[f"longer than the context of {context} tokens"] = len(pairs) - len(fits)
    print(f"{path}: {len(fits)} pairs of {sum(skipped.values()) + len(fits)}; skipped: {data.reasons(skipped)}")
    if not fits:
        raise SystemExit(f"{path}: no usable pair is left, see the reasons above")
    prompt, chosen, rejected = fits[0]
    print(f"the first one:\n  chosen    {tokenizer.decode(data.chat_example(tokenizer, prompt, chosen)[0])!a}\n  rejected  {rejected!a}")
    return groups_of(fits)


def show(reward_model, tokenizer, world, tests, scale):
    """A few answers to one held-out prompt with their scores; 0 is the SFT model's mean and 1 its standard deviation."""
    question, samples = tests[0][:2]
    if world:
        _, full = world.answer(question)
        samples = [full, f"{data.POLITE[0]} {full}", f"{data.RAMBLE[0]} {full} {data.RAMBLE[3]}", data.REFUSAL]
    print(f"\n{question if isinstance(question, str) else question[-1][1]}")
    for text, r in zip(samples, score_texts(reward_model, tokenizer, [(question, s) for s in samples]).tolist()):
        print(f"  {(r - scale['mean']) / scale['std']:+.2f}  {text}")


def measure_best_of(policy, tokenizer, world, n_max, out, seed):
    """The table of best-of-n on held-out questions: score, gold utility and sqrt(KL), for n = 1, 2, 4, ... n_max."""
    reward_model, scale, taste = load_reward(out / "reward.pt", tokenizer, policy.tokens.weight.device)
    questions = preference_prompts(world, "test", 100)
    texts, scores, gold = reference_samples(policy, tokenizer, world, questions, n_max, (seed, 34), reward_model, scale, taste or "polite")
    rows, n = [], 1
    print(f"{'n':>5}{'score':>8}{'gold':>8}{'KL':>8}{'sqrt(KL)':>10}{'KL without ties':>17}")
    while n <= n_max:
        score_n, gold_n, kl = np.mean([best_of_n(*question, n) for question in zip(texts, scores, gold)], axis=0)
        bound = math.log(n) - (n - 1) / n
        rows.append({"n": n, "score": score_n, "gold_utility": gold_n, "kl_nats": kl, "kl_bound_nats": bound})
        print(f"{n:5}{score_n:8.3f}{gold_n:8.3f}{kl:8.3f}{kl ** 0.5:10.3f}{bound:17.3f}")
        n *= 2
    write_results(out, "best_of", rows)


if __name__ == "__main__":
    main()
