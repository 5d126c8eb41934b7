"""Stage 5. Constitutional AI: an AI's critique against a written constitution replaces human labels for harm (Bai et al. 2022b).

    1. SL-CAI   the helpful model answers red-team prompts;  critique -> revision, a principle drawn each round;
                the pre-trained model is fine-tuned on what comes out, together with helpful answers to harmless prompts
    2. RL-CAI   SL-CAI answers each prompt several times;  the AI says which of two answers a principle prefers:
                    label = P("A") / (P("A") + P("B")),  averaged over both orders of the options
                a preference model learns from these labels and from human labels of helpfulness; PPO does the rest

It is RLHF with one letter changed, and the code shows it: sft.train, reward.train and ppo.train are called as they are.

    python rlaif.py           reads out/pretrain.pt, out/sft.pt, out/ppo.pt and out/preferences.jsonl; 
                              writes out/slcai.pt, out/rlaif_pm.pt, out/rlaif.pt, and as a record out/rlaif_traces.jsonl and rlaif_labels.jsonl
    python rlaif.py --show    one request followed from the first answer to the last revision, and its AI label; no training

Who does what: the helpful model (ppo.pt) answers red-team prompts; the base model (pretrain.pt) critiques, revises and judges, a skill
it has from pre-training documents about other cases; the gold judges of data.py only look on.

Watch: each round about halves the harm, since a principle covers about half the kinds of harm. The final model refuses,
says whom the deed would hurt and how, offers something better, and still answers every harmless question.
"""
import argparse
import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch

import data
import ppo
import reward
import sft
from model import ScalarModel, answer, copy_of, generate, load, load_gpt, pick_device, save, write_results

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


def open_constitution(path):
    """The default constitution, or that of a file -> list of principles. Of a file that has critique and revision requests, the critique
    requests: the base model was never taught to read requests, but it has read rules."""
    principles = [c["principle"] for c in data.read_constitution_file(path)] if path else data.read_principles(CONSTITUTION)
    if not all(principles) or not principles:
        raise SystemExit(f"--constitution: {path} should hold one short principle a line, such as: Do not steal, break or hurt.")
    return principles


def questions_that_fit(tokenizer, context, principles, questions):
    """The questions that leave room for the longest principle and two answers of 48 tokens in a comparison; stops where none does."""
    longest = max(principles, key=lambda r: len(tokenizer.encode(" " + r)))
    room = context - 2 * 48 - 2 - len(tokenizer.encode(f" Request: Rule: {longest} Answer (A): Answer (B): Thought:"))      # 2: end-of-text, a word
    fit = [q for q in questions if len(tokenizer.encode(" " + q)) <= room]
    if not fit:
        raise SystemExit(f"no request fits the context of {context} tokens beside two answers and the principle {longest[:50]!r}... "
                         f"({len(tokenizer.encode(' ' + longest))} tokens): shorten it, or pre-train with a larger --context")
    if len(fit) < len(questions):
        print(f"{len(questions) - len(fit)} red-team prompts skipped: longer than the {room} tokens that the context has left for them")
    return fit


# ------------------------------------------------------------------------------------------------------------------
# Phase 1: critique and revision

def critique_and_revise(critic, tokenizer, questions, answers, principles, seed):
    """One round -> [(critique, revision)], sampled at temperature 1. The revision is None where the critique found no fault."""
    prompts = [f" Request: {q} Answer: {a} Rule: {r} Critique:" for q, a, r in zip(questions, answers, principles)]
    replies = generate(critic, [[tokenizer.eot, *tokenizer.encode(p)] for p in prompts], 96, tokenizer, seed=seed)
    steps = []
    for ids in replies:
        critique, found, revision = data.decode_reply(tokenizer, ids).partition(" Revision: ")
        steps.append((critique, (revision if ids[-1] == tokenizer.eot else "") if found else None))
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


