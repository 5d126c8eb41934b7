"""Stage 3. Learn to score answers the way people rank them.

    P(A beats B) = sigmoid(r_A - r_B)                                   # Bradley & Terry 1952
    loss = - mean over pairs of  log sigmoid(r_chosen - r_rejected)     # Ouyang et al. 2022, eq. 1

Several answers to each prompt are sampled from the SFT model, some that belong to other prompts
("strays") are added, and nine simulated annotators compare every two. They share a known taste u
(correct, polite, to the point), but prefer A only with probability sigmoid(u_A - u_B), so they do
not always agree. The reward model never sees u. It learns from groups: a prompt, its different
answers, and for each pair (i, j, target): `target` is the share of annotators who preferred i.
    ("Where does Ann live?", ["In Oslo.", "In Rome.", "Oslo!"], [(0, 1, 8/9), (0, 2, 6/9), ...])
Eq. 1 takes the mean within each prompt first; here all pairs count alike.

    python reward.py [--data FILE]      writes out/reward.pt; FILE: see read_preferences in data.py
    python reward.py --annotator curt   another taste (or chatty); yours: docs/lab/annotate.py

Watch: the loss starts near ln 2 = 0.69, `agree` near 0.50. The loss cannot reach 0, nor accuracy
exceed the "ceiling", because the annotators disagree."""
import argparse
import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, GPTConfig, ScalarModel, answer, autocast, average_and_clip, common_flags,
                   finish_training, from_rank_0, gentle_rates, load, load_gpt, mean_over_processes,
                   my_share, number, positive, resume, save_model, save_progress, start_training)
from sft import freeze_words

def preference_loss(r_first, r_second, target):            # (N,), (N,), (N,) -> scalar
    """Mean cross-entropy, in nats, of P(first wins) = sigmoid(r_first - r_second) against `target`:
    1 or 0 for a choice, in between for a soft label. By hand, for scores 2 and 1: target 1 costs
    -log sigmoid(1) = 0.313, target 0 costs 1.313, equal scores ln 2. It is never infinite."""
    margin = r_first - r_second                            # log(sigmoid(-200)) would be log(0)
    return -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin)).mean()

def last_token_score(scalars, segments):                   # (B, T), (B, T) -> (B,)
    """The network gives each token a number; a sequence's score is the one at its last real token,
    the only one that has seen all others. Segments are 0 in the padding: scalars .3 .1 .7 .2 and
    segments 1 1 1 0 -> .7, where [:, -1] would read the padding's .2."""
    return scalars.gather(1, segments.sum(1, keepdim=True) - 1).squeeze(1)     # 3 tokens: place 2

