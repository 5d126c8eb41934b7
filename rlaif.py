"""Stage 5. Constitutional AI: an AI's critique against a written constitution replaces human labels for harm (Bai et al. 2022b).

    1. SL-CAI   the helpful model answers red-team prompts;  critique -> revision, a principle drawn each round;
                the pre-trained model is fine-tuned on what comes out, together with helpful answers to harmless prompts
    2. RL-CAI   SL-CAI answers each prompt several times, the helpful model once;  the AI says which of two answers a principle prefers:
                    label = P("A") / (P("A") + P("B")),  averaged over both orders of the options
                a preference model learns from these labels and from human labels of helpfulness; PPO does the rest

It is RLHF with the H, human, replaced by an AI, and the code shows it: sft.train, reward.train and ppo.train are called as they are, and
`feedback_phase` is the same for an AI's labels of harm and for people's.

    python rlaif.py                          reads out/pretrain.pt, out/sft.pt, out/ppo.pt and out/preferences.jsonl; writes out/slcai.pt,
                                             out/rlaif_pm.pt, out/rlaif.pt, and as a record out/rlaif_traces.jsonl and out/rlaif_labels.jsonl
    python rlaif.py --show                   one request followed from the first answer to the last revision, and its AI label; no training
    python rlaif.py --human-harm             the comparison of the paper: people label harm, and like any refusal; writes out/human_harm*
    python rlaif.py --constitution unseen --inputs out --out out/unseen      rules that no document shows (or: a file of your own)

Who does what: the helpful model (ppo.pt) answers red-team prompts; the base model (pretrain.pt) critiques, revises and judges, a skill
it has from pre-training documents about other cases. The gold judges of harm only look on, when all training is over; the gold
utility plays the human annotator of helpfulness, as in reward.py.

Watch: each round about halves the harm, since a principle covers about half the kinds of harm. The final model refuses,
says whom the deed would hurt and how, offers something better, and still answers harmless questions.
"""
import argparse
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import data
import ppo
import reward
import sft
from model import MAX_NEW, ScalarModel, answer, copy_of, generate, load, load_gpt, pick_device, positive, save, write_results

# The constitution. A principle is drawn at random for every critique and for every comparison.
CONSTITUTION = """
Do not steal, break or hurt.                 Never scare, lie, mock or poison.
It is wrong to steal, scare or lie.          Good answers do not break, hurt, mock or poison.
Never steal, mock or poison.                 Do not break, hurt, scare or lie.
Good answers do not steal, break or scare.   It is wrong to hurt, lie, mock or poison.
Do not steal, hurt or mock.                  Never break, scare, lie or poison.
It is wrong to steal, lie or poison.         Good answers do not break, hurt, scare or mock.
Never steal, break or lie.                   Do not hurt, scare, mock or poison.
Good answers do not steal, hurt or poison.   It is wrong to break, scare, lie or mock.
"""


def open_constitution(which=None, world=None):
    """--constitution -> list of principles: the default one; "unseen", the world's unseen rules in a wording that no document uses; or a file's.
    Of a file that has critique and revision requests, the critique requests: the base model was never taught to read requests, but has read rules."""
    if which == "unseen":
        rng = random.Random(f"unseen {world.seed}")
        return [data.rule_text(rng.sample(kinds, len(kinds)), data.UNSEEN_WORDING) for kinds in world.unseen_rules]
    principles = [c["principle"] for c in data.read_constitution_file(which)] if which else data.read_principles(CONSTITUTION)
    if not all(principles) or not principles:
        raise SystemExit(f"--constitution: {which} should hold one short principle a line, such as: Do not steal, break or hurt.")
    return principles


def questions_that_fit(tokenizer, context, principles, questions):
    """The questions that leave room in a comparison for the longest principle, two answers and a thought of the usual length (48 and 40 tokens);
    stops if none does. A thought for which there is less room is cut short, and its label is 0.5."""
    longest = max(principles, key=lambda r: len(tokenizer.encode(" " + r)))
    room = context - 2 * 48 - 40 - 1 - len(tokenizer.encode(f" Request: Rule: {longest} Answer (A): Answer (B): Thought:"))      # 1: end-of-text
    fit = [q for q in questions if len(tokenizer.encode(" " + q)) <= room]
    if not fit:
        raise SystemExit(f"no request fits the context of {context} tokens beside two answers and the principle {longest[:50]!r}... "
                         f"({len(tokenizer.encode(' ' + longest))} tokens): shorten it, or pre-train with a larger --context")
    if len(fit) < len(questions):
        print(f"{len(questions) - len(fit)} prompts skipped: longer than the {room} tokens that the context has left for them")
    return fit


# ------------------------------------------------------------------------------------------------------------------
# Phase 1: critique and revision

def critique_and_revise(critic, tokenizer, questions, answers, principles, seed, direct=False):
    """One round -> [(critique, revision)], sampled at temperature 1. The revision is None where no fault was found. `direct`: no critique.
    The paper asks twice, for a critique and for a revision; our critic has learnt one form of document and writes both in one go."""
    cases = [f"Request: {q} Answer: {a} Rule: {r}" for q, a, r in zip(questions, answers, principles)]
    prompts = [data.chat_prompt(tokenizer, c) if direct else [tokenizer.eot, *tokenizer.encode(f" {c} Critique:")] for c in cases]
    steps = []
    for ids in generate(critic, prompts, 96, tokenizer, seed=seed):
        critique, found, revision = data.decode_reply(tokenizer, ids).partition("Revision: ")
        steps.append((critique.strip(), (revision if ids[-1] == tokenizer.eot else "") if found else None))
    return steps


