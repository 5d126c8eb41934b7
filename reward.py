"""Stage 3. Learn to score answers the way people rank them.

    P(A beats B) = sigmoid(r_A - r_B)                                   # Bradley & Terry 1952
    loss = - mean over pairs of  log sigmoid(r_chosen - r_rejected)     # Ouyang et al. 2022, eq. 1

The mean is over all pairs of a batch, where eq. 1 first takes it within each prompt: the same, if
every prompt has K answers. Here K counts different ones, from 2 to 11, and the lone label of one
prompt would weigh as much as 55 of another; so every label counts alike.

Several answers to each prompt are sampled from the SFT model, and simulated annotators, three a
pair, compare them. They share a known taste u (correct, polite, to the point) and prefer A with
probability sigmoid(u_A - u_B): people disagree, also with themselves. The model never sees u, but
groups: (question, [different answers], [(i, j, target)]), where target is 1 if answer i won over
answer j, 0 if it lost, a share of votes in between.

    python reward.py                    reads out/sft.pt, writes out/reward.pt, preferences.jsonl
    python reward.py --annotator curt   another taste (or chatty); yours: docs/lab/annotate.py
    python reward.py --data FILE        preferences from a file: prompt / chosen / rejected, or HH's

Watch: the loss starts near ln 2 = 0.69, `agree` near 0.50; the loss cannot reach 0, for annotators
disagree. Held-out accuracy stands beside their own consistency, the "ceiling".
"""
import argparse
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, GPTConfig, ScalarModel, answer, autocast, common_flags, finish_training,
                   from_rank_0, load, load_gpt, mean_over_processes, my_share, parallel, positive,
                   resume, save_model, save_progress, start_training)
from sft import freeze_words

def preference_loss(r_first, r_second, target):            # (N,), (N,), (N,) -> scalar
    """Mean cross-entropy, in nats, of P(first wins) = sigmoid(r_first - r_second) against `target`:
    1 or 0 for a choice, in between for a soft label. By hand, for scores 2 and 1: target 1 costs
    -log sigmoid(1) = 0.313, target 0 costs 1.313; equal scores cost ln 2 for any target."""
    margin = r_first - r_second                            # log(sigmoid(-200)) would be log(0)
    return -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin)).mean()

def last_token_score(scalars, segments):                   # (B, T), (B, T) -> (B,)
    """A sequence's score stands at its last real token, the only one that has seen all others:
    scalars .3 .1 .7 .2 and segments 1 1 1 0 -> .7, where [:, -1] would read the padding."""
    return scalars.gather(1, segments.sum(1, keepdim=True) - 1).squeeze(1)

