"""Stage 5. Constitutional AI: harm is labelled by an AI with written principles, not by people.

    1. SL-CAI   a harmful request -> answer -> critique -> revision -> critique -> revision ...
                the pre-trained model is fine-tuned on the revisions, and on helpful answers
    2. RL-CAI   a request, two answers, a principle: which answer is better?
                    label = P("A") / (P("A") + P("B")),  averaged over both orders
                a preference model learns these labels (reward.py), and PPO raises its score

The helpful model of RLHF (ppo.pt) answers, critiques itself, revises and judges. Documents of
pre-training taught it that, and replay kept it alive. People label helpfulness, never harm; gold
judges of harm only measure, at the end. What differs from the paper, and why:
    Bai et al. 2022b                    here
    examples in the prompt show how     documents of pre-training do: ours learns nothing in context
    a critique finds what it can        it may find nothing: no rule covers all seven kinds of harm
    all revisions are learnt            not the broken ones (reject_revision): ours breaks off
    SL-CAI's answers to harm compared   also help, benign twins, forced refusals: see phase 2 below
    one order of the two answers        both: a small judge prefers a place
    labels kept within .4 and .6        off; --clamp 0.1 does it: ours is seldom too sure
    more red-team prompts in phase 2    as many, but wider: half have verbs of g2r (World, data.py)

    python rlaif.py         writes slcai.pt, rlaif_pm.pt, rlaif.pt; traces and labels (.jsonl)

Watch: each round about halves the harm: one principle names half of its seven kinds. The final
model refuses, says whom the deed would hurt and how, and still answers harmless questions."""
import argparse
import itertools
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

import data
import ppo
import reward
import sft
from model import (ScalarModel, answer, common_flags, copy_of, finish_training, from_rank_0,
                   generate, gentle_rates, load, load_gpt, number, positive, resume, save_model,
                   save_progress, start_training)

# The two of a row share out the seven kinds of harm: one drawn names a given kind half the time.
CONSTITUTION = """
Do not steal, break or hurt.                 Never scare, lie, mock or poison.
It is wrong to steal, scare or lie.          Good answers do not break, hurt, mock or poison.
Never steal, mock or poison.                 Do not break, hurt, scare or lie.
Good answers do not steal, break or scare.   It is wrong to hurt, lie, mock or poison.
Do not steal, hurt or mock.                  Never break, scare, lie or poison.
It is wrong to steal, lie or poison.         Good answers do not break, hurt, scare or mock.
Never steal, break or lie.                   Do not hurt, scare, mock or poison.
Good answers do not steal, hurt or poison.   It is wrong to break, scare, lie or mock."""
CELLS = ("g1", *data.CELLS)            # of verbs, by where they were shown: see World in data.py
SL_EPOCHS = 4              # after fewer, SL-CAI still complies now and then when it is sampled
ANSWERS, HOT = 4, 1.4      # of SL-CAI per prompt; of those the AI compares, half are sampled hot
OLD_LABELS = 4             # of people, about SFT's answers, for each label of the AI
RATES = ppo.RATES | {"sl_lr": (6e-4, 3e-5), "pm_lr": (4e-4, 2e-5)}     # pairs, as there
CRITIQUE_TOKENS, REVISION_TOKENS, THOUGHT_TOKENS, REASON_TOKENS = 56, 56, 80, 40    # at most
# `seed` is the int --seed; a `stream`, like (seed, 51), the tuple that `generate` calls its seed.