def reject_revision(revision, before):
    """Why a revision cannot be used, or None: unfiltered revisions are what made public replications collapse."""
    sentences = data.sentences_of(revision)
    if not sentences or revision[-1] not in ".?!":
        return "unfinished"
    if any(word in revision for word in ("Request:", "Answer:", "Rule:", "Critique:", "Revision:")):
        return "role words inside"
    if len(set(sentences)) < len(sentences):
        return "repeats itself"
    return "unchanged" if revision == before else None


def revise_rounds(helpful, critic, tokenizer, questions, constitution, rounds, seed, direct=False):
    """The helpful model answers, the critic revises round after round -> (traces, Counter of why revisions were dropped).
    A trace: {"question", "answers": [rounds + 1], "steps": [{"principle", "critique", "revision", "dropped"}]}."""
    answers, dropped = answer(helpful, tokenizer, questions, seed=(seed, 51)), Counter()
    traces = [{"question": q, "answers": [a], "steps": []} for q, a in zip(questions, answers)]
    for k in range(rounds):
        rng = random.Random(f"principles {seed} {k}")
        principles = [rng.choice(constitution) for _ in questions]
        steps = critique_and_revise(critic, tokenizer, questions, [t["answers"][-1] for t in traces], principles, (seed, 52, k), direct)
        for trace, principle, (critique, revision) in zip(traces, principles, steps):
            before = trace["answers"][-1]
            why = reject_revision(revision, before) if revision is not None else None
            dropped.update([why] if why else [])
            trace["steps"].append({"principle": principle, "critique": critique, "revision": revision, "dropped": why})
            trace["answers"].append(before if revision is None or why else revision)
    return traces, dropped


def to_learn(traces, which="revisions"):
    """What SL-CAI learns from the traces -> [(question, answer)]. "revisions": every one that the filter let pass, of whatever round (Bai et al.
    2022b, section 3.1); an answer that no round changed would teach compliance, for the helpful model complies with everything. "last": the
    answers after the last round, changed or not (for a constitution that means to allow something). "all": after every round, early harm included."""
    if which == "revisions":
        return [(t["question"], s["revision"]) for t in traces for s in t["steps"] if s["revision"] is not None and not s["dropped"]]
    return [(t["question"], a) for t in traces for a in t["answers"][1 if which == "all" else -1:]]


def mostly_facts(world, n):
    """n harmless prompts of training, three in four about facts. Facts keep the model's knowledge in use. A how-to answer also teaches
    that how-to requests get answered: the more of them beside the red-team prompts, the more often harmful verbs that are in no prompt get done."""
    mixed = reward.preference_prompts(world, "train", 2 * n)      # how-to, fact, how-to, fact ...
    return [mixed[2 * i + (i % 4 > 0)] for i in range(n)]


def supervised_phase(helpful, critic, base, tokenizer, world, red_team, harmless, constitution, args):
    """-> (traces, SL-CAI), which is the pre-trained model, fine-tuned on `to_learn` and on helpful answers to harmless prompts."""
    traces_path, path = Path(args.out, "rlaif_traces.jsonl"), Path(args.out, "slcai.pt")
    if args.resume and traces_path.exists():
        traces = [json.loads(line) for line in traces_path.read_text(encoding="utf-8").splitlines()]
    else:
        traces, dropped = revise_rounds(helpful, critic, tokenizer, red_team, constitution, args.rounds, args.seed, args.no_critique)
        print("revisions dropped:", data.reasons(dropped))
        write_lines(traces_path, traces)
    show_trace(traces[0])
    if args.resume and path.exists():
        return traces, load_gpt(path, device=base.tokens.weight.device)[0]
    slcai = copy_of(base)
    sft.train(slcai, tokenizer, to_learn(traces, args.learn) + list(zip(harmless, answer(helpful, tokenizer, harmless, seed=(args.seed, 53)))),
              args.sl_epochs, 32, args.sl_lr, args.seed, desc="SL-CAI")
    keep(path, slcai, tokenizer, world)
    return traces, slcai


def show_trace(trace):
    """One red-team prompt, followed through its rounds."""
    print(f"\n{trace['question']}\n  first answer: {trace['answers'][0]}")
    for k, (step, after) in enumerate(zip(trace["steps"], trace["answers"][1:]), 1):
        print(f"  round {k}, principle: {step['principle']}\n    critique: {step['critique']}\n    answer:   {after}")


# ------------------------------------------------------------------------------------------------------------------
# Phase 2: feedback by an AI (or, for comparison, by people), preference model, PPO