def score(reward_model, sequences, batch_size=24):         # 24 at a time fit a small memory
    """N sequences (ids of prompt, answer, end-of-text) -> raw scores (N,), with gradients."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))     # little padding
    pad, scores = reward_model.tokenizer.pad, []
    for start in range(0, len(order), batch_size):
        batch = [sequences[i] for i in order[start:start + batch_size]]
        tokens = data.pad_rows(batch, pad).to(reward_model.device)     # (B, T)
        segments = (tokens != pad).long()
        scores.append(last_token_score(reward_model(tokens, segments), segments))
    return torch.cat(scores)[np.argsort(order)]            # in the order of `sequences` again

@torch.no_grad()
def score_texts(reward_model, conversations):
    """Raw scores (N,), on the CPU, of (question, answer) pairs."""
    examples = [data.chat_example(reward_model.tokenizer, q, a) for q, a in conversations]
    return score(reward_model, [ids for ids, _ in examples]).cpu()

def preference_prompts(world, use, n):
    """n harmless questions, how-to and facts by turns, of a use: "train" or "test"."""
    howto = itertools.cycle([a.question() for a in data.act_prompts(world, use, n, harmful=False)])
    turns = [howto, itertools.cycle(data.fact_questions(world, use))]
    if use == "train":
        # half about people in demonstrations, half in none, of whom the model is less sure
        turns += [howto, itertools.cycle(data.fact_questions(world, "demo"))]
    return [next(turns[i % len(turns)]) for i in range(n)]

def sample_answers(model, questions, k, seed, hot=None, fewest=2):
    """k answers to each question at temperature 1 -> [(question, [the different ones])], those with
    fewer than `fewest` left out. `hot`: the temperature of every other answer instead, for a judge
    must see mistakes, and a good model makes few."""
    asked = [question for question in questions for _ in range(k)]
    texts = list(asked)                                    # room for the answers
    texts[::2] = answer(model, asked[::2], seed=seed)
    texts[1::2] = answer(model, asked[1::2], temperature=hot or 1.0, seed=(*seed, 1))
    answers = [list(dict.fromkeys(texts[i:i + k])) for i in range(0, len(texts), k)]
    return [(q, different) for q, different in zip(questions, answers) if len(different) >= fewest]

def with_strays(world, answered):
    """Add to each question's answers three that were given to other questions: one who never read
    such an answer cannot know that it is a fault, and PPO exploits a judge like that. The third
    differs in nothing but a name: it has to be checked."""
    meanings, n = [world.parse_question(question) for question, _ in answered], len(answered)
    topics = 2 * [(m.person, m.verb) if isinstance(m, data.Act) else m for m in meanings]
    added = []
    for i, (question, answers) in enumerate(answered):
        ring = range(i + 1, i + n + 1)                     # topics come twice: after the last, 0
        same_person = next(k for k in ring if topics[k][0] == topics[i][0])
        same_form = next(k for k in ring if topics[k][1] == topics[i][1])      # verb or attribute
        # i + 2 is mostly of i's sort: how-to and facts take turns, though sample_answers drops some
        strays = [i + 2, same_person, same_form]
        texts = answers + [answered[k % n][1][0] for k in strays]
        added.append((question, list(dict.fromkeys(texts))))
    return added

def annotate(world, answered, seed, taste="polite", votes=1):
    """The simulated annotators -> groups. Every pair of answers to a question gets this many noisy
    choices, and its target is their mean: 3 against 2 in utility wins with p = 0.73, not always."""
    rng, groups = random.Random(f"annotator {seed}"), []
    for question, answers in answered:
        u, pairs = [data.utility(world, question, a, taste) for a in answers], []
        for i, j in itertools.combinations(range(len(answers)), 2):
            p_first = 1 / (1 + math.exp(u[j] - u[i]))      # sigmoid(u_i - u_j)
            won = sum(rng.random() < p_first for _ in range(votes))    # each tosses a coin
            pairs.append((i, j, won / votes))
        groups.append((question, answers, pairs))
    return groups

def train(reward_model, groups, epochs, batch_size, lr, seed, progress=None):
    """Fit the scores to the labels, in place -> history, a row every 10 steps. All pairs of a
    question share a batch (of `batch_size` questions): each answer is read once an epoch. Shuffled
    pairs show it again and again, and the model learns it by heart (Ouyang et al. 2022)."""
    batches = [groups[i:i + batch_size] for i in range(0, len(groups), batch_size)]
    shuffles = [np.random.default_rng([seed, 3, epoch]) for epoch in range(epochs)]
    order = np.concatenate([rng.permutation(len(batches)) for rng in shuffles])
    freeze_words(reward_model)                             # or it learns the names by heart
    optimizer = torch.optim.Adam(reward_model.parameters(), lr=lr, betas=(0.9, 0.95))
    start, history = resume(progress, model=reward_model, optimizer=optimizer)
    network = parallel(reward_model.train())               # no dropout: it scores as in eval mode
    bar = tqdm(range(start, len(order)), "reward", len(order), initial=start, unit="step")
    for step in bar:
        for group in optimizer.param_groups:               # a short warm-up, then linear decay to 0
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / len(order))
        mine, weight = my_share(batches[order[step]], lambda group: len(group[2]))    # by pairs
        # each answer is read once: of p: a b c and q: d e, d and e are 3 and 4, q's pair is (3, 4)
        sequences, pairs = [], []
        for question, answers, labels in mine:
            pairs += [(len(sequences) + i, len(sequences) + j, target) for i, j, target in labels]
            sequences += [data.chat_example(network.tokenizer, question, a)[0] for a in answers]
        first, second, targets = map(list, zip(*pairs))
        target = torch.tensor(targets, device=reward_model.device)
        with autocast(reward_model.device):
            r = score(network, sequences).float()          # bfloat16 has too few digits for margins
            loss = preference_loss(r[first], r[second], target) * weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)     # one odd batch
        optimizer.step()
        if step % 10 == 9 or step + 1 == len(order):       # a row, and what --resume needs
            agree = ((r[first] > r[second]) == (target > 0.5)).float().mean() * weight
            loss, agree = mean_over_processes(loss).item(), mean_over_processes(agree).item()
            bar.set_postfix(loss=f"{loss:.3f}", agree=f"{agree:.2f}")
            history.append({"step": step + 1, "train_loss_nats": loss, "train_agreement": agree})
            save_progress(progress, step + 1, history, model=reward_model, optimizer=optimizer)
    reward_model.eval()
    return history

def normalise(reward_model, conversations, std=None):
    """The scale of raw scores over reference conversations -> their mean, standard deviation (or
    the given one), and the lowest once these are 0 and 1. The loss fixes differences alone; PPO's
    KL coefficient and value clip only mean something on a fixed scale."""
    raw = score_texts(reward_model, conversations)         # in nats of log-odds, on no fixed level
    mean, std = raw.mean().item(), std or raw.std().item()
    if not std > 0:                                        # 0, or not a number
        raise SystemExit("the reference answers all score alike: raise --prompts, or lower --lr")
    return {"mean": mean, "std": std, "lowest": (raw.min().item() - mean) / std}

def expected_calibration_error(predicted, known, bins=10):     # (N,), (N,) -> number
    """Pairs sorted into bins by the predicted probability; the gap of mean prediction and truth in
    each, weighted by its pairs (Guo et al. 2017). By hand: predicted .62 .68 .95, known .72 .60 .85
    -> (|1.30 - 1.32| in the bin from .6 to .7, |.95 - .85| in the last) / 3 pairs = 0.04."""
    which = (predicted * bins).long().clamp(max=bins - 1)      # 1.0 belongs to the last bin
    gaps = [(predicted - known)[which == b].sum().abs() for b in range(bins)]
    return sum(gaps).item() / len(predicted)

def evaluate(reward_model, world, answered, taste="polite"):
    """Held-out [(question, answers)] against what the world knows of the annotator -> figures, all
    expectations over the pairs of different answers to a question."""
    texts, pairs = [], []
    for question, answers in answered:
        pairs += itertools.combinations(range(len(texts), len(texts) + len(answers)), 2)
        texts += [(question, a) for a in answers]
    first, second = torch.tensor(pairs).T                  # of each pair, where they are in texts
    r = score_texts(reward_model, texts)                   # one an answer
    u = torch.tensor([data.utility(world, question, a, taste) for question, a in texts])
    words = torch.tensor([len(a.split()) for _, a in texts])   # the length that people see
    margin, longer = r[first] - r[second], (words[first] - words[second]).sign()
    predicted, known = torch.sigmoid(margin), torch.sigmoid(u[first] - u[second])    # one a pair
    equal = (u[first] == u[second]) & (longer != 0)
    accuracy = torch.where(predicted > 0.5, known, 1 - known).mean().item()    # of a fresh label
    ceiling = torch.maximum(known, 1 - known).mean().item()    # a judge who knows u, not the coin
    return {"accuracy": accuracy, "ceiling": ceiling, "pairs_heldout": len(known),
            "calibration_error": (predicted - known).abs().mean().item(),      # pair by pair
            "ece": expected_calibration_error(predicted, known),
            "correlation": torch.corrcoef(torch.stack([r, u]))[0, 1].item(),
            # P(the longer of two equally good answers wins): above 0.5, length alone is rewarded
            "longer_wins": torch.sigmoid(margin * longer)[equal].mean().item(),
            "share_of_ceiling": (accuracy - 0.5) / max(ceiling - 0.5, 1e-9)}   # all equal: no 0/0

def groups_of(pairs):
    """[(prompt, chosen, rejected)], as data.read_preferences gives them -> groups: the answers to a
    prompt together, and of several votes on the same two answers the mean."""
    prompts = {}
    for prompt, *texts in pairs:
        _, answers, votes = prompts.setdefault(str(prompt), (prompt, {}, {}))  # a list is no key
        i, j = (answers.setdefault(text, len(answers)) for text in texts)
        votes.setdefault((min(i, j), max(i, j)), []).append(float(i < j))
    means = lambda votes: [(*pair, sum(v) / len(v)) for pair, v in votes.items()]
    return [(prompt, list(answers), means(votes)) for prompt, answers, votes in prompts.values()]

def take_pairs(groups, n):
    """Groups from the start until n pairs are reached; all where n is None."""
    totals = np.cumsum([len(pairs) for _, _, pairs in groups])
    return groups[:np.searchsorted(totals, n) + 1] if n else groups

def write_preferences(path, groups, votes=1):
    """One line a pair: {"prompt", "chosen", "rejected", "votes": of several, [for, against]}."""
    with open(path, "w", encoding="utf-8") as file:
        for question, answers, pairs in groups:
            for i, j, target in pairs:
                a, b, share = (i, j, target) if target > 0.5 else (j, i, 1 - target)   # a won
                record = {"prompt": question, "chosen": answers[a], "rejected": answers[b]}
                if votes > 1:                              # of a single one it is clear
                    record["votes"] = [round(votes * share), round(votes * (1 - share))]
                file.write(json.dumps(record) + "\n")

def groups_from_file(path, model):
    """Preferences of a file that fit the model's context -> groups. Says what was left out and why,
    and shows the first as the model will read it; stops if none is left."""
    (pairs, skipped), room = data.read_preferences(path), model.config.context
    ids = lambda prompt, text: data.chat_example(model.tokenizer, prompt, text)[0]
    fit = [(q, a, b) for q, a, b in pairs if max(len(ids(q, a)), len(ids(q, b))) <= room]
    skipped[f"longer than the context of {room} tokens"] = len(pairs) - len(fit)
    print(f"{path}: {len(fit)} usable pairs; skipped: {data.reasons(skipped)}")
    if not fit:
        raise SystemExit(f"{path}: no usable pair is left, see the reasons above")
    print(f"the first, as it is read: {model.tokenizer.decode(ids(*fit[0][:2]))!a}")
    return groups_of(fit)

def load_reward(path, policy):
    """A file like out/reward.pt -> ScalarModel in eval mode, with its scale and taste (None: not
    known). Stops if its tokenizer is not the policy's: a text would be other tokens to it."""
    checkpoint, tokenizer = load(path, "reward.py"), policy.tokenizer
    if "scale" not in checkpoint:
        raise SystemExit(f"{path} holds no reward model: run `python reward.py` first")
    if checkpoint["tokenizer"] != tokenizer.state():
        raise SystemExit(f"{path}: its tokenizer differs from the policy's; run `python reward.py`")
    gpt = GPT(GPTConfig(**checkpoint["config"]), tokenizer, checkpoint.get("world_seed"))
    model = ScalarModel(gpt)
    model.load_state_dict(checkpoint["model"])
    model.scale, model.taste = checkpoint["scale"], checkpoint.get("taste")
    return model.to(policy.device).eval()                  # beside the policy whom it scores