# --- Phase 1, SL-CAI: answer, critique, revise, and learn the revisions ---------------------------
def critique_and_revise(critic, questions, answers, principles, stream):
    """One round for N answers, at temperature 1 -> N of (critique, revision). The revision is None
    if the critique found no fault or was cut off, and "" if the revision itself was cut off. Two
    requests, bare prompts; `generate` stops the first at "Revision:", and the second goes on there:
        Request: How do I nab Ann's hat? Answer: Use a hook. Rule: Never steal. Critique:
            If you nab ... That is to steal! The rule forbids it, so the answer is bad. Revision:
                Sorry, I will not help with that. If you nab Ann's hat, Ann is robbed ..."""
    tokenizer, cases = critic.tokenizer, zip(questions, answers, principles)
    form = "Request: {} Answer: {} Rule: {} Critique:"
    prompts = [data.bare_prompt(tokenizer, form.format(*case)) for case in cases]
    colon = tokenizer.encode("Revision:")[-1]              # a critique ends there or by itself
    critiques = generate(critic, prompts, CRITIQUE_TOKENS, seed=(*stream, 1), stop=[colon])
    texts = [data.decode_reply(tokenizer, ids) for ids in critiques]
    faulty = [i for i, text in enumerate(texts) if text.endswith("Revision:")]     # others: fine
    asked = [prompts[i] + critiques[i] for i in faulty]
    revised = [data.decode_reply(tokenizer, ids) if ids[-1] == tokenizer.eot else ""   # cut off
               for ids in generate(critic, asked, REVISION_TOKENS, seed=(*stream, 2))]
    revisions = dict(zip(faulty, revised))
    return [(t.removesuffix("Revision:").strip(), revisions.get(i)) for i, t in enumerate(texts)]

def in_dialogue(file, principles):
    """-> a critique_and_revise for models without a world, and texts to leave room for: the two
    requests of a constitution (else the principle) are turns of a chat. It always finds a fault."""
    requests = defaultdict(list)                           # two entries may share their principle
    for entry in data.read_constitution_file(file) if file else []:
        requests[entry["principle"]].append((entry["critique"], entry["revision"]))
    def revise(critic, questions, answers, drawn, stream):
        choices = [requests[principle] or [(principle, principle)] for principle in drawn]
        wanted = [pairs[i % len(pairs)] for i, pairs in enumerate(choices)]    # by turns
        talks = [[("user", q), ("assistant", a), ("user", asked)]
                 for q, a, (asked, _) in zip(questions, answers, wanted)]
        critiques = answer(critic, talks, CRITIQUE_TOKENS, seed=(*stream, 1))
        talks = [[*talk, ("assistant", critique), ("user", asked)]
                 for talk, critique, (_, asked) in zip(talks, critiques, wanted)]
        revisions = answer(critic, talks, REVISION_TOKENS, seed=(*stream, 2), whole=True)
        return list(zip(critiques, revisions))
    return revise, [*principles, *map(" ".join, itertools.chain(*requests.values()))]

def reject_revision(revision, before):
    """Why a revision is dropped, or None: "unfinished" (no .?! at its end), "role words inside"
    (Request:, Answer:, Rule:, Critique:, Revision:), "repeats itself" (a sentence), "unchanged"."""
    sentences = data.sentences_of(revision)    # a public replication that kept them all collapsed
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
        principles = random.Random(f"principles {seed} {k}").choices(rules, k=len(questions))
        latest = [trace["answers"][-1] for trace in traces]    # a fresh start: no old critiques
        steps = revise(critic, questions, latest, principles, (seed, 52, k))
        for trace, before, rule, (critique, revision) in zip(traces, latest, principles, steps):
            dropped = None if revision is None else reject_revision(revision, before)
            trace["steps"].append({"principle": rule, "critique": critique,
                                   "revision": revision, "dropped": dropped})
            trace["answers"].append(before if revision is None or dropped else revision)
    return traces

def to_learn(traces, which="revisions"):
    """What SL-CAI learns -> [(question, answer)]: as in the paper the "revisions" of all rounds, if
    not dropped; or the "last" answers, revised or not, for a constitution that allows some."""
    pairs = []
    for trace in traces:
        made = [s["revision"] for s in trace["steps"] if s["revision"] and not s["dropped"]]
        made = made if which == "revisions" else trace["answers"][-1:]
        pairs += [(trace["question"], text) for text in made]
    return pairs

def harmless_prompts(world, n, cells=("g1",)):
    """n harmless prompts, facts (or they are forgotten) and how-to (or all is refused) by turns."""
    facts = reward.preference_prompts(world, "train", 2 * n)[1::2]
    return [*itertools.chain(*zip(facts, in_cells(world, n, False, cells)))][:n]

def in_cells(world, n, harmful, cells):
    """n questions how to do an act, of these cells by turns."""
    drawn = [data.act_prompts(world, "train", n, harmful, (cell,)) for cell in cells]
    return [act.question() for act in itertools.chain(*zip(*drawn))][:n]

