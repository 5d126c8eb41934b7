"""Does it help to say what is wrong with an answer before one mends it?

    python docs/lab/no_critique.py --inputs out --out out/direct     all of rlaif.py's flags

Phase 1 of rlaif.py twice: with its critic, who critiques and then revises; and with a copy of the
base model that is shown 3,000 of the same cases, the critique left out ("direct"). Prints harm
after each round, how often each finds a fault where there is one and none where there is none; then
SL-CAI on the direct revisions, beside INPUTS/slcai.pt. Writes OUT/direct.pt and no_critique.json.

Found (first edition, seed 0): with critiques harm falls to 0.066 in four rounds, without to 0.037,
and at a price: the direct reviser changes whatever it is given. Half its verdicts are right (with
critiques all). SL-CAI on direct revisions: harm G1 0.000, G2 0.030; by critiques 0.002, 0.008.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np

import data
import rlaif
import sft
from model import copy_of, generate, load_gpt, pick_device, save_model

CASES = 3000                      # conversations from which to learn the form, each read once
STAYS = "The answer may stay."

def direct_revisions(world, n):
    """n conversations: the cases of critique documents, and what to answer without the critique."""
    pairs = []
    for i in range(n):
        document = data.unmark(data.critique(world, data.Dice(world.seed, "direct", i)))
        case, _, rest = document.partition(" Critique: ")
        _, found, revision = rest.partition(" Revision: ")
        pairs.append((case, f"Revision: {revision}" if found else STAYS))
    return pairs

def revise_directly(reviser, questions, answers, principles, stream):
    """In the place of rlaif.critique_and_revise -> [(what stands before it, revision)], N each."""
    tokenizer, steps = reviser.tokenizer, []
    form = "Request: {} Answer: {} Rule: {}"
    cases = [form.format(*case) for case in zip(questions, answers, principles)]
    # a question of a chat: as the start of a document it would be followed by the critique
    prompts = [data.chat_prompt(tokenizer, case) for case in cases]
    for ids in generate(reviser, prompts, rlaif.CRITIQUE_TOKENS, seed=stream):
        before, fault, revision = data.decode_reply(tokenizer, ids).partition("Revision: ")
        whole = ids[-1] == tokenizer.eot                   # what was cut off may look finished
        steps.append((before.strip(), (revision if whole else "") if fault else None))
    return steps

def right_verdicts(reviser, revise, acts, rules, seed):
    """Share of cases in which a fault is found where the rule covers the act, and none elsewhere:
    {"covered", "silent", "benign": the share in each case}."""
    cases, asked, answers, _, _, named = zip(*data.critic_cases(acts, rules, seed))
    steps = revise(reviser, [act.question() for act in asked], answers, named, (seed, 63))
    found = np.array([revision is not None for _, revision in steps])
    cases = np.array(cases)
    return {case: float(np.mean(found[cases == case] == (case == "covered")))
            for case in ("covered", "silent", "benign")}

def main(argv=None):
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--record", action="store_true")
    own, rest = p.parse_known_args(argv)                   # the others are rlaif.py's
    args, figures = rlaif.read_args(rest), {}
    if args.resume or args.prompts:
        raise SystemExit("this experiment starts afresh, in a world: no --resume, no --prompts")
    device, out, inputs = pick_device(args.device), Path(args.out), Path(args.inputs or args.out)
    base, _, helpful = rlaif.load_models(inputs, args, device)
    world, n, seed = data.world_of(base), args.eval_prompts, args.seed
    rules = rlaif.open_constitution(args.constitution, world)
    red_team, harmless, *_ = rlaif.from_world(world, args)
    reviser, critic = copy_of(base), helpful if args.critic == "self" else base
    own_flags = dict(epochs=1, batch_size=32, lr=3e-4, seed=seed, replay=None, replay_rows=0)
    sft.train(reviser, direct_revisions(world, CASES), argparse.Namespace(**own_flags))
    ways = {"critique": (critic, rlaif.critique_and_revise), "direct": (reviser, revise_directly)}
    for name, (model, revise) in ways.items():
        traces = rlaif.revise_rounds(helpful, model, red_team, rules, args.rounds, seed, revise)
        for k, texts in enumerate(zip(*[trace["answers"] for trace in traces])):
            figures[f"harm_{name}_{k}"] = 1 - float(np.mean([*map(data.is_harmless, texts)]))
        for cell in ("g1", "g2"):
            acts = data.act_prompts(world, "test", n, True, (cell,))
            for case, share in right_verdicts(model, revise, acts, rules, seed).items():
                figures[f"verdict_{case}_{name}_{cell}"] = share
    print(*[f"{name:28}{x:.3f}" for name, x in figures.items()], sep="\n")
    direct = rlaif.train_slcai(base, helpful, rlaif.to_learn(traces), harmless, args)
    save_model(out / "direct.pt", direct)
    models, path = {"direct": direct}, inputs / "slcai.pt"
    models |= {"slcai": load_gpt(path, device=device)} if path.exists() else {}
    figures |= rlaif.final_table(models, world, n, seed)
    data.write_results(out, "no_critique", figures=figures)
    if own.record:
        data.write_results(ROOT / "docs" / "results", "no_critique", figures=figures)

if __name__ == "__main__":
    main()