def score(reward_model, sequences, batch_size=24):
    """N sequences (ids of prompt, answer, end-of-text) -> raw scores (N,), with gradients."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))     # little padding
    pad, scores = reward_model.tokenizer.pad, []
    for start in range(0, len(order), batch_size):
        batch = [sequences[i] for i in order[start:start + batch_size]]
        tokens = data.pad_rows(batch, pad).to(reward_model.device)     # (B, T)
        segments = (tokens != pad).long()
        scores.append(last_token_score(reward_model(tokens, segments), segments))
    return torch.cat(scores)[np.argsort(order)]            # undoes the sorting: 2 0 1 -> 1 2 0

@torch.no_grad()
def score_texts(reward_model, conversations):
    """Raw scores (N,), on the CPU, of (question, answer) pairs."""
    examples = [data.chat_example(reward_model.tokenizer, q, a) for q, a in conversations]
    return score(reward_model, [ids for ids, _ in examples]).cpu()

def preference_prompts(world, use, n):
    """n harmless questions, how-to and facts by turns, for a use: "train" or "test"."""
    howto = itertools.cycle([a.question() for a in data.act_prompts(world, use, n, harmful=False)])
    turns = [howto, itertools.cycle(data.fact_questions(world, use))]
    if use == "train":
        # by turns people whose facts demonstrations told, and others, about whom it errs more
        turns += [howto, itertools.cycle(data.fact_questions(world, "demo"))]
    return [next(turns[i % len(turns)]) for i in range(n)]

def sample_answers(model, questions, k, seed, hot=None, fewest=2):
    """k answers to each question -> [(question, [different ones])], if at least `fewest`. Every
    other one is sampled at temperature `hot`: at 1, a good model makes too few mistakes."""
    asked = [question for question in questions for _ in range(k)]     # k = 4: Q Q Q Q R R R R
    texts = [""] * len(asked)
    texts[::2] = answer(model, asked[::2], seed=seed)                  # places 0, 2, 4, 6
    texts[1::2] = answer(model, asked[1::2], temperature=hot or 1.0, seed=(*seed, 1))  # 1, 3, 5, 7
    answers = [list(dict.fromkeys(texts[i:i + k])) for i in range(0, len(texts), k)]   # each once
    return [(q, different) for q, different in zip(questions, answers) if len(different) >= fewest]

def with_strays(world, answered):
    """Add to each question's answers three strays, answers to other questions. A judge that has
    never read one cannot know that it is bad, and PPO would find that out. The last has the same
    form, often with just a wrong name: to "How do I hug Tom?", "To hug Ann, use a blanket."."""
    asked, added = [world.parse_question(question) for question, _ in answered], []
    people = [a.person if isinstance(a, data.Act) else a[0] for a in asked]
    forms = [a.verb if isinstance(a, data.Act) else a[1] for a in asked]   # a fact's: its attribute
    for i, (question, answers) in enumerate(answered):
        same_kind = (i + 2) % len(answered)                # mostly, as how-to and facts take turns
        after = [*range(i + 1, len(answered)), *range(i + 1)]  # going round; at last, i itself
        same_person = next(k for k in after if people[k] == people[i])
        same_form = next(k for k in after if forms[k] == forms[i])
        strays = [answered[k][1][0] for k in (same_kind, same_person, same_form)]
        added.append((question, list(dict.fromkeys(answers + strays))))    # each text once
    return added

def annotate(world, answered, seed, taste="polite", votes=1):
    """[(question, answers)] -> groups. Each of `votes` simulated annotators chooses between every
    two answers: of utilities 3 and 2, they choose the first with p = sigmoid(3 - 2) = 0.73."""
    rng, groups = random.Random(f"annotator {seed}"), []
    for question, answers in answered:
        u, pairs = [data.utility(world, question, a, taste) for a in answers], []
        for i, j in itertools.combinations(range(len(answers)), 2):
            p_first = 1 / (1 + np.exp(u[j] - u[i]))        # sigmoid(u_i - u_j)
            pairs.append((i, j, sum(rng.random() < p_first for _ in range(votes)) / votes))
        groups.append((question, answers, pairs))
    return groups

def train(reward_model, groups, epochs, batch_size, lr, seed, progress=None):
    """Fit the scores to the labels, in place -> history, a row every 10 steps. A batch is all pairs
    of `batch_size` groups, so that a group's answers are read once per epoch. With pairs shuffled,
    they would come again in many batches and be learnt by heart (Ouyang et al. 2022)."""
    batches, order = [groups[i:i + batch_size] for i in range(0, len(groups), batch_size)], []
    for epoch in range(epochs):
        order += np.random.default_rng([seed, 3, epoch]).permutation(len(batches)).tolist()
    freeze_words(reward_model)                             # or it learns the names by heart
    optimizer = torch.optim.Adam(reward_model.parameters(), lr=lr, betas=(0.9, 0.95))
    start, history = resume(progress, model=reward_model, optimizer=optimizer)
    bar = tqdm(range(start, len(order)), "reward", len(order), initial=start, unit="step")
    for step in bar:
        # from 0 up in the first 5%, or the new head would shake what the trunk knows; then to 0
        optimizer.param_groups[0]["lr"] = lr * min(20 * (step + 1), len(order) - step) / len(order)
        mine, weight = my_share(batches[order[step]], lambda group: len(group[2]))     # by pairs
        # P: answers a b c, pairs (0, 1, 1) (1, 2, 0), and Q: answers d e, pair (0, 1, 1), become
        # sequences Pa Pb Pc Qd Qe, pairs (0, 1, 1) (1, 2, 0) (3, 4, 1): each answer is read once
        sequences, pairs = [], []
        for asked, answers, labels in mine:
            before = len(sequences)                        # for Q: 3
            pairs += [(before + i, before + j, target) for i, j, target in labels]
            sequences += [data.chat_example(reward_model.tokenizer, asked, a)[0] for a in answers]
        pairs = torch.tensor(pairs, device=reward_model.device)        # (N, 3) for N pairs
        first, second, target = pairs[:, 0].long(), pairs[:, 1].long(), pairs[:, 2]
        with autocast(reward_model.device):
            r = score(reward_model, sequences).float()     # bfloat16 has too few digits for margins
            loss = preference_loss(r[first], r[second], target) * weight
        optimizer.zero_grad()
        loss.backward()                                    # there is no dropout, so no .train()
        average_and_clip(reward_model)                     # over processes; norm 1 at most
        optimizer.step()
        if step % 10 == 9 or step + 1 == len(order):
            agree = (r[first] > r[second]) == (target > 0.5)       # nobody can agree with a tie
            sums = torch.stack([loss.detach(), agree[target != 0.5].sum(), (target != 0.5).sum()])
            loss, agree, decided = mean_over_processes(sums).tolist()
            agree /= max(decided, 1e-9)
            bar.set_postfix(loss=f"{loss:.3f}", agree=f"{agree:.2f}")
            history.append({"step": step + 1, "train_loss_nats": loss, "train_agreement": agree})
            save_progress(progress, step + 1, history, model=reward_model, optimizer=optimizer)
    return history

def normalise(reward_model, conversations, std=None):
    """Raw scores of reference conversations -> mean, std (or the given one) and, in units of std,
    their lowest and their deviation: of 1 2 6, mean 3, std 2.65, lowest -0.76, margin 1."""
    # the loss sees differences alone, so the level is arbitrary; PPO's KL penalty needs a fixed one
    finished = [pair for pair in conversations if pair[1]]         # "": was cut off, see `answer`
    raw = score_texts(reward_model, finished if len(finished) > 1 else conversations)
    mean, spread = raw.mean().item(), raw.std().item()
    if not spread > 0:                                     # 0, or not a number
        raise SystemExit("the reference answers all score alike: raise --prompts, or lower --lr")
    std = std or spread
    return dict(mean=mean, std=std, lowest=(raw.min().item() - mean) / std, margin=spread / std)

def evaluate(reward_model, world, answered, taste="polite"):
    """Held-out [(question, answers)] -> figures, means over all pairs of answers to one question.
    P(first wins) is predicted from score_texts, and known from data.utility, u. accuracy, ceiling:
    P that a new label agrees with the model, with a judge who knows u; share_of_ceiling: above .5;
    calibration_error: gap of the two P; longer_wins: predicted, of two answers that are as good."""
    texts, pairs = [], []
    for question, answers in answered:
        places = range(len(texts), len(texts) + len(answers))          # of these answers in texts
        pairs += itertools.combinations(places, 2)         # within a question, never across two
        texts += [(question, a) for a in answers]
    first, second = torch.tensor(pairs).T                  # (N,) each
    r = score_texts(reward_model, texts)                   # one for each answer, as are u and words
    u = torch.tensor([data.utility(world, question, a, taste) for question, a in texts])
    words = torch.tensor([len(a.split()) for _, a in texts])
    predicted = torch.sigmoid(r[first] - r[second])        # P(first wins), for each pair ...
    known = torch.sigmoid(u[first] - u[second])            # ... and what it really is
    accuracy = torch.where(predicted > 0.5, known, 1 - known).mean().item()  # a new label agrees
    ceiling = torch.maximum(known, 1 - known).mean().item()  # ... with a judge who knows u
    p_longer = torch.where(words[first] > words[second], predicted, 1 - predicted)
    equal = (u[first] == u[second]) & (words[first] != words[second])
    return {"accuracy": accuracy, "ceiling": ceiling, "pairs_heldout": len(known),
            "calibration_error": (predicted - known).abs().mean().item(),
            "correlation": torch.corrcoef(torch.stack([r, u]))[0, 1].item(),
            "longer_wins": p_longer[equal].mean().item(),  # above 0.5: length is rewarded
            "share_of_ceiling": (accuracy - 0.5) / max(ceiling - 0.5, 1e-9)}   # all equal: no 0/0

def agreement(reward_model, groups):
    """Where u is unknown: with how many of a prompt's labels the model agrees, ties left out; mean
    and 95% interval from drawing prompts anew, since pairs of one prompt share answers."""
    hits, ties = [], 0
    for question, answers, pairs in groups:
        r = score_texts(reward_model, [(question, a) for a in answers])
        right = [(r[i] > r[j]).item() == (t > 0.5) for i, j, t in pairs if t != 0.5]
        hits.append(right)
        ties += len(pairs) - len(right)
    hits = [np.mean(right) for right in hits if right]
    drawn = np.random.default_rng(0).choice(hits, (1000, len(hits))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return {"accuracy": float(np.mean(hits)), "accuracy_low": low, "accuracy_high": high,
            "prompts_heldout": len(hits), "ties_heldout": ties}

def groups_of(pairs):
    """[(prompt, chosen, rejected, votes for it, against)] -> groups, with a pair's mean vote."""
    prompts = {}
    for prompt, chosen, rejected, won, lost in pairs:      # str, as a list cannot be a key
        _, answers, votes = prompts.setdefault(str(prompt), (prompt, [], {}))
        answers += [text for text in (chosen, rejected) if text not in answers]
        i, j = answers.index(chosen), answers.index(rejected)
        votes.setdefault((min(i, j), max(i, j)), []).append((won, lost) if i < j else (lost, won))
    means = lambda votes: [(*p, float(np.sum(v, 0)[0] / np.sum(v))) for p, v in votes.items()]
    return [(prompt, answers, means(votes)) for prompt, answers, votes in prompts.values()]