def revise_rounds(helpful, critic, tokenizer, questions, constitution, rounds, seed):
    """The helpful model answers, the critic revises round after round -> (traces, why revisions were dropped).
    A trace: {"question", "answers": [rounds + 1], "steps": [{"principle", "critique", "revision", "dropped"}]}."""
    answers, dropped = answer(helpful, tokenizer, questions, seed=(seed, 51)), {}
    traces = [{"question": q, "answers": [a], "steps": []} for q, a in zip(questions, answers)]
    for k in range(rounds):
        rng = random.Random(f"principles {seed} {k}")
        principles = [rng.choice(constitution) for _ in questions]
        steps = critique_and_revise(critic, tokenizer, questions, [t["answers"][-1] for t in traces], principles, (seed, 52, k))
        for trace, principle, (critique, revision) in zip(traces, principles, steps):
            before = trace["answers"][-1]
            why = reject_revision(revision, before) if revision is not None else None
            if why:
                dropped[why] = dropped.get(why, 0) + 1
            trace["steps"].append({"principle": principle, "critique": critique, "revision": revision, "dropped": why})
            trace["answers"].append(before if revision is None or why else revision)
    return traces, dropped


# ------------------------------------------------------------------------------------------------------------------
# Phase 2: AI feedback

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
        tokens = data.pad_rows([p + t for p, t in zip(prompts[i:i + batch_size], thoughts[i:i + batch_size])], tokenizer.pad, left=True).to(judge.tokens.weight.device)
        last = judge.head(judge.hidden(tokens, (tokens != tokenizer.pad).long())[:, -1])
        probabilities.append(last[:, letters.to(last.device)].softmax(-1)[:, 0].cpu())
    verdict = torch.tensor([t[-1] == bracket for t in thoughts])
    return torch.where(verdict, torch.cat(probabilities), 0.5)


def ai_labels(judge, tokenizer, answered, constitution, seed):
    """A soft label for every pair of different answers: a principle drawn per pair, both orders asked and averaged -> groups for reward.train,
    and a list of what was asked, for the record."""
    rng = random.Random(f"labels {seed}")
    asked = [(g, i, j, rng.choice(constitution)) for g, (_, answers) in enumerate(answered) for i, j in itertools.combinations(range(len(answers)), 2)]
    questions, principles = [answered[g][0] for g, *_ in asked], [r for *_, r in asked]
    firsts, seconds = [answered[g][1][i] for g, i, _, _ in asked], [answered[g][1][j] for g, _, j, _ in asked]
    forward = prefer_first(judge, tokenizer, questions, firsts, seconds, principles, (seed, 61))
    backward = prefer_first(judge, tokenizer, questions, seconds, firsts, principles, (seed, 62))
    labels = ((forward + 1 - backward) / 2).tolist()
    groups = [(q, answers, []) for q, answers in answered]
    for (g, i, j, _), label in zip(asked, labels):
        groups[g][2].append((i, j, label))
    record = [{"prompt": q, "principle": r, "a": a, "b": b, "label": round(x, 4), "a_first": round(f, 4), "b_first": round(1 - w, 4)}
              for q, r, a, b, x, f, w in zip(questions, principles, firsts, seconds, labels, forward.tolist(), backward.tolist())]
    return groups, record


def with_forced_refusal(model, tokenizer, answered, seed):
    """Add to each question's answers one that was made to open with a refusal, so that annotators can vote needless refusals down:
    without such pairs the preference model seldom sees a refusal lose, and the policy ends up refusing everything. (Not in the paper.)"""
    opening = tokenizer.encode(" " + data.REFUSAL)
    replies = generate(model, [data.chat_prompt(tokenizer, q) + opening for q, _ in answered], 40, tokenizer, seed=seed)
    refusals = [data.decode_reply(tokenizer, opening + r) for r in replies]
    return [(q, answers if refusal in answers else [*answers, refusal]) for (q, answers), refusal in zip(answered, refusals)]


# ------------------------------------------------------------------------------------------------------------------
# Evaluation by the gold judges, which nothing above calls

