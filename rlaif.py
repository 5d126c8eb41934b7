"""Stage 5. Constitutional AI: harm is labelled by an AI with written principles, not by people.

    1. SL-CAI   a harmful request -> answer -> critique -> revision -> critique -> revision ...
                the pre-trained model is fine-tuned on the revisions, and on helpful answers
    2. RL-CAI   a request, two answers, a principle: which answer is better?
                    label = P("A") / (P("A") + P("B")),  averaged over both orders
                a preference model learns the labels (soft ones, by preference_loss in reward.py),
                and PPO learns from it

RLHF (its functions, on new data) with an AI to label harm (Bai et al. 2022b). Who does what:

    helpful model (ppo.pt)     answers harmful requests, and helps: the harm to be mended
    base model (pretrain.pt)   critic, reviser and judge, skills from documents on other cases (in
                               the paper it is the helpful model; ours lost them in fine-tuning)
    people (simulated)         label helpfulness, as in reward.py, and never harm
    gold judges of harm        are used only after training

    python rlaif.py            writes slcai.pt, rlaif_pm.pt, rlaif.pt; traces and labels (.jsonl)
    python rlaif.py --show     one request from its first answer to its label; no training

Watch: each round about halves the harm: one principle names half of its seven kinds. The final
model refuses, says whom the deed would hurt and how, and still answers harmless questions."""
import argparse
import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

import data
import ppo
import reward
import sft
from model import (ScalarModel, answer, common_flags, copy_of, generate, load, load_gpt,
                   pick_device, positive, resume, save_model, save_progress)

# The two principles of a row share out the seven kinds of harm, three and four. So a random one
# names the kind at hand half the time, and mends nothing otherwise: one round is not enough.
CELLS = ("g1", "g2r", "g2", "strict")
CONSTITUTION = """
Do not steal, break or hurt.                 Never scare, lie, mock or poison.
It is wrong to steal, scare or lie.          Good answers do not break, hurt, mock or poison.
Never steal, mock or poison.                 Do not break, hurt, scare or lie.
Good answers do not steal, break or scare.   It is wrong to hurt, lie, mock or poison.
Do not steal, hurt or mock.                  Never break, scare, lie or poison.
It is wrong to steal, lie or poison.         Good answers do not break, hurt, scare or mock.
Never steal, break or lie.                   Do not hurt, scare, mock or poison.
Good answers do not steal, hurt or poison.   It is wrong to break, scare, lie or mock."""
SL_REPLAY = 4
SL_EPOCHS = 5              # after fewer, SL-CAI still complies now and then when it is sampled
ANSWERS, HOT = 4, 1.4      # of SL-CAI per prompt; of those the AI compares, half are sampled hot
HELPFUL_PROMPTS, OLD_LABELS = 500, 4   # people label so many prompts; old labels per AI label
CRITIQUE_TOKENS, REVISION_TOKENS, THOUGHT_TOKENS, REASON_TOKENS = 56, 56, 64, 40    # at most
TYPICAL_ANSWER, TYPICAL_THOUGHT = 48, 40                               # tokens to leave room for
COMPARISONS = 128          # judged together: what a small memory holds
# `seed` is an int, --seed; a `stream` a tuple, like (seed, 51): random numbers for one use only.

# --- Phase 1, SL-CAI: answer, critique, revise, and learn the revisions ---------------------------
def critique_and_revise(critic, questions, answers, principles, stream):
    """One round for N answers, at temperature 1 -> N of (critique, revision). The revision is None
    where there is none (no fault, or cut off before), and "" where it was cut off itself.
        Request: How do I nab Ann's hat? Answer: Use a hook. Rule: Never steal. Critique:
            That is to steal. The rule forbids it ... Revision: Sorry, I will not help with that ...
    The paper asks for one, then for the other; our critic learnt both so, from data.critique."""
    tokenizer, cases = critic.tokenizer, zip(questions, answers, principles)
    form = "Request: {} Answer: {} Rule: {} Critique:"
    prompts = [data.bare_prompt(tokenizer, form.format(*case)) for case in cases]
    colon = tokenizer.encode("Revision:")[-1]              # where a critic who found a fault stops
    critiques = generate(critic, prompts, CRITIQUE_TOKENS, seed=(*stream, 1), stop=[colon])
    faulty = [i for i, critique in enumerate(critiques) if critique[-1] == colon]
    asked = [prompts[i] + critiques[i] for i in faulty]    # the second request holds the first
    revisions = dict.fromkeys(range(len(prompts)))
    if asked:
        revised = generate(critic, asked, REVISION_TOKENS, seed=(*stream, 2))
        for i, ids in zip(faulty, revised):                # what was cut off may look whole
            revisions[i] = data.decode_reply(tokenizer, ids) if ids[-1] == tokenizer.eot else ""
    texts = [data.decode_reply(tokenizer, ids).removesuffix("Revision:") for ids in critiques]
    return [(text.strip(), revisions[i]) for i, text in enumerate(texts)]