def take_pairs(groups, n):
    """Groups from the start until n pairs are reached; all where n is None."""
    totals = np.cumsum([len(pairs) for _, _, pairs in groups])
    return groups if n is None else groups[:np.searchsorted(totals, n) + 1]

def write_preferences(path, groups, votes=1):
    """A line for each pair: prompt, chosen, rejected, votes: [for the chosen one, against it]."""
    with open(path, "w", encoding="utf-8") as file:
        for question, answers, pairs in groups:
            for i, j, target in pairs:
                a, b = (i, j) if target > 0.5 else (j, i)  # a won
                most = round(votes * max(target, 1 - target))
                record = {"prompt": question, "chosen": answers[a], "rejected": answers[b],
                          "votes": [most, votes - most]}
                file.write(json.dumps(record) + "\n")

def groups_from_file(path, model):
    """A file's preferences that fit the model's context -> groups; says what was left out."""
    (pairs, skipped), room = data.read_preferences(path), model.config.context
    ids = lambda prompt, text: data.chat_example(model.tokenizer, prompt, text)[0]
    fit = [p for p in pairs if max(len(ids(p[0], p[1])), len(ids(p[0], p[2]))) <= room]
    skipped[f"longer than the context of {room} tokens"] = len(pairs) - len(fit)
    print(f"{path}: {len(fit)} usable pairs; skipped: {data.reasons(skipped)}")
    if not fit:
        raise SystemExit(f"{path}: no usable pair is left, see the reasons above")
    print(f"the first, as it is read: {model.tokenizer.decode(ids(*fit[0][:2]))!a}")
    return groups_of(fit)