def ask(model, tokenizer, questions, seed, base=False):
    """One sample at temperature 1 for each question; a base model gets the bare text, which is all it knows."""
    if not base:
        return answer(model, tokenizer, questions, seed=seed)
    prompts = [[tokenizer.eot, *tokenizer.encode(" " + q)] for q in questions]
    return [data.decode_reply(tokenizer, r) for r in generate(model, prompts, 24, tokenizer, seed=seed)]


def evaluate_model(model, tokenizer, world, name, n, seed, sft_answers=None):
    """Gold figures of one model -> (dict, its answers to the harmless questions)."""
    base, figures, unparseable = name == "base", {}, []
    for cell, g2 in (("g1", False), ("g2", True)):
        acts = data.act_prompts(world, "test", n, harmful=True, g2=g2)
        harmful = ask(model, tokenizer, [a.question() for a in acts], (seed, 71, g2), base)
        benign = ask(model, tokenizer, [a.twin().question() for a in acts], (seed, 72, g2), base)
        figures[f"harm_{name}_{cell}"] = 1 - float(np.mean([data.is_harmless(r) for r in harmful]))
        figures[f"over_refusal_{name}_{cell}"] = 1 - float(np.mean([data.is_compliant(r) for r in benign]))
        figures[f"reason_{name}_{cell}"] = float(np.mean([data.gives_reason(a, r) for a, r in zip(acts, harmful)]))
        unparseable += [not data.is_parseable(r) for r in harmful + benign]
    questions = reward.preference_prompts(world, "test", n)
    helpful = ask(model, tokenizer, questions, (seed, 73), base)
    right = [data.is_correct(world, q, r) for q, r in zip(questions, helpful)]
    figures |= {f"howto_accuracy_{name}": float(np.mean(right[::2])), f"fact_accuracy_{name}": float(np.mean(right[1::2])),
                f"utility_{name}": float(np.mean([data.utility(world, q, r) for q, r in zip(questions, helpful)])), f"unparseable_{name}": float(np.mean(unparseable))}
    if sft_answers:
        figures[f"win_rate_{name}"] = float(ppo.compare(*([data.utility(world, q, a) for q, a in zip(questions, texts)] for texts in (helpful, sft_answers)))["win_rate"])
    return figures, helpful


def final_table(models, tokenizer, world, n, seed):
    """Every model on the same held-out prompts: the figures, then the answers side by side."""
    figures, sft_answers = {}, None
    columns = [("harm", "g1"), ("harm", "g2"), ("over_refusal", "g1"), ("over_refusal", "g2"), ("reason", "g1"), ("reason", "g2")]
    print(f"\n{'':8}" + "".join(f"{c.replace('_', '-') + ' ' + cell.upper():>17}" for c, cell in columns) + f"{'facts':>8}{'how-to':>8}{'utility':>9}{'win':>7}")
    for name, model in models.items():
        new, helpful = evaluate_model(model, tokenizer, world, name, n, seed, sft_answers)
        sft_answers = helpful if name == "sft" else sft_answers
        figures |= new
        print(f"{name:8}" + "".join(f"{new[f'{c}_{name}_{cell}']:17.3f}" for c, cell in columns)
              + f"{new[f'fact_accuracy_{name}']:8.3f}{new[f'howto_accuracy_{name}']:8.3f}{new[f'utility_{name}']:9.2f}{new.get(f'win_rate_{name}', float('nan')):7.3f}")
    print("harm is all that is not a clean refusal, so a base model's babble counts. Unparseable: "
          + "  ".join(f"{name} {figures[f'unparseable_{name}']:.3f}" for name in models) + ". Win: against sft.")
    act = data.act_prompts(world, "test", 1, harmful=True)[0]
    g2 = data.act_prompts(world, "test", 4, harmful=True, g2=True)[3]
    for question in (data.fact_questions(world, "test")[0], act.question(), act.twin().question(), g2.question()):
        print(f"\n{question}")
        for name, model in models.items():
            print(f"  {name:8}{ask(model, tokenizer, [question], (seed, 74), name == 'base')[0]}")
    return figures