def reject_revision(revision, before):
    """Why a revision cannot be used, or None. A public replication that kept them all collapsed."""
    sentences = data.sentences_of(revision)
    if not sentences or revision[-1] not in ".?!":
        return "unfinished"
    if any(word in revision for word in ("Request:", "Answer:", "Rule:", "Critique:", "Revision:")):
        return "role words inside"                         # the critic began another document
    if len(set(sentences)) < len(sentences):
        return "repeats itself"
    return "unchanged" if revision == before else None     # although the critic found a fault

def revise_rounds(helpful, critic, questions, rules, rounds, seed, revise=critique_and_revise):
    """Section 3.1 of the paper -> for each question a trace {"question", "answers": [rounds + 1],
    "steps": [{"principle", "critique", "revision", "dropped": why, or None}]}."""
    firsts = answer(helpful, questions, seed=(seed, 51))   # at temperature 1, as in the paper
    traces = [{"question": q, "answers": [a], "steps": []} for q, a in zip(questions, firsts)]
    for k in range(rounds):
        rng = random.Random(f"principles {seed} {k}")
        principles = [rng.choice(rules) for _ in questions]  # one per request and round
        latest = [trace["answers"][-1] for trace in traces]    # a fresh start: no old critiques
        steps = revise(critic, questions, latest, principles, (seed, 52, k))
        for trace, before, rule, (critique, revision) in zip(traces, latest, principles, steps):
            dropped = None if revision is None else reject_revision(revision, before)
            trace["steps"].append({"principle": rule, "critique": critique,
                                   "revision": revision, "dropped": dropped})
            trace["answers"].append(before if revision is None or dropped else revision)
    return traces

def to_learn(traces, which="revisions"):
    """What SL-CAI learns -> [(question, answer)]: the "revisions" of all rounds, as in the paper;
    "last" answers, for a constitution that allows some of the requests; or "all" but the first."""
    pairs = []             # an answer that no round revised is not among the "revisions"
    for trace in traces:
        made = [s["revision"] for s in trace["steps"] if s["revision"] and not s["dropped"]]
        texts = {"revisions": made, "last": trace["answers"][-1:], "all": trace["answers"][1:]}
        pairs += [(trace["question"], text) for text in texts[which]]
    return pairs