def train_slcai(base, helpful, revisions, harmless, args):
    """Fine-tune a copy of the base model on (question, revision) pairs and on the helpful model's
    answers to harmless questions (at 0.7: fewer slips), or it would refuse those too -> GPT. Some
    are asked once more after others: trained on first turns alone, it refuses in no second one."""
    help_with = lambda asked, seed: zip(asked, answer(helpful, asked, temperature=0.7, seed=seed))
    pairs, rng = [*revisions, *help_with(harmless, (args.seed, 53))], random.Random(args.seed)
    # facts and how-to take turns in `harmless`: an odd step (7, 5) takes both, an even one only one
    talks = [(data.talk(*rng.choice(pairs), question), reply) for question, reply in pairs[::7]]
    leaning = data.follow_ups(helpful.world_seed, pairs[len(revisions)::5])    # "And Tom?"
    talks += help_with(leaning, (args.seed, 60))
    slcai = copy_of(base)           # not of the helpful model, which would have to unlearn its ways
    own = dict(epochs=SL_EPOCHS, batch_size=32, lr=args.sl_lr, replay_rows=2 * args.replay_rows)
    sft.train(slcai, pairs + talks, argparse.Namespace(**vars(args) | own))     # own: not PPO's
    return slcai

# --- Phase 2, RL-CAI: an AI compares answers, a preference model learns, PPO does the rest --------
# Wanted: a refusal with its reason wins if the principle names the harm; help, if the request is
# harmless; 0.5 if the principle is silent. As in reward.py, `answered` is [(question, [answers])],
# and a group adds to it [(i, j, P(i beats j))].
@torch.no_grad()
def prefer_first(judge, questions, firsts, seconds, principles, stream, think=True):
    """The judge's P(A), where A is the first answer and B the second, after a thought -> (N,).
        Request: ... Rule: ... Answer (A): ... Answer (B): ... Thought:
            ... The better answer is (          <- sampled up to here; then P(A) and P(B) are read
    Only these count: .30 and .10 give .75. nan, for no verdict: the thought was cut off, had no
    room, or neither letter is likeliest. Form: data.comparison's; not `think`: verdict at once."""
    tokenizer, cases = judge.tokenizer, zip(questions, principles, firsts, seconds)
    form = "Request: {} Rule: {} Answer (A): {} Answer (B): {} Thought:"
    prompts = [data.bare_prompt(tokenizer, form.format(*case)) for case in cases]
    prompts = [p if len(p) <= judge.config.context - 40 else [] for p in prompts]  # room to think
    # documents end "is (A).": " (" is one token, then comes "A" without a space: the last of "(A"
    bracket, A, B = (tokenizer.encode(text)[-1] for text in (" (", "(A", "(B"))
    thoughts = (generate(judge, prompts, THOUGHT_TOKENS, seed=stream, stop=[bracket]) if think else
                [tokenizer.encode(" The better answer is (")] * len(prompts))     # ( included
    rows, p_first = [prompt + thought for prompt, thought in zip(prompts, thoughts)], []
    for i in range(0, len(rows), 128):                     # padded left: the bracket is last in all
        tokens = data.pad_rows(rows[i:i + 128], tokenizer.pad, left=True).to(judge.device)
        logits = judge.head(judge.hidden(tokens, (tokens != tokenizer.pad).long())[:, -1])  # (b, V)
        letter = torch.isin(logits.argmax(-1), torch.tensor([A, B], device=judge.device))
        p_first.append(logits[:, [A, B]].softmax(-1)[:, 0].where(letter, torch.nan).cpu())
    verdict = torch.tensor([p != [] and t[-1] == bracket for p, t in zip(prompts, thoughts)])
    return torch.where(verdict, torch.cat(p_first), torch.nan)

def both_orders(judge, questions, firsts, seconds, principles, stream):
    """prefer_first twice -> P(the first is better); P(A) with the first as A; with the second as A;
    (N,) each. A small judge prefers a place: .9, .5 make (.9 + 1 - .5) / 2 = .7; .9, .9 make .5"""
    forward = prefer_first(judge, questions, firsts, seconds, principles, (*stream, 61))
    backward = prefer_first(judge, questions, seconds, firsts, principles, (*stream, 62))
    return (forward + 1 - backward) / 2, forward, backward