def agreement(reward_model, groups):
    """Held-out labels whose coin is unknown: share on which the model agrees, with a 95% interval
    by drawing prompts anew (the pairs of one prompt are no independent cases)."""
    hits = []
    for question, answers, pairs in groups:
        r = score_texts(reward_model, [(question, a) for a in answers])
        hits.append(np.mean([(r[i] > r[j]).item() == (target > 0.5) for i, j, target in pairs]))
    drawn = np.random.default_rng(0).choice(hits, (1000, len(hits))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    figures = {"accuracy": float(np.mean(hits)), "accuracy_low": low, "accuracy_high": high}
    return figures | {"prompts_heldout": len(hits)}

def from_world(policy, args):
    """The simulated annotators' labels, also written to a file -> (groups to learn from, held-out
    [(question, answers)], conversations whose scores are to have mean 0 and deviation 1)."""
    world, seed = data.world_of(policy), args.seed
    questions = preference_prompts(world, "train", args.prompts)
    answered = sample_answers(policy, questions, args.answers, (seed, 31), args.hot)
    tests = sample_answers(policy, preference_prompts(world, "test", 300), args.answers, (seed, 32))
    if not answered or not tests:
        raise SystemExit("one answer only to every question: raise --prompts or --answers")
    groups = annotate(world, with_strays(world, answered), seed, args.annotator, args.votes)
    groups, asked = take_pairs(groups, args.pairs), questions[:500]    # enough for a scale
    write_preferences(Path(args.out, "preferences.jsonl"), groups, args.votes)
    return groups, tests, list(zip(asked, answer(policy, asked, seed=(seed, 33))))

def from_file(policy, args):
    """The labels of --data -> the same, a tenth of the groups held out with their labels."""
    groups = take_pairs(groups_from_file(args.data, policy), args.pairs)
    if len(groups) < 20:
        raise SystemExit(f"{len(groups)} labelled prompts are too few: 20, to hold out a tenth")
    groups = random.Random(f"held out {args.seed}").sample(groups, len(groups))   # may be sorted
    tests, groups = groups[:len(groups) // 10], groups[len(groups) // 10:]
    return groups, tests, [(q, a) for q, answers, _ in groups[:500] for a in answers]

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="Train a reward model on preferences.")
    # what is compared, and by whom; then, how it is learnt
    p.add_argument("--annotator", choices=data.TASTES, default="polite", help="whose taste")
    p.add_argument("--data", help="a file of prompt / chosen / rejected, or of HH-RLHF's lines")
    p.add_argument("--prompts", type=positive, default=8000, help="half facts and half how-to")
    p.add_argument("--answers", type=positive, default=8, help="sampled for each prompt")
    p.add_argument("--hot", type=float, default=1.4, help="temperature of every other; 0: off")
    p.add_argument("--votes", type=positive, default=3, help="annotators who see each pair")
    p.add_argument("--pairs", type=positive, help="pairs to learn from; default: all")
    p.add_argument("--epochs", type=positive, default=1, help="more than 1 only if pairs are few")
    p.add_argument("--batch-size", type=positive, default=8, help="questions a step, on all GPUs")
    p.add_argument("--lr", type=float, default=6e-4, help="peak learning rate of Adam")
    common_flags(p, "the SFT model; default: OUT/sft.pt", "seed of samples, labels and order")
    return p.parse_args(argv)

def main(argv=None):
    args = read_args(argv)
    device, out = start_training(args.device), Path(args.out)
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    out.mkdir(parents=True, exist_ok=True)
    world = None if args.data else data.world_of(policy)
    source = from_world if world else from_file
    groups, tests, reference = from_rank_0(lambda: source(policy, args))
    n_pairs = sum(len(pairs) for _, _, pairs in groups)
    print(f"{device}, {n_pairs} labelled pairs of answers to {len(groups)} prompts")
    torch.manual_seed(args.seed)                           # the new head depends on nothing else
    rm = ScalarModel(policy).to(device)                    # training it changes the policy, too
    history = train(rm, groups, args.epochs, args.batch_size, args.lr, args.seed,
                    progress=(out / "reward.resume.pt", args))
    finish_training()                                      # of several processes, one goes on
    scale, taste = normalise(rm, reference), args.annotator if world else None
    save_model(out / "reward.pt", rm, scale=scale, taste=taste)
    figures = evaluate(rm, world, tests, taste) if world else agreement(rm, tests)
    data.write_results(out, "reward", history, {"pairs": n_pairs} | figures)
    report = ", ".join(f"{name} {round(value, 3)}" for name, value in figures.items())
    print(f"\nheld-out prompts: {report}\n\nwrote {out / 'reward.pt'}; next: python ppo.py")

if __name__ == "__main__":
    main()