def mostly_facts(world, n, cells=("g1",)):
    """n harmless prompts, three in four about facts. These keep knowledge in use; every how-to
    answer also teaches that how-to requests get answered, even unfamiliar harmful ones."""
    facts = reward.preference_prompts(world, "train", 2 * n)[1::2]
    how_to = [act.question() for act in in_cells(world, n, False, cells)]
    return [facts[i] if i % 4 else how_to[i // 4] for i in range(n)]

def in_cells(world, n, harmful, cells):
    """n acts to ask about, of these cells by turns."""
    drawn = [data.act_prompts(world, "train", n, harmful, (cell,)) for cell in cells]
    return list(itertools.chain(*zip(*drawn)))[:n]

def train_slcai(base, helpful, revisions, harmless, args):
    """Fine-tune a copy of the base model on (question, revision) pairs and on the helpful model's
    answers to harmless questions, without which it would refuse those too -> GPT."""
    helped = list(zip(harmless, answer(helpful, harmless, seed=(args.seed, 53))))
    slcai = copy_of(base)           # not of the helpful model, which would have to unlearn its ways
    own = dict(epochs=SL_EPOCHS, batch_size=32, lr=args.sl_lr, replay_rows=SL_REPLAY)
    sft.train(slcai, revisions + helped, argparse.Namespace(**(vars(args) | own)))
    return slcai

# --- Phase 2, RL-CAI: an AI compares answers, a preference model learns, PPO does the rest --------
# The AI compares answers to harmful requests (a refusal with its reason should win) and to harmless
# twins, one verb apart (help should win); where the principle names no harm: 0.5. As in reward.py,
# `answered` is [(question, [answers])]; a group adds to it [(i, j, P(i beats j))].
@torch.no_grad()
def prefer_first(judge, questions, firsts, seconds, principles, stream):
    """The judge's P(A), where A is the first answer and B the second, after a thought -> (N,).
        Request: ... Rule: ... Answer (A): ... Answer (B): ... Thought:
            ... The better answer is (          <- sampled up to here; then P(A) and P(B) are read
    Only these count: .30 and .10 give .75. It is nan, for no verdict, if the thought was cut off or
    neither letter is the likeliest token there. The form is that of data.comparison."""
    tokenizer, cases = judge.tokenizer, zip(questions, principles, firsts, seconds)
    form = "Request: {} Rule: {} Answer (A): {} Answer (B): {} Thought:"
    prompts = [data.bare_prompt(tokenizer, form.format(*case)) for case in cases]
    # documents end "is (A).": " (" is one token, then comes "A" without a space: the last of "(A"
    bracket, A, B = (tokenizer.encode(text)[-1] for text in (" (", "(A", "(B"))
    thoughts = generate(judge, prompts, THOUGHT_TOKENS, seed=stream, stop=[bracket])  # ( included
    rows, p_first = [prompt + thought for prompt, thought in zip(prompts, thoughts)], []
    for i in range(0, len(rows), COMPARISONS):             # padded left: the bracket is last in all
        tokens = data.pad_rows(rows[i:i + COMPARISONS], tokenizer.pad, left=True).to(judge.device)
        hidden = judge.hidden(tokens, (tokens != tokenizer.pad).long())[:, -1]  # (batch, channels)
        logits = judge.head(hidden)                        # (batch, V)
        letter = torch.isin(logits.argmax(-1), torch.tensor([A, B], device=judge.device))
        p_first.append(logits[:, [A, B]].softmax(-1)[:, 0].where(letter, torch.nan).cpu())
    verdict = torch.tensor([thought[-1] == bracket for thought in thoughts])    # False: cut off
    return torch.where(verdict, torch.cat(p_first), torch.nan)

def both_orders(judge, questions, firsts, seconds, principles, stream):
    """-> P(the first is better); forward, backward, P(A) with the first or second as A; (N,) each.
    Small judges prefer a position: .9, .5 make (.9 + 1 - .5) / 2 = .7; .9, .9 (always A) make .5"""
    forward = prefer_first(judge, questions, firsts, seconds, principles, (*stream, 61))
    backward = prefer_first(judge, questions, seconds, firsts, principles, (*stream, 62))
    return (forward + 1 - backward) / 2, forward, backward

def ai_labels(judge, answered, constitution, seed, hard=False, clamp=0.5):
    """Compare every two answers to a question by a principle drawn for them -> groups; a record of
    one dict per pair with a verdict: a_first, b_first are P(a is better) with a, or b, as option A.
    Soft labels within 0.5 +- clamp (0.5: no clamp; the paper: 0.1, because after a thought the
    verdict is too sure of itself), or `hard` ones: 1, 0, and 0.5 if undecided; nan stays nan."""
    rng, asked = random.Random(f"labels {seed}"), []
    for question, answers in answered:
        for a, b in itertools.combinations(answers, 2):
            asked.append((question, a, b, rng.choice(constitution)))
    labels, forward, backward = both_orders(judge, *zip(*asked), (seed,))
    hard_labels = torch.where((labels - 0.5).abs() < 1e-6, 0.5, (labels > 0.5) + 0 * labels)  # nan
    labels = hard_labels if hard else labels.clamp(0.5 - clamp, 0.5 + clamp)
    names = ("prompt", "a", "b", "principle", "label", "a_first", "b_first")
    numbers = torch.stack([labels, forward, 1 - backward], 1).double().round(decimals=4).tolist()
    record = [dict(zip(names, [*case, *row])) for case, row in zip(asked, numbers)]
    record = [row for row in record if not np.isnan(row["label"])]
    targets, groups = iter(labels.tolist()), []            # one after the other, as in `asked`
    for question, answers in answered:
        pairs = [(*ij, next(targets)) for ij in itertools.combinations(range(len(answers)), 2)]
        groups.append((question, answers, [pair for pair in pairs if not np.isnan(pair[2])]))
    print(f"{len(asked) - len(record)} of {len(asked)} comparisons: no verdict, so left out")
    return [group for group in groups if group[2]], record

def answers_to_compare(start, helpful, prompts, seed):
    """SL-CAI's answers to each prompt, a refusal, and an answer of the helpful model -> `answered`.
    SL-CAI's own may all be one refusal, or all help: without the other two no label would say that
    to refuse harm is right, and to refuse its benign twin is wrong."""
    answered = reward.sample_answers(start, prompts, ANSWERS, (seed, 54), HOT, fewest=1)
    answered = with_forced_refusal(start, answered, (seed, 58))
    for (_, answers), other in zip(answered, answer(helpful, prompts, seed=(seed, 59))):
        if other not in answers:                           # a pair, even beside one refusal alone
            answers.append(other)
    answered = [(question, answers) for question, answers in answered if len(answers) > 1]
    if not answered:
        raise SystemExit("the models give one answer only to every prompt: raise --label-prompts")
    return answered

def with_forced_refusal(model, answered, stream):
    """Add an answer that was made to open with a refusal, so that people can vote needless refusals
    down. Not in the paper; without it a refusal seldom loses, and the policy refuses everything."""
    opening = model.tokenizer.encode(" " + data.REFUSAL)
    prompts = [data.chat_prompt(model.tokenizer, question) + opening for question, _ in answered]
    endings = generate(model, prompts, REASON_TOKENS, seed=stream)     # mostly a reason
    for (_, answers), ending in zip(answered, endings):
        refusal = data.decode_reply(model.tokenizer, opening + ending)
        if refusal not in answers:                         # SL-CAI may have refused by itself
            answers.append(refusal)
    return answered

def train_preference_model(start, harm, old, world, prompts, lr, seed):
    """The reward model of reward.py, from SL-CAI's weights -> (model, counts of pairs). Its groups:
        harm      the AI labels SL-CAI's answers            refuse harm and say why, help twins
        helpful   one person, of polite taste, labels them  help, refuse nothing needlessly
        old       reward.py's labels of SFT's answers      do not say what is wrong"""
    helpful = []
    if world:
        questions = reward.preference_prompts(world, "train", HELPFUL_PROMPTS)
        answered = reward.sample_answers(start, questions, ANSWERS, (seed, 55), fewest=1)
        helpful = reward.annotate(world, with_forced_refusal(start, answered, (seed, 56)), seed + 1)
    pairs = lambda groups: sum(len(labels) for _, _, labels in groups)
    old = reward.take_pairs(old, OLD_LABELS * pairs(harm))
    counts = {"ai_labels": pairs(harm), "human_help_labels": pairs(helpful),
              "human_help_labels_rlhf": pairs(old)}
    groups = harm + helpful + old
    random.Random(f"mix {seed}").shuffle(groups)
    torch.manual_seed(seed)                                # the new head depends on the seed alone
    model = ScalarModel(copy_of(start)).to(start.device)
    reward.train(model, groups, epochs=1, batch_size=16, lr=lr, seed=seed)
    # std=1.0: not rescaled, as a standard deviation would measure the arbitrary gap between prompts
    conversations = list(zip(prompts, answer(start, prompts, seed=(seed, 57))))
    model.scale = reward.normalise(model, conversations, std=1.0)
    return model, counts

def reinforce(start, pm, red_team, harmless, args):
    """PPO from SL-CAI, on harmless and red-team prompts by turns -> (policy, history)."""
    def questions_at(step):
        rng = random.Random(f"prompts {args.seed} {step}")  # half of each, as in the paper
        return [rng.choice(red_team if i % 2 else harmless) for i in range(args.batch_size)]
    policy, value = copy_of(start), ppo.value_from(pm)     # they share nothing, as in ppo.py
    return policy, ppo.train(policy, value, questions_at, ppo.score_by_model(pm), args)

def main(argv=None):
    args = read_args(argv)
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    data.GOLD_HARM_CALLS.clear()                           # there must be no call before evaluation
    base, sft_model, helpful = load_models(inputs, args.init, device)
    world = None if args.prompts else data.world_of(base)  # None: nobody knows what is right
    rules = open_constitution(args.constitution, world)
    critic = helpful if args.critic == "self" else base
    red_team, harmless, _ = from_world(world, args, ("g1",)) if world else from_files(args)
    wide = from_world(world, args, ("g1", "g2r")) if world else from_files(args)
    more, mixed, benign = wide
    red_team, more, benign = (questions_that_fit(base, rules, asked)
                              for asked in (red_team, more, benign))
    mixed = ppo.prompts_that_fit(mixed, base.tokenizer, base.config.context - args.max_new)
    harmless = ppo.prompts_that_fit(harmless, base.tokenizer, base.config.context - args.max_new)
    print(f"{device}, {len(rules)} principles, {len(red_team)} red-team prompts")
    if args.show:
        traces = revise_rounds(helpful, critic, red_team[:1], rules, args.rounds, args.seed)
        return show_trace(traces, critic, rules, args.seed)
    old = read_labels(args.preferences, inputs, base)
    # four steps follow: each keeps its work in a file, and --resume skips those already `done`
    progress = (out / "rlaif.progress", args)
    done, traces = resume(progress)
    if done < 1:       # 1. critique and revise harmful answers
        traces = revise_rounds(helpful, critic, red_team, rules, args.rounds, args.seed)
        write_lines(out / "rlaif_traces.jsonl", traces)    # read some before you trust them
        save_progress(progress, 1, traces)
    show_trace(traces, critic, rules, args.seed)
    if done < 2:       # 2. SL-CAI: the base model learns the revisions
        revisions = to_learn(traces, args.learn)
        slcai = train_slcai(base, helpful, revisions, harmless, args)
        save_model(out / "slcai.pt", slcai)
        save_progress(progress, 2, traces)
    slcai = load_gpt(out / "slcai.pt", device=device)
    if done < 3:       # 3. AI labels of harm, human labels of helpfulness: one preference model
        compared = []                                      # as many red-team prompts as benign ones
        for i, question in enumerate(benign):
            compared += [more[i % len(more)], question]
        answered = answers_to_compare(slcai, helpful, compared, args.seed)
        harm, record = ai_labels(critic, answered, rules, args.seed, args.hard, args.clamp)
        write_lines(out / "rlaif_labels.jsonl", record)    # so that the judge can be judged
        both = red_team[:250] + harmless[:250]             # SL-CAI's answers to them will average 0
        pm, counts = train_preference_model(slcai, harm, old, world, both, args.pm_lr, args.seed)
        save_model(out / "rlaif_pm.pt", pm, scale=pm.scale, counts=counts)
        save_progress(progress, 3, traces)
    pm = reward.load_reward(out / "rlaif_pm.pt", slcai)
    if done < 4:       # 4. RL-CAI: PPO, as in ppo.py
        policy, history = reinforce(slcai, pm, more, mixed, args)
        data.write_results(out, "rlaif", history)
        save_model(out / "rlaif.pt", policy)
        save_progress(progress, 4, traces)
    policy = load_gpt(out / "rlaif.pt", device=device)
    models = {"sft": sft_model, "rlhf": helpful, "slcai": slcai, "rlcai": policy}
    figures = load(out / "rlaif_pm.pt")["counts"]          # pairs labelled by the AI, by people
    if world:          # training is over: only now are the gold judges of harm used
        figures |= count_and_judge(traces, load(inputs / "pretrain.pt").get("documents") or {})
        figures |= measure_critic(critic, critic, world, args.eval_prompts, args.seed)
        cells = {"g3": "g1"} if args.constitution == "unseen" else {c: c for c in CELLS}
        figures |= final_table(models, world, cells, args.eval_prompts, args.seed)
    data.write_results(out, "rlaif", figures=figures)
    for asked in (red_team[:1], benign[:1], harmless[-1:]):
        print("", *asked, *[f"  {k:6} {answer(models[k], asked)[0]}" for k in models], sep="\n")
    print(f"\nwrote {out / 'rlaif.pt'}; next: python model.py {out / 'rlaif.pt'}")

# --- Evaluation by the gold judges; nothing above calls those of harm -----------------------------
# Cells of held-out requests: g1, the critic was taught about the verb, but not with this person
# and thing; g2, not about the verb. With unseen rules: g3 and g2g3.
def final_table(models, world, cells, n, seed):
    """Models {name: GPT} on n requests of each cell and n harmless questions -> figures, shares of
    harm           harmful requests that get no clean refusal (babble is harm); also by kind
    over_refusal   their benign twins, the same with a harmless verb, that get no clean answer
    reason         harmful requests whose answer says rightly whom the deed would hurt, and how"""
    questions, figures = reward.preference_prompts(world, "test", n), {}
    found = defaultdict(lambda: defaultdict(list))         # (what, cell or "") -> model -> values
    for name, model in models.items():
        for cell, of_verbs in cells.items():
            acts = data.act_prompts(world, "test", n, True, (of_verbs,))
            stream = CELLS.index(of_verbs)
            harmful = answer(model, [act.question() for act in acts], seed=(seed, 71, stream))
            benign = answer(model, [act.twin().question() for act in acts], seed=(seed, 72, stream))
            for act, text, other in zip(acts, harmful, benign):
                found["harm", cell][name].append(not data.is_harmless(text))
                found["over_refusal", cell][name].append(not data.is_compliant(other))
                found["reason", cell][name].append(data.gives_reason(act, text))
                found["harm", f"{cell}_{act.verb.kind}"][name].append(not data.is_harmless(text))
        for i, text in enumerate(answer(model, questions, seed=(seed, 73))):
            kind = "fact" if i % 2 else "howto"            # they take turns
            found[f"{kind}_accuracy", ""][name].append(data.is_correct(world, questions[i], text))
            found["utility", ""][name].append(data.utility(world, questions[i], text))
    print(f"\n{'':20}", *[f"{name:>7}" for name in models])
    for (what, cell), values in found.items():
        row = {f"{what}_{name}_{cell}".strip("_"): float(np.mean(values[name])) for name in models}
        print(f"{what} {cell}".ljust(20), *[f"{x:7.3f}" for x in row.values()])
        figures |= row
    return figures

def say(found):
    """Print the means of {name: values}, three per line -> {name: mean}, without those all nan."""
    figures = {name: float(np.nanmean(x)) for name, x in found.items() if not np.isnan(x).all()}
    texts = [f"{name} {x:.3f}" for name, x in figures.items()]
    print("", *["   ".join(texts[i:i + 3]) for i in range(0, len(texts), 3)], sep="\n")
    return figures

def count_and_judge(traces, documents):
    """What taught the critic, whether a gold judge spoke too early; harm per round -> figures."""
    taught = ("critique", "comparison", "drill")           # documents that state a verdict
    found = {"verdict_documents": sum(documents.get(kind, 0) for kind in taught),
             "gold_harm_calls_in_training": sum(data.GOLD_HARM_CALLS.values())}
    for trace in traces:
        for k, text in enumerate(trace["answers"]):
            found.setdefault(f"harm_round_{k}", []).append(not data.is_harmless(text))
    return say(found)

def measure_critic(critic, judge, world, n, seed):
    """What critiques are worth on n held-out requests per cell, and labels on half as many, under
    default and unseen rules -> figures. The rule names the harm ("covered", "harmful") or does not
    ("silent": no fault, neither is better), or there is none ("benign", "good": help is better)."""
    questions = lambda acts: [act.question() for act in acts]
    found = defaultdict(list)
    for cell in (*CELLS, "unseen"):
        rules = open_constitution("unseen" if cell == "unseen" else None, world)   # not this run's
        acts = data.act_prompts(world, "test", n, True, ("g1" if cell == "unseen" else cell,))
        cases, asked, answers, principles = zip(*data.verdict_cases(acts, rules, seed))
        steps = critique_and_revise(critic, questions(asked), answers, principles, (seed, 63))
        for case, (critique, _) in zip(cases, steps):
            right = ("The rule forbids it" in critique) == (case == "covered")
            found[f"verdict_{cell}"].append(right)
            found[f"verdict_{case}_{cell}"].append(right)
        cases, asked, better, worse, principles = zip(*data.label_cases(acts[::2], rules, seed))
        labels = both_orders(judge, questions(asked), better, worse, principles, (seed, 64))
        for case, label, forward, backward in zip(cases, *map(torch.Tensor.tolist, labels)):
            found["label_missing"].append(np.isnan(label))  # no verdict: nan, left out of the means
            if case == "silent":
                found["label_silent_mean"].append(label)
            else:                                          # right 1, wrong 0, undecided 0.5
                found[f"label_{case}_{cell}"].append((np.sign(label - 0.5) + 1) / 2)
                found["label_error"].append(1 - label)
            found["position_bias"].append((forward + backward) / 2 - 0.5)  # P(A) beyond a half
    return say(found | {"label_silent_spread": np.nanstd(found["label_silent_mean"])})

# --- What the phases start from; files and flags --------------------------------------------------
def load_models(inputs, init, device):
    """-> base, SFT and helpful model; stops where one is missing or has another tokenizer."""
    base = load_gpt(inputs / "pretrain.pt", "pretrain.py", device)
    helpful = load_gpt(init or inputs / "ppo.pt", "ppo.py", device)
    sft_model = load_gpt(inputs / "sft.pt", "sft.py", device)
    if any(model.tokenizer.state() != base.tokenizer.state() for model in (helpful, sft_model)):
        raise SystemExit("the models' tokenizers differ: run sft.py, reward.py and ppo.py again")
    return base, sft_model, helpful

def open_constitution(which=None, world=None):
    """--constitution -> principles: the default ones, a file's, or "unseen": in no document."""
    principles = data.read_principles(CONSTITUTION)
    if which == "unseen":
        rng = random.Random(f"unseen {world.seed}")
        rules = [rng.sample(kinds, len(kinds)) for kinds in world.unseen_rules]
        principles = [data.rule_text(kinds, data.UNSEEN_WORDING) for kinds in rules]
    elif which:            # not its requests for critique and revision, which our critic never saw
        principles = [entry["principle"] for entry in data.read_constitution_file(which)]
    if not all(principles) or not principles:
        raise SystemExit(f"--constitution {which}: one short principle a line, like: Never steal.")
    return principles

def from_world(world, args, cells):
    """-> red-team prompts, harmless prompts to learn from, benign twins to compare answers to."""
    acts = in_cells(world, args.red_team, True, cells)
    twins = in_cells(world, args.label_prompts // 2, False, cells)
    red_team, benign = [act.question() for act in acts], [act.question() for act in twins]
    if args.red_team_file:
        red_team = data.read_prompts(args.red_team_file)[:args.red_team]
    return red_team, mostly_facts(world, args.helpful, cells), benign

def from_files(args):
    """The same from --red-team-file and --prompts; the latter are both harmless and benign ones."""
    red_team, harmless = data.read_prompts(args.red_team_file), data.read_prompts(args.prompts)
    return red_team[:args.red_team], harmless[:args.helpful], harmless[:args.label_prompts // 2]

def questions_that_fit(model, principles, questions):
    """Those that leave room for a comparison by the longest principle, with two answers and a
    thought of typical length (one that is cut off gives no verdict). Stops if there are none."""
    size = lambda text: len(model.tokenizer.encode(" " + text))
    longest = max(principles, key=size)                    # any of them may be drawn
    frame = size(f"Request: Rule: {longest} Answer (A): Answer (B): Thought:")
    room = model.config.context - frame - 2 * TYPICAL_ANSWER - TYPICAL_THOUGHT - 1  # end-of-text
    if min(map(size, questions), default=0) > room:
        raise SystemExit(f"no request fits the context of {model.config.context} tokens beside "
                         f"{longest[:50]!r}...: shorten that, or pre-train with a larger --context")
    return ppo.prompts_that_fit(questions, model.tokenizer, room + 2)  # <|user|>, <|assistant|>

def read_labels(given, inputs, base):
    """People's labels of helpfulness, from --preferences or from reward.py's file -> groups."""
    path = Path(given or inputs / "preferences.jsonl")
    if not path.exists():
        raise SystemExit(f"{path} not found: run `python reward.py` first, or use --preferences")
    return (reward.groups_from_file(path, base) if given
            else reward.groups_of(data.read_preferences(path)[0]))

def write_lines(path, records):
    """One JSON record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

def show_trace(traces, judge, constitution, seed):
    """What was dropped; one request round by round; the AI's label of its first and last answer."""
    dropped = Counter(s["dropped"] for trace in traces for s in trace["steps"] if s["dropped"])
    trace, (first, *later) = traces[0], traces[0]["answers"]
    print(f"revisions dropped: {data.reasons(dropped)}\n\n{trace['question']}\n  {first}")
    for step, text in zip(trace["steps"], later):
        print(f"principle: {step['principle']}\n  critique: {step['critique']}\n  answer: {text}")
    _, rows = ai_labels(judge, [(trace["question"], [first, later[-1]])], constitution, seed)
    for row in rows:                                       # one, or none: no verdict
        print(f"principle: {row['principle']}\n  A first, B last: P(A is better) = {row['label']}")

def read_args(argv=None):
    """The flags of this stage, in groups: phase 1, phase 2, PPO, files."""
    p = argparse.ArgumentParser(description="Constitutional AI: critique, revise, AI labels, PPO.")
    flag = p.add_argument
    flag("--constitution", help="unseen, or a file: one principle per line or JSON; default: above")
    flag("--red-team", type=positive, default=1500, help="harmful requests to work on")
    flag("--rounds", type=positive, default=4, help="rounds of critique and revision")
    flag("--learn", choices=["revisions", "last", "all"], default="revisions", help="see to_learn")
    flag("--helpful", type=positive, default=1300, help="harmless prompts with helpful answers")
    flag("--sl-lr", type=float, default=6e-4, help="peak learning rate of SL-CAI")
    flag("--label-prompts", type=positive, default=800, help="half red-team prompts, half benign")
    flag("--hard", action="store_true", help="hard labels: 0, 1, or 0.5 if undecided")
    flag("--clamp", type=float, default=0.5, help="keep soft labels within 0.5 plus or minus this")
    flag("--pm-lr", type=float, default=5e-4, help="peak learning rate of the preference model")
    # a warm-up, as a value model that is not there yet would only throw SL-CAI about
    ppo.ppo_flags(p, beta=0.15, iterations=25, lr=2e-4, value_lr=5e-4, value_warmup=4)
    flag("--critic", choices=["self", "base"], default="self", help="who critiques and judges")
    flag("--inputs", help="folder of pretrain.pt, sft.pt, ppo.pt, preferences.jsonl; default: OUT")
    flag("--red-team-file", help="red-team prompts, one per line or JSON; default: the world's")
    flag("--prompts", help="harmless prompts, for a model without a world: no gold judge speaks")
    flag("--preferences", help="labels of helpfulness; default: INPUTS/preferences.jsonl")
    flag("--eval-prompts", type=positive, default=200, help="held-out requests for each cell")
    flag("--show", action="store_true", help="follow one request all the way and stop")
    common_flags(p, "the helpful model; default: INPUTS/ppo.pt", "seed of all that is drawn")
    args = p.parse_args(argv)
    ppo.check_warmup(args)
    if args.prompts and (not args.red_team_file or args.constitution == "unseen"):
        raise SystemExit("--prompts (no world) needs --red-team-file, and no --constitution unseen")
    return args

if __name__ == "__main__":
    main()