def ai_labels(judge, answered, constitution, seed, clamp=0.5):
    """Compare every two answers to a question by a principle drawn for them -> groups; a record, a
    dict per pair: a_first, b_first are P(a is better) with a, or b, as option A. Labels within 0.5
    +- clamp (the paper: 0.1, as verdicts after a thought are too sure). No verdict: left out."""
    rng, asked, places = random.Random(f"labels {seed}"), [], []
    for k, (question, answers) in enumerate(answered):
        for i, j in itertools.combinations(range(len(answers)), 2):
            asked.append((question, answers[i], answers[j], rng.choice(constitution)))
            places.append((k, i, j))
    if not asked:
        raise SystemExit("the models give one answer only to every prompt: raise --label-prompts")
    labels, forward, backward = both_orders(judge, *zip(*asked), (seed,))
    columns = [labels.clamp(0.5 - clamp, 0.5 + clamp), forward, 1 - backward]
    names = ("prompt", "a", "b", "principle", "label", "a_first", "b_first")
    groups, record = [(question, answers, []) for question, answers in answered], []
    for case, (k, i, j), row in zip(asked, places, torch.stack(columns, 1).tolist()):
        if not np.isnan(row[0]):
            groups[k][2].append((i, j, row[0]))
            record.append(dict(zip(names, [*case, *row])))
    print(f"{len(asked) - len(record)} of {len(asked)} comparisons: no verdict, so left out")
    if not record:
        raise SystemExit("the judge never reaches a verdict: it has to read comparisons first")
    return [group for group in groups if group[2]], record

def answers_to_compare(start, helpful, red_team, benign, seed):
    """SL-CAI's answers to both, by turns; one of the helpful model; to harm one forced to refuse
    -> `answered`. SL-CAI's own may all be help, or all refuse: what is never tried never wins."""
    prompts = [*itertools.chain(*zip(itertools.cycle(red_team), benign))]
    answered = reward.sample_answers(start, prompts, ANSWERS, (seed, 54), HOT, fewest=1)
    for (_, answers), other in zip(answered, answer(helpful, prompts, seed=(seed, 59))):
        answers += [other] * (other not in answers)
    with_forced_refusal(start, answered[::2], (seed, 58))
    return answered

def with_forced_refusal(model, answered, stream):
    """Add an answer made to open with a refusal, in place -> `answered`. People vote it down where
    it is needless, on g2r's twins too: or chance decides, or the policy refuses everything."""
    opening = model.tokenizer.encode(" " + data.REFUSAL)
    prompts = [data.chat_prompt(model.tokenizer, question) + opening for question, _ in answered]
    endings = generate(model, prompts, REASON_TOKENS, seed=stream)     # mostly a reason
    for (_, answers), ending in zip(answered, endings):
        refusal = data.decode_reply(model.tokenizer, opening + ending)
        answers += [refusal] * (refusal not in answers)    # it may have refused by itself
    return answered

def train_preference_model(start, harm, old, world, prompts, lr, seed):
    """The reward model of reward.py, from SL-CAI's weights -> (model, counts of pairs). Its groups:
        harm      the AI labels what it compared           "refuse harm and say why, help twins"
        helpful   one polite person labels SL-CAI's        "help, refuse nothing needlessly"
        old       reward.py's labels of SFT's answers      "what you say has to be true" """
    helpful = []
    if world:
        questions = harmless_prompts(world, len(harm), ("g1", "g2r"))  # as many as the AI
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
    reward.train(model, groups, epochs=1, batch_size=2, lr=lr, seed=seed)  # 16: too few steps
    conversations = list(zip(prompts, answer(start, prompts, seed=(seed, 57), whole=True)))
    model.scale = reward.normalise(model, conversations, std=1.0)      # mean 0; its own units
    return model, counts

def reinforce(start, pm, red_team, harmless, args):
    """PPO from SL-CAI and on a leash to it, for half red-team prompts -> (policy, history)."""
    def questions_at(step):
        rng = random.Random(f"prompts {args.seed} {step}")  # half of each, as in the paper
        return [rng.choice(red_team if i % 2 else harmless) for i in range(args.batch_size)]
    policy, value = copy_of(start), ppo.value_from(pm)     # they share nothing, as in ppo.py
    return policy, ppo.train(policy, value, questions_at, ppo.score_by_model(pm), args)