@torch.no_grad()
def prefer_first(judge, tokenizer, questions, firsts, seconds, principles, seed, batch_size=128):
    """P(the judge answers A) with the first answer as option (A), after a written thought -> (N,). 0.5 where no verdict came."""
    prompts = [[tokenizer.eot, *tokenizer.encode(f" Request: {q} Rule: {r} Answer (A): {a} Answer (B): {b} Thought:")]
               for q, r, a, b in zip(questions, principles, firsts, seconds)]
    bracket = tokenizer.encode(" (")[-1]
    letters = torch.tensor([tokenizer.encode("(" + letter)[-1] for letter in "AB"])
    thoughts = generate(judge, prompts, 64, tokenizer, seed=seed, stop=[bracket])
    probabilities = []
    for i in range(0, len(prompts), batch_size):
        rows = [p + t for p, t in zip(prompts[i:i + batch_size], thoughts[i:i + batch_size])]
        tokens = data.pad_rows(rows, tokenizer.pad, left=True).to(judge.tokens.weight.device)
        last = judge.head(judge.hidden(tokens, (tokens != tokenizer.pad).long())[:, -1])
        probabilities.append(last[:, letters.to(last.device)].softmax(-1)[:, 0].cpu())
    verdict = torch.tensor([t[-1] == bracket for t in thoughts])
    return torch.where(verdict, torch.cat(probabilities), 0.5)


def both_orders(judge, tokenizer, questions, firsts, seconds, principles, seed):
    """-> (P(first answer wins), averaged over both orders of the options; P(option A wins) in this order; in the other), each (N,)"""
    forward = prefer_first(judge, tokenizer, questions, firsts, seconds, principles, (*seed, 61))
    backward = prefer_first(judge, tokenizer, questions, seconds, firsts, principles, (*seed, 62))
    return (forward + 1 - backward) / 2, forward, backward


def ai_labels(judge, tokenizer, answered, constitution, seed, hard=False, clamp=0.5):
    """A label for every pair of different answers, a principle drawn per pair -> groups for reward.train, and what was asked, for the record.
    Soft labels within 0.5 +- clamp (the paper: 0.1 after chain of thought), or `hard` ones, 0 or 1."""
    rng = random.Random(f"labels {seed}")
    pairs = [(g, i, j) for g, (_, answers) in enumerate(answered) for i, j in itertools.combinations(range(len(answers)), 2)]
    asked = [(*pair, rng.choice(constitution)) for pair in pairs]
    questions, principles = [answered[g][0] for g, *_ in asked], [r for *_, r in asked]
    firsts, seconds = [answered[g][1][i] for g, i, _, _ in asked], [answered[g][1][j] for g, _, j, _ in asked]
    labels, forward, backward = both_orders(judge, tokenizer, questions, firsts, seconds, principles, (seed,))
    labels = ((labels - 0.5).sign() + 1) / 2 if hard else labels.clamp(0.5 - clamp, 0.5 + clamp)
    groups = [(q, answers, []) for q, answers in answered]
    for (g, i, j, _), label in zip(asked, labels.tolist()):
        groups[g][2].append((i, j, label))
    record = [{"prompt": q, "principle": r, "a": a, "b": b, "label": round(x, 4), "a_first": round(f, 4), "b_first": round(1 - w, 4)}
              for q, r, a, b, x, f, w in zip(questions, principles, firsts, seconds, labels.tolist(), forward.tolist(), backward.tolist())]
    return groups, record


def human_harm_labels(world, answered, seed):
    """For --human-harm alone: people choose between every two answers by data.prefers_refusal -> groups, and what was asked, for the record."""
    rng, groups = random.Random(f"harm annotator {seed}"), []
    for q, answers in answered:
        pairs = itertools.combinations(range(len(answers)), 2)
        groups.append((q, answers, [(i, j, float(rng.random() < data.prefers_refusal(world, q, answers[i], answers[j]))) for i, j in pairs]))
    return groups, [{"prompt": q, "a": answers[i], "b": answers[j], "label": label} for q, answers, pairs in groups for i, j, label in pairs]


def with_forced_refusal(model, tokenizer, answered, seed):
    """Add to each question's answers one that was made to open with a refusal, so that annotators can vote needless refusals down:
    without such pairs the preference model seldom sees a refusal lose, and the policy ends up refusing everything. (Not in the paper.)"""
    opening = tokenizer.encode(" " + data.REFUSAL)
    replies = generate(model, [data.chat_prompt(tokenizer, q) + opening for q, _ in answered], 40, tokenizer, seed=seed)
    refusals = [data.decode_reply(tokenizer, opening + r) for r in replies]
    return with_another(answered, refusals)


def with_another(answered, others):
    """Add to each question's answers another one, unless it is among them."""
    return [(q, answers if other in answers else [*answers, other]) for (q, answers), other in zip(answered, others)]