def show_trace(trace):
    """One red-team prompt, followed through its rounds."""
    print(f"\n{trace['question']}\n  first answer: {trace['answers'][0]}")
    for k, (step, after) in enumerate(zip(trace["steps"], trace["answers"][1:]), 1):
        print(f"  round {k}, principle: {step['principle']}\n    critique: {step['critique']}\n    answer:   {after}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Constitutional AI: critique, revise, AI labels, preference model, PPO.")
    # supervised phase
    p.add_argument("--constitution", help="a file, one principle a line or JSON (data.read_constitution_file); default: the one above")
    p.add_argument("--red-team-file", help="your own red-team prompts, one a line or JSON (data.read_prompts); default: the world's")
    p.add_argument("--red-team", type=int, default=1000, help="red-team prompts to answer, critique and revise")
    p.add_argument("--rounds", type=int, default=4, help="rounds of critique and revision")
    p.add_argument("--helpful", type=int, default=2500, help="harmless prompts whose helpful answers are mixed in")
    p.add_argument("--sl-epochs", type=int, default=3, help="times each conversation is read")
    p.add_argument("--sl-lr", type=float, default=3e-4, help="peak learning rate of SL-CAI")
    # AI feedback phase
    p.add_argument("--label-prompts", type=int, default=700, help="prompts whose answers the AI compares: half red-team, half benign")
    p.add_argument("--answers", type=int, default=6, help="answers sampled for each of them")
    p.add_argument("--helpful-prompts", type=int, default=500, help="harmless prompts for human helpfulness labels on SL-CAI's answers")
    p.add_argument("--pm-lr", type=float, default=5e-4, help="peak learning rate of the preference model")
    # PPO, as in ppo.py
    p.add_argument("--beta", type=float, default=0.15, help="reward lost per nat of KL from SL-CAI")
    p.add_argument("--iterations", type=int, default=25, help="rollouts")
    p.add_argument("--batch-size", type=int, default=128, help="answers a rollout, half of them to red-team prompts")
    p.add_argument("--max-new", type=int, default=56, help="longest answer of a rollout, in tokens")
    p.add_argument("--epochs", type=int, default=4, help="passes over a rollout")
    p.add_argument("--minibatch", type=int, default=64, help="answers an optimizer step")
    p.add_argument("--clip", type=float, default=0.2, help="how far the ratio, and the value, may move in one update")
    p.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of the policy")
    p.add_argument("--value-lr", type=float, default=5e-4, help="peak learning rate of the value model")
    # where things go
    p.add_argument("--init", help="the helpful model; default: OUT/ppo.pt")
    p.add_argument("--base", help="the critic, judge and start of SL-CAI; default: OUT/pretrain.pt")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of principles, samples and data order")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on after the last finished phase")
    p.add_argument("--eval-prompts", type=int, default=200, help="held-out prompts for each cell of the final table")
    p.add_argument("--show", action="store_true", help="follow one request all the way and stop")
    args = p.parse_args(argv)
    device, out = pick_device(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    base, tokenizer, checkpoint = load_gpt(args.base or out / "pretrain.pt", "pretrain.py", device)
    helpful, _, helpful_file = load_gpt(args.init or out / "ppo.pt", "ppo.py", device)
    sft_model, _, sft_file = load_gpt(out / "sft.pt", "sft.py", device)
    if not checkpoint["tokenizer"] == helpful_file["tokenizer"] == sft_file["tokenizer"]:
        raise SystemExit("these checkpoints come from different pre-trainings (their tokenizers differ): run sft.py, reward.py and ppo.py again")
    world = data.world_of(checkpoint)
    constitution = open_constitution(args.constitution)
    if not args.show:
        if not (out / "preferences.jsonl").exists():              # all inputs are there before an earlier run's files are cleared
            raise SystemExit(f"{out / 'preferences.jsonl'} not found: run `python reward.py` first")
        rlhf_groups = reward.groups_of(data.read_preferences(out / "preferences.jsonl")[0])
        check_resume(out, args)
    red_team = (data.read_prompts(args.red_team_file)[:args.red_team] if args.red_team_file
                else [a.question() for a in data.act_prompts(world, "train", args.red_team, harmful=True)])
    red_team = questions_that_fit(tokenizer, base.config.context, constitution, red_team)
    harmless = reward.preference_prompts(world, "train", args.helpful)
    print(f"{device}, {len(constitution)} principles, {len(red_team)} red-team prompts, {args.rounds} rounds")

    # 1a. Critique and revision
    def done(path):
        return args.resume and path.exists()

    traces_path = out / "rlaif_traces.jsonl"
    if done(traces_path):
        traces = [json.loads(line) for line in traces_path.read_text(encoding="utf-8").splitlines()]
    else:
        asked = red_team[:1] if args.show else red_team
        traces, dropped = revise_rounds(helpful, base, tokenizer, asked, constitution, args.rounds, args.seed)
        print("revisions dropped:", ", ".join(f"{n} {why}" for why, n in sorted(dropped.items())) or "none")
        if not args.show:
            write_lines(traces_path, traces)
    show_trace(traces[0])
    if args.show:
        two = [(red_team[0], [traces[0]["answers"][0], traces[0]["answers"][-1]])]
        _, record = ai_labels(base, tokenizer, two, constitution, args.seed)
        for r in record:
            print(f"\nprinciple: {r['principle']}\n  (A) {r['a']}\n  (B) {r['b']}\n  P(A is better) = {r['label']:.2f}"
                  f"  (asked as A: {r['a_first']:.2f}, asked as B: {r['b_first']:.2f})")
        return
    figures = {f"harm_round_{k}": 1 - float(np.mean([data.is_harmless(t["answers"][k]) for t in traces])) for k in range(args.rounds + 1)}
    print("\nharm of the answers after each round:", "  ".join(f"{figures[f'harm_round_{k}']:.3f}" for k in range(args.rounds + 1)))

    # 1b. SL-CAI: the pre-trained model fine-tuned on revisions and on helpful answers. The paper takes the revisions of all rounds; here
    # only the last answers count, since the early ones still hold harm. Those that no drawn principle covered stay in as they are.
    slcai_path = out / "slcai.pt"
    if done(slcai_path):
        slcai, _, _ = load_gpt(slcai_path, device=device)
    else:
        helpful_answers = answer(helpful, tokenizer, harmless, seed=(args.seed, 53))
        conversations = [(t["question"], t["answers"][-1]) for t in traces] + list(zip(harmless, helpful_answers))
        slcai = copy_of(base)
        sft.train(slcai, tokenizer, conversations, args.sl_epochs, 32, args.sl_lr, args.seed, desc="SL-CAI")
        save(slcai_path, stage="slcai", config=vars(slcai.config), model=slcai.state_dict(),
             tokenizer=tokenizer.state(), world_seed=world.seed)

    # 2a. AI labels for harm, human labels for helpfulness, one preference model
    pm_path, labels_path = out / "rlaif_pm.pt", out / "rlaif_labels.jsonl"
    if done(pm_path):
        pm, scale, _ = reward.load_reward(pm_path, device)
        counts = load(pm_path)["counts"]
    else:
        acts = data.act_prompts(world, "train", args.label_prompts // 2, harmful=True)
        harmful = itertools.cycle(red_team) if args.red_team_file else [a.question() for a in acts]
        prompts = [q for h, a in zip(harmful, acts) for q in (h, a.twin().question())]
        answered = reward.sample_answers(slcai, tokenizer, prompts, args.answers, (args.seed, 54))
        if not answered:
            raise SystemExit("SL-CAI gave one answer only to every prompt, so there is nothing to compare: raise --label-prompts or --answers")
        harm_groups, record = ai_labels(base, tokenizer, answered, constitution, args.seed)
        write_lines(labels_path, record)
        questions = reward.preference_prompts(world, "train", args.helpful_prompts)
        answered = reward.sample_answers(slcai, tokenizer, questions, args.answers, (args.seed, 55), fewest=1)
        help_groups = reward.annotate(world, with_forced_refusal(slcai, tokenizer, answered, (args.seed, 56)), args.seed + 1)
        counts = {"ai_labels": len(record), "human_help_labels": sum(len(g[2]) for g in help_groups),
                  "human_help_labels_rlhf": sum(len(g[2]) for g in rlhf_groups)}
        groups = harm_groups + help_groups + rlhf_groups
        random.Random(f"mix {args.seed}").shuffle(groups)
        torch.manual_seed(args.seed)                              # the new head is a function of the seed, whatever ran before
        pm = ScalarModel(copy_of(slcai)).to(device)
        reward.train(pm, tokenizer, groups, 16, args.pm_lr, args.seed, desc="preference model")
        half = red_team[:250] + harmless[:250]
        scale = reward.normalise(pm, tokenizer, list(zip(half, answer(slcai, tokenizer, half, seed=(args.seed, 57)))))
        save(pm_path, stage="rlaif_pm", config=vars(slcai.config), model=pm.state_dict(), scale=scale, counts=counts,
             tokenizer=tokenizer.state(), world_seed=world.seed)

    # 2b. PPO from SL-CAI, half red-team and half harmless prompts
    rlcai_path, history = out / "rlaif.pt", None
    if done(rlcai_path):
        rlcai, _, _ = load_gpt(rlcai_path, device=device)
    else:
        rlcai, value = copy_of(slcai), ppo.value_from(pm, scale)

        def questions_at(step):
            rng = random.Random(f"prompts {args.seed} {step}")
            return [rng.choice(red_team if i % 2 else harmless) for i in range(args.batch_size)]

        history = ppo.train(rlcai, slcai, value, tokenizer, questions_at, ppo.reward_model_scorer(pm, scale, tokenizer), args,
                            scale["lowest"] - 1, desc="RL-CAI")
        save(rlcai_path, stage="rlaif", config=vars(rlcai.config), model=rlcai.state_dict(),
             tokenizer=tokenizer.state(), world_seed=world.seed)
    taught = sum(data.DOCUMENTS[kind][0] for kind in ("critique", "comparison", "drill"))
    print(f"\nhuman harm labels: 0   AI labels: {counts['ai_labels']}   human helpfulness labels: {counts['human_help_labels']} new, "
          f"{counts['human_help_labels_rlhf']} from reward.py\nwhat taught the AI to judge: {taught:.0%} of the pre-training documents state a verdict on other cases")

    models = {"base": base, "sft": sft_model, "rlhf": helpful, "slcai": slcai, "rlcai": rlcai}
    figures |= final_table(models, tokenizer, world, args.eval_prompts, args.seed) | counts | {"human_harm_labels": 0}
    write_results(out, "rlaif", history, figures)
    print(f"\nwrote {slcai_path} and {rlcai_path}; next: python model.py {out / 'sft.pt'} {out / 'ppo.pt'} {rlcai_path} --prompt \"{red_team[0]}\"")


def check_resume(out, args):
    """A new run forgets the phases of an earlier one; a resumed run must have its flags."""
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out", "show", "eval_prompts")}
    path = out / "rlaif_settings.json"
    if args.resume:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, value in settings.items():
            if old.get(name) != value:
                raise SystemExit(f"--resume: the interrupted run had {name} = {old.get(name)}, this one has {value}; use the same flags")
        return
    for name in ("rlaif_traces.jsonl", "slcai.pt", "rlaif_pm.pt", "rlaif.pt"):
        (out / name).unlink(missing_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def write_lines(path, records):
    """One JSON record a line, written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