def main(argv=None):
    args = read_args(argv)
    device, out, inputs = start_training(args.device), Path(args.out), Path(args.inputs or args.out)
    data.GOLD_HARM_CALLS.clear()                           # there must be no call before evaluation
    base, sft_model, helpful = load_models(inputs, args, device)
    world = None if args.prompts else data.world_of(base)  # None: nobody knows what is right
    rules = open_constitution(args.constitution, world)
    critic = helpful if args.critic == "self" else base    # self: as in the paper
    revise, texts = (critique_and_revise, rules) if world else in_dialogue(args.constitution, rules)
    room = min(room_beside(base, texts), base.config.context - args.max_new)
    red_team, harmless, wide_red_team, wide_harmless, benign = (
        ppo.prompts_that_fit(asked, base.tokenizer, room)
        for asked in (from_world if world else from_files)(world, args))
    print(f"{device}, {len(rules)} principles, {len(red_team)} red-team prompts")
    old = read_labels(args.preferences, inputs, base)      # people's
    # four steps follow: each keeps its work in a file, and --resume skips those already `done`
    progress = (out / "rlaif.progress", args)
    done, traces = resume(progress, finished=4)
    if done < 1:       # 1. critique and revise harmful answers
        traces = revise_rounds(helpful, critic, red_team, rules, args.rounds, args.seed, revise)
        from_rank_0(lambda: data.write_lines(out / "rlaif_traces.jsonl", traces))  # read some!
        save_progress(progress, 1, traces)
    show_trace(traces)
    if done < 2:       # 2. SL-CAI: the base model learns the revisions
        slcai = train_slcai(base, helpful, to_learn(traces, args.learn), harmless, args)
        save_model(out / "slcai.pt", slcai)
        from_rank_0(lambda: save_progress(progress, 2, traces))    # others read it when it is there
    slcai = load_gpt(out / "slcai.pt", device=device)
    if done < 3:       # 3. AI labels of harm, human labels of helpfulness: one preference model
        answered = answers_to_compare(slcai, helpful, wide_red_team, benign, args.seed)
        harm, record = ai_labels(critic, answered, rules, args.seed, args.clamp)
        from_rank_0(lambda: data.write_lines(out / "rlaif_labels.jsonl", record))  # judge the judge
        zero = red_team[:250] + harmless[:250]             # SL-CAI's answers to them will average 0
        pm, counts = train_preference_model(slcai, harm, old, world, zero, args.pm_lr, args.seed)
        save_model(out / "rlaif_pm.pt", pm, scale=pm.scale, counts=counts)
        from_rank_0(lambda: save_progress(progress, 3, traces))
    pm = reward.load_reward(out / "rlaif_pm.pt", slcai)
    if done < 4:       # 4. RL-CAI: PPO, as in ppo.py
        policy, history = reinforce(slcai, pm, wide_red_team, wide_harmless, args)
        from_rank_0(lambda: data.write_results(out, "rlaif", history))
        save_model(out / "rlaif.pt", policy)
        save_progress(progress, 4, traces)
    finish_training()                                      # rank 0 alone goes on
    policy = load_gpt(out / "rlaif.pt", device=device)
    models = {"sft": sft_model, "rlhf": helpful, "slcai": slcai, "rlcai": policy}
    figures = load(out / "rlaif_pm.pt")["counts"]          # pairs labelled by the AI, by people
    if world:          # training is over: only now are the gold judges of harm used
        figures |= count_and_judge(traces, load(inputs / "pretrain.pt"), resumed=args.resume)
        figures |= measure_critic(critic, world, args.eval_prompts, args.seed)
        figures |= final_table(models, world, args.eval_prompts, args.seed)
    data.write_results(out, "rlaif", figures=figures)
    for asked in (red_team[:1], benign[:1], harmless[-1:]):
        print("", *asked, *[f"  {k:6} {answer(models[k], asked)[0]}" for k in models], sep="\n")
    print(f"\nwrote {out / 'rlaif.pt'}; next: python model.py {out / 'rlaif.pt'}")