def feedback_phase(name, start, helpful, tokenizer, world, prompts, label_harm, red_team, harmless, rlhf_groups, args):
    """Labels of harm by label_harm(world, answered, seed); labels of helpfulness by people; one preference model; PPO from `start`.
    -> (policy, how many labels, history). Writes OUT/name_labels.jsonl, name_pm.pt and name.pt."""
    pm_path, path, device = Path(args.out, f"{name}_pm.pt"), Path(args.out, f"{name}.pt"), start.tokens.weight.device
    if args.resume and pm_path.exists():
        pm, scale, _ = reward.load_reward(pm_path, tokenizer, device)
        counts = load(pm_path)["counts"]
    else:
        # SL-CAI may refuse so reliably that all its answers are alike; one of the helpful model's shows what they are to be compared with. Without
        # it no compliance ever loses to a refusal, while needless refusals lose below, and PPO unlearns refusing.
        # (In the paper, whose SL-CAI still slips, all answers are its own.)
        answered = reward.sample_answers(start, tokenizer, prompts, args.answers, (args.seed, 54), args.hot, fewest=1)
        answered = with_another(answered, answer(helpful, tokenizer, prompts, seed=(args.seed, 59)))
        answered = [(q, answers) for q, answers in answered if len(answers) > 1]
        if not answered:
            raise SystemExit("the models gave one answer only to every prompt, so there is nothing to compare: raise --label-prompts or --answers")
        harm_groups, record = label_harm(world, answered, args.seed)
        write_lines(Path(args.out, f"{name}_labels.jsonl"), record)
        help_groups = []
        if world:                                                 # without, only the file's labels can vote needless refusals down
            questions = reward.preference_prompts(world, "train", args.helpful_prompts)
            answered = reward.sample_answers(start, tokenizer, questions, args.answers, (args.seed, 55), fewest=1)
            help_groups = reward.annotate(world, with_forced_refusal(start, tokenizer, answered, (args.seed, 56)), args.seed + 1)
        # Old labels of helpfulness, four for each label of harm, beside the new ones: they know wrong facts and wrong verbs, which SL-CAI's own
        # answers seldom show. (The paper has 43 helpful to 57 harm; its labels of helpfulness are not about such details.)
        totals = np.cumsum([len(pairs) for _, _, pairs in rlhf_groups])
        rlhf_groups = rlhf_groups[:int(np.searchsorted(totals, 4 * len(record))) + 1]
        counts = {"human_harm_labels" if name == "human_harm" else "ai_labels": len(record), "human_help_labels": sum(len(g[2]) for g in help_groups),
                  "human_help_labels_rlhf": sum(len(g[2]) for g in rlhf_groups)}
        groups = harm_groups + help_groups + rlhf_groups
        random.Random(f"mix {args.seed}").shuffle(groups)
        torch.manual_seed(args.seed)                              # the new head is a function of the seed, whatever ran before
        pm = ScalarModel(copy_of(start)).to(device)
        reward.train(pm, tokenizer, groups, 16, args.pm_lr, args.seed, desc="preference model")
        # std=1: the scores stay log-odds, as the labels made them. Answers were only ever compared with answers to the same prompt, so nothing fixes
        # where the scores of red-team prompts lie beside those of harmless ones; a standard deviation over both would measure that distance.
        half = red_team[:250] + harmless[:250]
        scale = reward.normalise(pm, tokenizer, list(zip(half, answer(start, tokenizer, half, seed=(args.seed, 57)))), std=1.0)
        keep(pm_path, pm, tokenizer, world, scale=scale, counts=counts)
    if args.resume and path.exists():
        return load_gpt(path, device=device)[0], counts, None

    def questions_at(step):                                       # half red-team, half harmless
        rng = random.Random(f"prompts {args.seed} {step}")
        return [rng.choice(red_team if i % 2 else harmless) for i in range(args.batch_size)]

    policy, value = copy_of(start), ppo.value_from(pm, scale)     # the reference is `start` itself
    scorer = ppo.reward_model_scorer(pm, scale, tokenizer)
    history = ppo.train(policy, start, value, tokenizer, questions_at, scorer, args, scale["lowest"] - 1, desc=name)
    keep(path, policy, tokenizer, world)
    return policy, counts, history


# ------------------------------------------------------------------------------------------------------------------
# Evaluation by the gold judges; those of harm are called by nothing above

def mean_by(keys, values):
    """{key: mean of its values}"""
    return {k: float(np.mean([v for key, v in zip(keys, values) if key == k])) for k in dict.fromkeys(keys)}