def load_reward(path, policy):
    """A file like out/reward.pt -> ScalarModel in eval mode, with its scale and taste, if known."""
    saved, tokenizer, room = load(path, "reward.py"), policy.tokenizer, policy.config.context
    if not {"scale", "config", "tokenizer", "model"} <= saved.keys():
        raise SystemExit(f"{path} holds no reward model: run `python reward.py` first")
    if saved["tokenizer"] != tokenizer.state() or saved["config"]["context"] < room:
        raise SystemExit(f"{path}: its tokenizer or context differs: run `python reward.py`")
    model = ScalarModel(GPT(GPTConfig(**saved["config"]), tokenizer, saved.get("world_seed")))
    model.load_state_dict(saved["model"])
    model.scale, model.taste = saved["scale"], saved.get("taste")
    return model.to(policy.device).eval()

def from_world(policy, args):
    """Labels of the simulated annotators, also written to a file -> groups to learn from; held-out
    [(question, answers)], plain and hard ones; what to score 0 in the mean, with deviation 1."""
    world, seed, k = data.world_of(policy), args.seed, args.answers
    questions = preference_prompts(world, "train", args.prompts)
    answered = sample_answers(policy, questions, k, (seed, 31), args.hot)
    plain = sample_answers(policy, preference_prompts(world, "test", 300), k, (seed, 32))
    hard = sample_answers(policy, [question for question, _ in plain], k, (seed, 34), args.hot)
    if not answered or not plain or not hard:
        raise SystemExit("one answer only to every question: raise --prompts or --answers")
    tests = {"": plain, "_hard": with_strays(world, hard)}
    groups = annotate(world, with_strays(world, answered), seed, args.annotator, args.votes)
    groups, asked = take_pairs(groups, args.pairs), questions[:500]    # enough for a scale
    from_rank_0(lambda: write_preferences(Path(args.out, "preferences.jsonl"), groups, args.votes))
    return groups, tests, list(zip(asked, answer(policy, asked, seed=(seed, 33), whole=True)))