# --- Evaluation by the gold judges: no training above calls those of harm -------------------------
def final_table(models, world, n, seed):
    """Models {name: GPT} on n requests of each cell and n harmless questions -> figures, shares of
    harm           harmful requests that get no clean refusal (babble is harm)
    over_refusal   their benign twins, the same with a harmless verb, that get no clean answer
    reason         harmful requests whose answer says rightly whom the deed would hurt, and how"""
    questions, figures = reward.preference_prompts(world, "test", n), {}
    found = defaultdict(lambda: defaultdict(list))         # (what, cell or "") -> model -> values
    for name, model in models.items():
        for k, cell in enumerate(CELLS):
            acts = data.act_prompts(world, "test", n, True, (cell,))
            harmful = answer(model, [act.question() for act in acts], seed=(seed, 71, k))
            benign = answer(model, [act.twin().question() for act in acts], seed=(seed, 72, k))
            for act, text, other in zip(acts, harmful, benign):
                found["harm", cell][name].append(not data.is_harmless(text))
                found["over_refusal", cell][name].append(not data.is_compliant(other))
                found["reason", cell][name].append(data.gives_reason(act, text))
        for i, text in enumerate(answer(model, questions, seed=(seed, 73))):
            kind = ("howto_accuracy", "fact_accuracy")[i % 2]  # they take turns
            found[kind, ""][name].append(data.is_correct(world, questions[i], text))
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

def count_and_judge(traces, base, resumed=False):
    """How many documents of each kind that the checkpoint `base` has read call a deed good or bad:
    they taught the critic; whether a gold judge spoke too early; harm per round -> figures."""
    found = {f"judging_{kind}": n for kind, n in sorted((base.get("documents") or {}).items())}
    found |= {} if resumed else {"gold_harm_calls_in_training": sum(data.GOLD_HARM_CALLS.values())}
    for trace in traces:
        for k, text in enumerate(trace["answers"]):
            found.setdefault(f"harm_round_{k}", []).append(not data.is_harmless(text))
    return say(found)

def measure_critic(critic, world, n, seed):
    """What a critic is worth, on n held-out requests of each cell, and of g1 under unseen rules ->
    figures by case (data.critic_cases): shares of right verdicts, labels; "silent": mean label."""
    found = defaultdict(list)
    for cell in (*CELLS, "unseen"):
        rules = open_constitution("unseen" if cell == "unseen" else None, world)   # not this run's
        acts = data.act_prompts(world, "test", n, True, ("g1" if cell == "unseen" else cell,))
        cases, asked, answers, *pair, named = zip(*data.critic_cases(acts, rules, seed))
        questions = [act.question() for act in asked]
        steps = critique_and_revise(critic, questions, answers, named, (seed, 63))
        labels = both_orders(critic, questions, *pair, named, (seed, 64))[0].tolist()
        for case, (critique, _), label in zip(cases, steps, labels):
            fault, named = "The rule forbids it" in critique, case in ("covered", "reason")
            found[f"verdict_{case}_{cell}"].append(fault == named)
            found["label_missing"].append(np.isnan(label))  # no verdict: nan, left out of the means
            hard = (np.sign(label - 0.5) + 1) / 2          # 1: the better one was chosen; or nan
            found[f"label_{case}_{cell}"].append(label if case == "silent" else hard)
    return say(found)

# --- What the phases start from; files and flags --------------------------------------------------
def load_models(inputs, args, device):
    """-> base, SFT and helpful model, of one tokenizer; fills in the rates that suit them."""
    base = load_gpt(inputs / "pretrain.pt", "pretrain.py", device)
    gentle_rates(args, base, **RATES)
    helpful = load_gpt(args.init or inputs / "ppo.pt", "ppo.py", device)
    sft_model = load_gpt(inputs / "sft.pt", "sft.py", device)
    if any(model.tokenizer.state() != base.tokenizer.state() for model in (helpful, sft_model)):
        raise SystemExit("the models' tokenizers differ: run sft.py, reward.py and ppo.py again")
    return base, sft_model, helpful

def open_constitution(which=None, world=None):
    """--constitution -> principles: the default ones, a file's, or "unseen": in no document."""
    principles = data.read_principles(CONSTITUTION)
    if which == "unseen":
        rng = random.Random(f"unseen {world.seed}")
        principles = [data.rule_text(rng.sample(kinds, len(kinds)), data.UNSEEN_WORDING)
                      for kinds in world.unseen_rules]     # a rule is a set: in any order
    elif which:            # its requests for critique and revision are for in_dialogue
        principles = [entry["principle"] for entry in data.read_constitution_file(which)]
    if not all(principles) or not principles:
        raise SystemExit(f"--constitution {which}: one short principle a line, like: Never steal.")
    return principles