def over_verbs(values, verbs):
    """Mean of the values and its 95% interval, bootstrapped over verbs: prompts of one verb succeed or fail together."""
    names, which = np.unique(verbs, return_inverse=True)
    sums, counts = np.bincount(which, np.array(values, float)), np.bincount(which)
    drawn = np.random.default_rng(0).integers(0, len(names), (1000, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return float(np.mean(values)), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def predicted_harm(h, q, k):
    """Harm left after k rounds, (1 - h q)^k: h the chance that a drawn principle covers the fault, q the chance that a covered fault is mended.
    Arrays, with an entry for each prompt, make a mixture: the mean over them."""
    return float(np.mean((1 - np.asarray(h) * np.asarray(q)) ** k))


def measure_rounds(traces, world, constitution):
    """Harm after each round; then that of the first half of the prompts beside what round 1 of the *other* half predicts. -> figures"""
    harmful = np.array([[not data.is_harmless(a) for a in t["answers"]] for t in traces])        # (prompts, rounds + 1)
    figures, half = {f"harm_round_{k}": float(x) for k, x in enumerate(harmful.mean(0))}, len(traces) // 2
    print("\nharm of the answers after each round:", "  ".join(f"{x:.3f}" for x in figures.values()))
    verbs = [getattr(world.parse_question(t["question"]), "verb", None) for t in traces]
    if None in verbs:                                             # prompts of one's own: nobody knows their kind of harm
        return figures
    other = [i for i, t in enumerate(traces) if i >= half and harmful[i, 0] and t["steps"] and data.covers(t["steps"][0]["principle"], verbs[i].kind)]
    here = [i for i in range(half) if harmful[i, 0]]
    if not other or not here:                                     # a constitution that names no kind of harm
        return figures
    mended, h_of = [not harmful[i, 1] for i in other], {kind: np.mean([data.covers(r, kind) for r in constitution]) for kind in data.HARMS}
    q_of, q = mean_by([verbs[i] for i in other], mended), float(np.mean(mended))
    hs, qs, said = [h_of[verbs[i].kind] for i in here], [q_of.get(verbs[i], q) for i in here], []
    for k in range(1, harmful.shape[1]):
        row = {"measured": float(harmful[here, k].mean()), "predicted": predicted_harm(np.mean(hs), q, k), "mixture": predicted_harm(hs, qs, k)}
        figures |= {f"harm_{name}_{k}": x for name, x in row.items()}
        said.append(" / ".join(f"{x:.3f}" for x in row.values()))
    print(f"measured / (1 - hq)^k / with a q for each verb; h = {np.mean(hs):.3f}, q = {q:.3f} of other prompts:  " + "   ".join(said))
    return figures | {"h": float(np.mean(hs)), "q": q}


def measure_critic(critic, judge, tokenizer, world, n, seed, direct):
    """What critiques and labels are worth on held-out requests: G1 and G2 under the default constitution, G1 under unseen rules. What is right
    is said at data.verdict_cases and data.label_cases. -> figures"""
    figures, labelled = {}, []
    for cell, g2, which in (("g1", False, None), ("g2", True, None), ("unseen", False, "unseen")):
        acts, rules = data.act_prompts(world, "test", n, harmful=True, g2=g2), open_constitution(which, world)
        cases, acts_asked, answers, principles = zip(*data.verdict_cases(acts, rules, seed))
        steps = critique_and_revise(critic, tokenizer, [a.question() for a in acts_asked], answers, principles, (seed, 63), direct)
        forbids = [revision is not None if direct else "The rule forbids it" in critique for critique, revision in steps]
        verdicts = mean_by(cases, [f == (case == "covered") for f, case in zip(forbids, cases)])

        cases, acts_asked, better, worse, principles = zip(*data.label_cases(acts[::2], rules, seed))       # two or three pairs each
        labels, forward, backward = both_orders(judge, tokenizer, [a.question() for a in acts_asked], better, worse, principles, (seed, 64))
        labelled += zip(cases, labels.tolist(), ((forward + backward) / 2).tolist())
        right = mean_by(cases, (0.5 + 0.5 * (labels - 0.5).sign()).tolist())

        figures |= {f"verdict_{cell}": float(np.mean(list(verdicts.values())))} | {f"verdict_{case}_{cell}": x for case, x in verdicts.items()}
        figures |= {f"label_{case}_{cell}": right[case] for case in ("harmful", "good")}
        print(f"{cell:6} critique verdicts right {figures[f'verdict_{cell}']:.3f} ({', '.join(f'{case} {x:.3f}' for case, x in verdicts.items())})   "
              f"AI labels right: harmful requests {right['harmful']:.3f}, good ones {right['good']:.3f}")
    silent, decided = ([label for case, label, _ in labelled if (case == "silent") == wanted] for wanted in (True, False))
    figures |= {"label_silent_mean": float(np.mean(silent)), "label_silent_spread": float(np.std(silent)), "label_error": 1 - float(np.mean(decided)),
                "position_bias": float(np.mean([first for *_, first in labelled])) - 0.5}
    print(f"AI labels: mean error {figures['label_error']:.3f}   option A is favoured by {figures['position_bias']:+.3f}   "
          f"where the principle is silent on a harm {figures['label_silent_mean']:.2f} +- {figures['label_silent_spread']:.2f}")
    return figures


def ask(model, tokenizer, questions, seed, base=False):
    """One sample at temperature 1 for each question; a base model gets the bare text, which is all it knows."""
    if not base:
        return answer(model, tokenizer, questions, seed=seed)
    prompts = [[tokenizer.eot, *tokenizer.encode(" " + q)] for q in questions]
    return [data.decode_reply(tokenizer, r) for r in generate(model, prompts, 24, tokenizer, seed=seed)]


def evaluate_model(model, tokenizer, world, name, cells, n, seed):
    """Gold figures of one model -> (dict, its answers to harmless questions, the worst verb of each cell). `cells`: {name: verbs of G2?}"""
    figures, worst, unparseable = {}, [], []
    for cell, g2 in cells.items():
        acts = data.act_prompts(world, "test", n, harmful=True, g2=g2)
        harmful = ask(model, tokenizer, [a.question() for a in acts], (seed, 71, g2), name == "base")
        benign = ask(model, tokenizer, [a.twin().question() for a in acts], (seed, 72, g2), name == "base")
        harm, verbs = [not data.is_harmless(r) for r in harmful], [a.verb.word for a in acts]
        reasoned = [any(data.classify(s) == "reason" for s in data.sentences_of(r)) for r in harmful]
        shares = {"harm": harm, "over_refusal": [not data.is_compliant(r) for r in benign],
                  "reason": [data.gives_reason(a, r) for a, r in zip(acts, harmful)],
                  "generic": [not h and not why for h, why in zip(harm, reasoned)]}
        for what, values in shares.items():
            figures |= zip((f"{what}_{name}_{cell}", f"{what}_{name}_{cell}_low", f"{what}_{name}_{cell}_high"), over_verbs(values, verbs))
        figures |= {f"harm_{name}_{cell}_{kind}": x for kind, x in mean_by([a.verb.kind for a in acts], harm).items()}
        worst.append(max((x, verb) for verb, x in mean_by(verbs, harm).items()))
        unparseable += [not data.is_parseable(r) for r in harmful + benign]
    questions = reward.preference_prompts(world, "test", n)
    helpful = ask(model, tokenizer, questions, (seed, 73), name == "base")
    right = [data.is_correct(world, q, r) for q, r in zip(questions, helpful)]
    figures |= {f"howto_accuracy_{name}": float(np.mean(right[::2])), f"fact_accuracy_{name}": float(np.mean(right[1::2])),
                f"unparseable_{name}": float(np.mean(unparseable))}
    return figures, helpful, worst


def final_table(models, tokenizer, world, cells, n, seed):
    """Every model on the same held-out prompts: how harmless, how helpful, then some answers side by side. -> figures"""
    figures, helpful, columns = {}, {}, [f"{what} {cell}" for what in ("harm", "over-refusal", "reason") for cell in cells]
    print(f"\n{n} held-out prompts a cell, 95% intervals over verbs; harm is all that is not a clean refusal, babble too\n{'':10}"
          + "".join(c.rjust(19) for c in columns) + "".join(f"generic {cell}".rjust(13) for cell in cells))
    for name, model in models.items():
        new, helpful[name], worst = evaluate_model(model, tokenizer, world, name, cells, n, seed)
        figures |= new
        keys = [f"{what.replace('-', '_')}_{name}_{cell}" for what, cell in map(str.split, columns)]
        print(f"{name:10}" + "".join(f"{new[k]:.3f} [{new[k + '_low']:.2f} {new[k + '_high']:.2f}]".rjust(19) for k in keys)
              + "".join(f"{new[f'generic_{name}_{cell}']:13.3f}" for cell in cells))
    for cell, (x, verb) in zip(cells, worst):
        by_kind = "   ".join(f"{kind} {figures.get(f'harm_{name}_{cell}_{kind}', math.nan):.2f}" for kind in data.HARMS)
        print(f"{name} on {cell}: worst verb {verb} {x:.2f}; harm by kind: {by_kind}")
    print(f"\n{'':10}   facts  how-to  utility   win rate over SFT   unparseable")
    questions = reward.preference_prompts(world, "test", n)
    utilities = {name: [data.utility(world, q, a) for q, a in zip(questions, texts)] for name, texts in helpful.items()}
    for name in models:
        won = ppo.compare(utilities[name], utilities["sft"])
        figures |= {f"{k}_{name}": float(x) for k, x in won.items()} | {f"utility_{name}": float(np.mean(utilities[name]))}
        print(f"{name:10}{figures[f'fact_accuracy_{name}']:8.3f}{figures[f'howto_accuracy_{name}']:8.3f}{figures[f'utility_{name}']:9.2f}"
              f"{won['win_rate']:8.3f} [{won['win_rate_low']:.2f} {won['win_rate_high']:.2f}]{figures[f'unparseable_{name}']:14.3f}")
    g1, g2 = (data.act_prompts(world, "test", 4, harmful=True, g2=g2) for g2 in (False, True))
    for question in (data.fact_questions(world, "test")[0], g1[0].question(), g1[0].twin().question(), g2[3].question()):
        print(f"\n{question}")
        for name, model in models.items():
            print(f"  {name:10}{ask(model, tokenizer, [question], (seed, 74), name == 'base')[0]}")
    return figures


# ------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description="Constitutional AI: critique, revise, AI labels, preference model, PPO.")
    # supervised phase
    p.add_argument("--constitution", help="unseen (rules that no document shows), or a file: one principle a line, or JSON; "
                   "default: CONSTITUTION in this file")
    p.add_argument("--red-team-file", help="your own red-team prompts, one a line or JSON (data.read_prompts); default: the world's")
    p.add_argument("--prompts", help="your own harmless prompts, likewise, for a model without a world: nothing is then judged at the end")
    p.add_argument("--preferences", help="human labels of helpfulness, a file as for reward.py --data; default: INPUTS/preferences.jsonl "
                   "(new labels are the polite annotator's)")
    p.add_argument("--red-team", type=positive, default=1500, help="red-team prompts to answer, critique and revise")
    p.add_argument("--rounds", type=int, default=4, help="rounds of critique and revision")
    p.add_argument("--no-critique", action="store_true", help="revise directly, by a copy of the base model that is shown how")
    p.add_argument("--learn", choices=["revisions", "last", "all"], default="revisions",
                   help="fine-tune on the revisions; or on the answers after the last round, or after all, revised or not")
    p.add_argument("--helpful", type=positive, default=1300, help="harmless prompts whose helpful answers are mixed in, three in four about facts")
    p.add_argument("--sl-epochs", type=positive, default=5, help="times each conversation is read")
    p.add_argument("--sl-lr", type=float, default=6e-4, help="peak learning rate of SL-CAI")
    # AI feedback phase
    p.add_argument("--label-prompts", type=positive, default=700, help="prompts whose answers the AI compares: half red-team, half benign")
    p.add_argument("--answers", type=positive, default=6, help="answers sampled for each of them")
    p.add_argument("--hot", type=float, default=1.4, help="temperature of every other one of them, so that they differ")
    p.add_argument("--hard", action="store_true", help="hard labels: 0 or 1 instead of the AI's probability")
    p.add_argument("--clamp", type=float, default=0.5, help="keep soft labels within 0.5 plus or minus this")
    p.add_argument("--helpful-prompts", type=positive, default=500, help="harmless prompts for human helpfulness labels on SL-CAI's answers")
    p.add_argument("--pm-lr", type=float, default=5e-4, help="peak learning rate of the preference model")
    p.add_argument("--human-harm", action="store_true", help="no Constitutional AI: RLHF with human labels of harm, for comparison")
    # PPO, as in ppo.py
    p.add_argument("--beta", type=float, default=0.15, help="reward lost per nat of KL from where PPO starts")
    p.add_argument("--iterations", type=positive, default=25, help="rollouts")
    p.add_argument("--batch-size", type=positive, default=128, help="answers a rollout, half of them to red-team prompts")
    p.add_argument("--max-new", type=positive, default=MAX_NEW, help="longest answer of a rollout, in tokens")
    p.add_argument("--epochs", type=positive, default=4, help="passes over a rollout")
    p.add_argument("--minibatch", type=positive, default=64, help="answers an optimizer step")
    p.add_argument("--clip", type=float, default=0.2, help="how far the ratio, and the value, may move in one update")
    p.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of the policy")
    p.add_argument("--value-lr", type=float, default=5e-4, help="peak learning rate of the value model")
    p.add_argument("--value-warmup", type=int, default=4, help="iterations in which the value model alone learns: SL-CAI is good already, and an "
                   "untrained value model would only throw it about")
    # where things go
    p.add_argument("--init", help="the helpful model; default: INPUTS/ppo.pt")
    p.add_argument("--inputs", help="folder of pretrain.pt (critic, judge and start of SL-CAI), sft.pt, ppo.pt and preferences.jsonl; default: OUT")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of principles, samples and data order")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on after the last finished phase")
    p.add_argument("--eval", choices=["full"], help="full: --eval-prompts 500")
    p.add_argument("--eval-prompts", type=positive, default=200, help="held-out prompts for each cell of the final table")
    p.add_argument("--show", action="store_true", help="follow one request all the way and stop")
    args = p.parse_args(argv)
    ppo.check_warmup(args)
    device, name = pick_device(args.device), "human_harm" if args.human_harm else "rlaif"
    out, inputs = Path(args.out), Path(args.inputs or args.out)
    torch.manual_seed(args.seed)
    data.GOLD_HARM_CALLS.clear()
    base, tokenizer, checkpoint = load_gpt(inputs / "pretrain.pt", "pretrain.py", device)
    helpful, _, helpful_file = load_gpt(args.init or inputs / "ppo.pt", "ppo.py", device)
    sft_model, _, sft_file = load_gpt(inputs / "sft.pt", "sft.py", device)
    if not checkpoint["tokenizer"] == helpful_file["tokenizer"] == sft_file["tokenizer"]:
        raise SystemExit("these checkpoints come from different pre-trainings (their tokenizers differ): run sft.py, reward.py and ppo.py again")
    if args.prompts and (not args.red_team_file or args.no_critique or args.human_harm or args.constitution == "unseen"):
        raise SystemExit("--prompts, for a model without a world, needs --red-team-file; "
                         "--no-critique, --human-harm and --constitution unseen need a world")
    world = None if args.prompts else data.world_of(checkpoint)
    constitution = open_constitution(args.constitution, world)
    if not args.show:
        preferences = Path(args.preferences or inputs / "preferences.jsonl")
        if not preferences.exists():
            raise SystemExit(f"{preferences} not found: run `python reward.py` first, or name a file of your own with --preferences FILE")
        rlhf_groups = (reward.from_file(preferences, tokenizer, base.config.context) if args.preferences
                       else reward.groups_of(data.read_preferences(preferences)[0]))
    red_team = (data.read_prompts(args.red_team_file)[:args.red_team] if args.red_team_file
                else [a.question() for a in data.act_prompts(world, "train", args.red_team, harmful=True)])
    red_team = questions_that_fit(tokenizer, base.config.context, constitution, red_team)
    harmless = mostly_facts(world, args.helpful) if world else data.read_prompts(args.prompts)[:args.helpful]
    harmless = ppo.prompts_that_fit(harmless, tokenizer, base.config.context - args.max_new)
    half = args.label_prompts // 2
    twins = ([a.question() for a in data.act_prompts(world, "train", half, harmful=False)] if world
             else questions_that_fit(tokenizer, base.config.context, constitution, harmless)[:half])
    if not args.show:                                             # all inputs were read: only now an earlier run's files are cleared
        check_resume(name, args)
    print(f"{device}, {len(constitution)} principles, {len(red_team)} red-team prompts, {args.rounds} rounds")
    critic = base
    if args.no_critique:                                          # a form that the base model never saw: it would write the critique first
        critic = copy_of(base)
        sft.train(critic, tokenizer, data.direct_revisions(world, 3000), 1, 32, 3e-4, args.seed, desc="direct reviser")
    if args.show:
        (trace,), _ = revise_rounds(helpful, critic, tokenizer, red_team[:1], constitution, args.rounds, args.seed, args.no_critique)
        show_trace(trace)
        _, (r, *_) = ai_labels(base, tokenizer, [(red_team[0], [trace["answers"][0], trace["answers"][-1]])], constitution, args.seed)
        print(f"\nprinciple: {r['principle']}\n  (A) {r['a']}\n  (B) {r['b']}\n  P(A is better) = {r['label']:.2f}"
              f"  (asked as A: {r['a_first']:.2f}, asked as B: {r['b_first']:.2f})")
        return

    if args.human_harm:                                           # PPO can only make more of what the policy tries at times: a few bare refusals
        start, own = copy_of(helpful), harmless[:450]
        refusals, own = [(q, data.REFUSAL) for q in red_team[:50]], list(zip(own, answer(helpful, tokenizer, own, seed=(args.seed, 58))))
        sft.train(start, tokenizer, refusals + own, args.sl_epochs, 32, args.sl_lr, args.seed, desc="a few refusals")
        prompts, label_harm = red_team[:len(twins)], human_harm_labels
    else:
        traces, start = supervised_phase(helpful, critic, base, tokenizer, world, red_team, harmless, constitution, args)
        prompts = [q for pair in zip(itertools.cycle(red_team), twins) for q in pair]
        label_harm = lambda world, answered, seed: ai_labels(base, tokenizer, answered, constitution, seed, args.hard, args.clamp)
    policy, counts, history = feedback_phase(name, start, helpful, tokenizer, world, prompts, label_harm, red_team, harmless, rlhf_groups, args)

    if world is None:
        for question in (red_team[0], harmless[0]):
            print(f"\n{question}")
            for title, model in (("helpful", helpful), ("start", start), (name, policy)):
                print(f"  {title:10}{answer(model, tokenizer, [question])[0]}")
        write_results(out, name, history, counts)
        return print(f"\nwrote {out / name}.pt; next: python model.py {out / name}.pt")

    # All training is over: from here on the gold judges speak
    documents = checkpoint.get("documents") or {}
    figures = {"ai_labels": 0, "human_harm_labels": 0, **counts, "gold_harm_calls_in_training": sum(data.GOLD_HARM_CALLS.values()),
               "verdict_documents": sum(documents.get(kind, 0) for kind in ("critique", "comparison", "drill"))}
    print(f"\nhuman harm labels: {figures['human_harm_labels']}   AI labels: {figures['ai_labels']}   human helpfulness labels: "
          f"{figures['human_help_labels']} new, {figures['human_help_labels_rlhf']} from reward.py   gold judges of harm called in training: "
          f"{figures['gold_harm_calls_in_training']} times\nwhat taught the AI to judge: {figures['verdict_documents']} of {sum(documents.values())} "
          "pre-training documents state a verdict on other cases")
    n, cells = 500 if args.eval else args.eval_prompts, {"g1": False, "g2": True}
    if args.human_harm:
        beside = {"rlcai": load_gpt(f / "rlaif.pt", device=device)[0] for f in (inputs, out) if (f / "rlaif.pt").exists()}
        models = {"sft": sft_model, "rlhf": helpful, **beside, "humanharm": policy}
    else:
        models = {"base": base, "sft": sft_model, "rlhf": helpful, "slcai": start, "rlcai": policy}
        cells = {"g3": False, "g2g3": True} if args.constitution == "unseen" else cells
        figures |= measure_rounds(traces, world, constitution) | measure_critic(critic, base, tokenizer, world, n, args.seed, args.no_critique)
    figures |= final_table(models, tokenizer, world, cells, n, args.seed)
    write_results(out, name, history, figures)
    chat = f"python model.py {inputs / 'sft.pt'} {inputs / 'ppo.pt'} {out / name}.pt"
    print(f"\nwrote {out / name}.pt; next: {chat} --prompt \"{red_team[0]}\"")


def check_resume(name, args):
    """A new run forgets the phases of an earlier one; a resumed run must have its flags."""
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out", "show", "eval", "eval_prompts")}
    path = Path(args.out, f"{name}_settings.json")
    if args.resume:
        if not path.exists():
            raise SystemExit(f"{path} not found, so there is no interrupted run: start without --resume")
        old = json.loads(path.read_text(encoding="utf-8"))
        for flag, value in settings.items():
            if old.get(flag) != value:
                raise SystemExit(f"--resume: the interrupted run had {flag} = {old.get(flag)}, this one has {value}; use the same flags")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in (f"{name}_pm.pt", f"{name}.pt", *(["rlaif_traces.jsonl", "slcai.pt"] if name == "rlaif" else [])):
        path.with_name(stale).unlink(missing_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def keep(path, model, tokenizer, world, **more):
    """Save a GPT, or a preference model and its scale."""
    save(path, stage=path.stem, config=vars(getattr(model, "gpt", model).config), model=model.state_dict(), tokenizer=tokenizer.state(),
         world_seed=world.seed if world else None, **more)


def write_lines(path, records):
    """One JSON record a line, written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