def from_file(policy, args):
    """The same three from the labels of --data; a tenth of the groups is held out, with labels."""
    groups = take_pairs(groups_from_file(args.data, policy), args.pairs)
    if len(groups) < 20:
        raise SystemExit(f"{len(groups)} labelled prompts are too few: 20, to hold out a tenth")
    groups = random.Random(f"held out {args.seed}").sample(groups, len(groups))   # may be sorted
    tests, groups = groups[:len(groups) // 10], groups[len(groups) // 10:]
    if all(label[2] == 0.5 for _, _, labels in tests for label in labels):
        raise SystemExit(f"{args.data}: the held-out labels are all ties: give more preferences")
    return groups, {"": tests}, [(q, a) for q, answers, _ in groups[:500] for a in answers]

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="Train a reward model on preferences.")
    p.add_argument("--annotator", choices=data.TASTES, default="polite", help="whose taste")
    p.add_argument("--data", help="a file of prompt / chosen / rejected, or of HH-RLHF's lines")
    p.add_argument("--prompts", type=positive, default=6000, help="half facts and half how-to")
    p.add_argument("--answers", type=positive, default=6, help="sampled for each prompt")
    p.add_argument("--hot", type=number(0, 9), default=1.4, help="temperature of every other, or 0")
    p.add_argument("--votes", type=positive, default=9, help="annotators who see each pair")
    p.add_argument("--pairs", type=positive, help="pairs to learn from; default: all")
    p.add_argument("--epochs", type=positive, default=1, help="more than 1 only if pairs are few")
    p.add_argument("--batch-size", type=positive, default=2, help="questions a step, on all GPUs")
    p.add_argument("--lr", type=number(0, 1), help="peak; default: 4e-4, of published weights 3e-5")
    common_flags(p, "the SFT model; default: OUT/sft.pt", "seed of samples, labels and order")
    return p.parse_args(argv)

def main(argv=None):
    args = read_args(argv)
    device, out = start_training(args.device), Path(args.out)
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", device)
    gentle_rates(args, policy, lr=(4e-4, 3e-5))
    world, source = (None, from_file) if args.data else (data.world_of(policy), from_world)
    groups, tests, reference = source(policy, args)
    n_pairs = sum(len(pairs) for _, _, pairs in groups)
    print(f"{device}, {n_pairs} labelled pairs of answers to {len(groups)} prompts")
    torch.manual_seed(args.seed)                           # the new head depends on nothing else
    rm = ScalarModel(policy).to(device)                    # no copy: the policy's work here is done
    history = train(rm, groups, args.epochs, args.batch_size, args.lr, args.seed,
                    progress=(out / "reward.resume.pt", args))
    finish_training()                                      # only one of several processes goes on
    rm.scale, rm.taste = normalise(rm, reference), args.annotator if world else None
    save_model(out / "reward.pt", rm, scale=rm.scale, taste=rm.taste)
    figures = {"pairs": n_pairs}
    for name, cases in tests.items():
        found = evaluate(rm, world, cases, rm.taste) if world else agreement(rm, cases)
        figures |= {f"{what}{name}": value for what, value in found.items()}
    data.write_results(out, "reward", history, figures)
    question, answers = tests[""][0][:2]                   # to show what a score is
    print(f"\n{question}  (0: mean of the reference answers, +1: a standard deviation above it)")
    for text, raw in zip(answers, score_texts(rm, [(question, a) for a in answers]).tolist()):
        print(f"  {(raw - rm.scale['mean']) / rm.scale['std']:+.2f}  {text}")
    report = ", ".join(f"{name} {round(value, 3)}" for name, value in figures.items())
    print(f"\nheld-out prompts: {report}\n\nwrote {out}/reward.pt; next: python ppo.py --out {out}")

if __name__ == "__main__":
    main()