def from_world(world, args):
    """-> red-team and harmless prompts of phase 1, wider ones of 2; benign twins for the labels."""
    file, prompts = args.red_team_file and data.read_prompts(args.red_team_file), []
    for cells in (("g1",), ("g1", "g2r")):
        red_team = file or in_cells(world, args.red_team, True, cells)
        prompts += [red_team[:args.red_team], harmless_prompts(world, args.helpful, cells)]
    return *prompts, in_cells(world, args.label_prompts // 2, False, ("g1", "g2r"))

def from_files(world, args):
    """The same from --red-team-file and --prompts; the latter are both harmless and benign ones."""
    asked = data.read_prompts(args.prompts)
    both = data.read_prompts(args.red_team_file)[:args.red_team], asked[:args.helpful]
    return *both, *both, asked[:args.label_prompts // 2]

def room_beside(model, principles):
    """Tokens that a prompt may have beside the longest principle, two answers and a thought."""
    form = "Request: Rule: {} Answer (A): Answer (B): Thought:"
    frame = max(len(data.bare_prompt(model.tokenizer, form.format(rule))) for rule in principles)
    return model.config.context - frame - 2 * 48 - 40      # answers and thought of typical length

def read_labels(given, inputs, base):
    """People's labels of helpfulness, from --preferences or from reward.py's file -> groups."""
    path = Path(given or inputs / "preferences.jsonl")
    if not path.exists():
        raise SystemExit(f"{path} not found: run `python reward.py` first, or use --preferences")
    return (reward.groups_from_file(path, base) if given
            else reward.groups_of(data.read_preferences(path)[0]))

def show_trace(traces):
    """What was dropped, and why; one request, round by round."""
    dropped = Counter(s["dropped"] for trace in traces for s in trace["steps"] if s["dropped"])
    question, (first, *later), steps = traces[0].values()
    print(f"revisions dropped: {data.reasons(dropped)}\n\n{question}\n  {first}")
    for step, text in zip(steps, later):
        print(f"principle: {step['principle']}\n  critique: {step['critique']}\n  answer: {text}")

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="Constitutional AI: critique, revise, AI labels, PPO.")
    flag = p.add_argument
    flag("--constitution", help="unseen, or a file: one principle per line or JSON; default: above")
    flag("--red-team", type=positive, default=800, help="harmful requests to work on")
    flag("--rounds", type=positive, default=4, help="rounds of critique and revision")
    flag("--learn", choices=["revisions", "last"], default="revisions", help="see to_learn")
    flag("--helpful", type=positive, default=1600, help="harmless prompts with helpful answers")
    flag("--sl-lr", type=number(0, 1), help="SL-CAI's peak; 6e-4, of published weights 3e-5")
    flag("--label-prompts", type=number(2, 2 ** 31, int), default=500, help="half of them benign")
    flag("--clamp", type=number(0, 0.5), default=0.5, help="keep soft labels this near to 0.5")
    flag("--pm-lr", type=number(0, 1), help="the preference model's: 4e-4, published weights 2e-5")
    ppo.ppo_flags(p, beta=0.1, iterations=20, epochs=3, value_warmup=4, replay_rows=1)
    flag("--critic", choices=["self", "base"], default="self", help="who critiques and judges")
    flag("--inputs", help="folder of pretrain.pt, sft.pt, ppo.pt, preferences.jsonl; default: OUT")
    flag("--red-team-file", help="red-team prompts, one per line or JSON; default: the world's")
    flag("--prompts", help="harmless prompts, for a model without a world: no gold judge speaks")
    flag("--preferences", help="labels of helpfulness; default: INPUTS/preferences.jsonl")
    flag("--eval-prompts", type=positive, default=100, help="held-out requests for each cell")
    common_flags(p, "the helpful model; default: INPUTS/ppo.pt", "seed of all that is drawn")
    args = p.parse_args(argv)
    ppo.check_warmup(args)
    if args.prompts and (not args.red_team_file or args.constitution == "unseen"):
        raise SystemExit("--prompts (no world) needs --red-team-file, and no --constitution unseen")
    return args

if __name__ == "__main__":
    main()
