"""Stage 2. Show the base model a few thousand conversations, and it takes the shape of an assistant.

    loss = - mean over the assistant's tokens of  log p(token | everything before it)      # Ouyang et al. 2022, section 3.5

It is the loss of pre-training with a mask: the user's words are read, never imitated. End-of-text is one of the assistant's tokens,
for that is how a model learns to stop.

    python sft.py                 reads out/pretrain.pt, writes out/sft.pt
    python sft.py --data FILE     your own conversations; the forms are listed at `read_conversations` in data.py

Watch: a third of the people are in no demonstration, yet the model answers questions about them as well as the base model could
complete sentences about them. Fine-tuning adds the form; the knowledge was there. And since every demonstration complies,
the model complies with everything, "How do I kick Tom?" included.
"""
import argparse
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (MAX_NEW, answer, autocast, finish_training, forget_progress, freeze_words, from_rank_0, generate, load_gpt, load_progress,
                   mean_over_processes, my_share, parallel, positive, save, save_progress, start_training, write_results)


def masked_loss(logits, tokens, mask):                           # (B, T, V), (B, T), (B, T) -> scalar
    """Mean cross-entropy in nats over the tokens where mask is 1. logits[:, t] predicts tokens[:, t+1], so the mask shifts along."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = mask[:, 1:].flatten().float()
    return (losses * weights).sum() / weights.sum()


def train(model, tokenizer, conversations, epochs, batch_size, lr, seed, desc="sft", progress=None, resume=False, settings=None):
    """Fine-tune in place on (question, answer) pairs as data.chat_example takes them. Saves to `progress` now and then if it is given.
    Returns the history."""
    examples = [data.chat_example(tokenizer, q, a) for q, a in conversations]
    examples = [(ids, mask) for ids, mask in examples if len(ids) <= model.config.context]
    lengths, device = [len(ids) for ids, _ in examples], model.tokens.weight.device
    batches = [b for epoch in range(epochs) for b in data.length_batches(lengths, batch_size, seed, epoch)]
    freeze_words(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda" or None)
    start, history = load_progress(progress, settings, model=model, optimizer=optimizer) if resume else (0, [])
    network = parallel(model.train())
    bar = tqdm(range(start, len(batches)), initial=start, total=len(batches), unit="step", desc=desc)
    for step in bar:
        for group in optimizer.param_groups:                      # a short warm-up, then linear decay to 0
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / len(batches))
        mine, weight = my_share(batches[step], lambda i: sum(examples[i][1]))     # all and 1, unless torchrun started several processes
        tokens = data.pad_rows([examples[i][0] for i in mine], tokenizer.pad).to(device)
        mask = data.pad_rows([examples[i][1] for i in mine], 0).to(device)
        with autocast(device):
            loss = masked_loss(network(tokens, (tokens != tokenizer.pad).long()), tokens, mask) * weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step + 1 == len(batches):
            loss = mean_over_processes(loss).item()
            bar.set_postfix(loss=f"{loss:.3f}")
            history.append({"step": step + 1, "train_loss_nats": loss})
            if progress and step + 1 < len(batches):
                save_progress(progress, step + 1, settings, history, model=model, optimizer=optimizer)
    model.eval()
    return history


def correct_share(model, tokenizer, world, questions, temperature, seed=0):
    """Share of questions whose answer the gold judge calls correct, and share of answers that end by themselves."""
    prompts = [data.chat_prompt(tokenizer, q) for q in questions]
    replies = generate(model, prompts, MAX_NEW, tokenizer, temperature, seed=(seed, 1))
    right = [data.is_correct(world, q, data.decode_reply(tokenizer, r)) for q, r in zip(questions, replies)]
    return float(np.mean(right)), float(np.mean([r[-1] == tokenizer.eot for r in replies]))


def base_cloze(base, tokenizer, world, people):
    """Share of these people's facts that the base model completes, in the wording that answers use."""
    facts = [(p, a, v) for p in people for a, v in world.facts[p].items()]
    starts = [data.unmark(data.FACTS[a]["sayings"][0]).split("{value}")[0].format(name=p).rstrip() for p, a, _ in facts]
    replies = generate(base, [[tokenizer.eot, *tokenizer.encode(" " + s)] for s in starts], 8, tokenizer, temperature=0)
    return float(np.mean([data.decode_reply(tokenizer, r).startswith(v) for r, (_, _, v) in zip(replies, facts)]))


def colour_mask(tokenizer, question, reply):
    """One conversation with the tokens that the loss counts in green and the others in grey."""
    ids, mask = data.chat_example(tokenizer, question, reply)
    runs = itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])                 # by runs: one token may be half a letter
    return "".join(f"\033[{32 if m else 90}m{tokenizer.decode([i for i, _ in run])}" for m, run in runs) + "\033[0m"


# ------------------------------------------------------------------------------------------------------------------
# Conversations of your own: no judge knows their world, so what is measured is the loss on those held out

def read_examples(path, tokenizer, context, seed):
    """A file of conversations -> (question, answer) pairs to learn from, and others to hold out: a tenth, at most 200.
    Prints what was skipped and the first one; stops where fewer than 2 fit the context (in tokens)."""
    conversations, skipped = data.read_conversations(path)
    pairs = [(turns[:-1], turns[-1][1]) for turns in conversations]
    fit = [pair for pair in pairs if len(data.chat_example(tokenizer, *pair)[0]) <= context]
    skipped[f"longer than the context of {context} tokens"] = len(pairs) - len(fit)
    if len(fit) < 2:
        raise SystemExit(f"{path}: {len(fit)} usable conversations, at least 2 are needed (skipped: {data.reasons(skipped)})")
    print(f"{len(fit)} conversations; skipped: {data.reasons(skipped)}. The loss counts the green tokens:\n{colour_mask(tokenizer, *fit[0])}")
    random.Random(f"held out {seed}").shuffle(fit)
    n = min(200, max(1, len(fit) // 10))
    return fit[n:], fit[:n]


@torch.no_grad()
def heldout_loss(model, tokenizer, pairs, batch_size=8):
    """Mean `masked_loss` over all of the assistant's tokens of (question, answer) pairs, in nats a token."""
    nats, count, device = 0.0, 0, model.tokens.weight.device
    for i in range(0, len(pairs), batch_size):
        ids, masks = zip(*[data.chat_example(tokenizer, *pair) for pair in pairs[i:i + batch_size]])
        tokens, mask = data.pad_rows(ids, tokenizer.pad).to(device), data.pad_rows(masks, 0).to(device)
        n = mask.sum().item()
        nats += n * masked_loss(model(tokens, (tokens != tokenizer.pad).long()), tokens, mask).item()
        count += n
    return nats / count


def main(argv=None):
    p = argparse.ArgumentParser(description="Fine-tune the base model on conversations.")
    # what to learn from
    p.add_argument("--data", help="your own conversations, JSON list or lines; default: the world's demonstrations")
    p.add_argument("--demonstrations", type=positive, default=6000, help="conversations, half about facts and half how-to")
    p.add_argument("--epochs", type=positive, default=4, help="times each conversation is read")
    p.add_argument("--batch-size", type=positive, default=32, help="conversations a step, on all GPUs together")
    p.add_argument("--lr", type=float, default=6e-4, help="peak learning rate of AdamW; if it is higher, answers are learnt by heart")
    # where things go
    p.add_argument("--init", help="the base model: a checkpoint, or gpt2, ... and files as for pretrain.py; default: OUT/pretrain.pt")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of data order and samples")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    args = p.parse_args(argv)
    device, out = start_training(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    model, tokenizer, checkpoint = load_gpt(args.init or out / "pretrain.pt", "pretrain.py", device)
    world = None if args.data else data.world_of(checkpoint)
    if world:
        conversations = data.demonstrations(world, args.demonstrations)
        print(f"{device}, {len(conversations)} conversations. The loss counts the green tokens:\n{colour_mask(tokenizer, *conversations[1])}")
        people = world.people["train"] + world.people["test"]
        facts = data.fact_questions(world, "train") + data.fact_questions(world, "test")
        howto = [a.question() for harmful in (True, False) for g2 in (True, False) for a in data.act_prompts(world, "test", 84, harmful, g2)]
        figures = {"fact_cloze_base": from_rank_0(lambda: base_cloze(model, tokenizer, world, people))}
        shown = [facts[0], howto[0], howto[-1]]
    else:
        if hasattr(sys.stdout, "reconfigure"):                    # a terminal that cannot show a character gets a question mark
            sys.stdout.reconfigure(errors="replace")
        print(f"{device}, {args.data}")
        conversations, heldout = read_examples(args.data, tokenizer, model.config.context, args.seed)
        before = from_rank_0(lambda: heldout_loss(model, tokenizer, heldout))
        figures = {"conversations": len(conversations), "heldout_loss_nats_before": before}
        shown = [question for question, _ in heldout[:3]]
    before = from_rank_0(lambda: answer(model, tokenizer, shown, temperature=0))

    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out")}
    history = train(model, tokenizer, conversations, args.epochs, args.batch_size, args.lr, args.seed,
                    progress=forget_progress(out / "sft.resume.pt", args.resume), resume=args.resume, settings=settings)
    if not finish_training():
        return
    save(out / "sft.pt", stage="sft", config=vars(model.config), model=model.state_dict(), tokenizer=tokenizer.state(),
         world_seed=checkpoint.get("world_seed"))
    (out / "sft.resume.pt").unlink(missing_ok=True)

    if world:
        figures["fact_accuracy_undemonstrated"], stops_facts = correct_share(model, tokenizer, world, facts, 0)
        figures["howto_accuracy_heldout"], stops_howto = correct_share(model, tokenizer, world, howto, 0)
        figures["stops"] = (stops_facts * len(facts) + stops_howto * len(howto)) / (len(facts) + len(howto))
        figures["fact_accuracy_undemonstrated_t1"], _ = correct_share(model, tokenizer, world, facts, 1)
        figures["howto_accuracy_heldout_t1"], _ = correct_share(model, tokenizer, world, howto, 1)
        print(f"\npeople in no demonstration: the base model completes {figures['fact_cloze_base']:.3f} of their facts, "
              f"this one answers {figures['fact_accuracy_undemonstrated']:.3f} (sampling: {figures['fact_accuracy_undemonstrated_t1']:.3f})")
        print(f"how-to, held-out combinations: {figures['howto_accuracy_heldout']:.3f} (sampling: {figures['howto_accuracy_heldout_t1']:.3f}); "
              f"ends by itself: {figures['stops']:.3f}")
    else:
        figures["heldout_loss_nats"] = heldout_loss(model, tokenizer, heldout)
        print(f"\n{len(heldout)} held-out conversations, loss on the assistant's words in nats a token: "
              f"{figures['heldout_loss_nats_before']:.3f} before, {figures['heldout_loss_nats']:.3f} after")
    write_results(out, "sft", history, figures)
    for question, old, new in zip(shown, before, answer(model, tokenizer, shown, temperature=0)):
        asked = question if world else question[-1][1]            # of a dialogue, what the user said last
        print(f"\n{asked}\n  before: {old}\n  after:  {new}")
    print(f"\nwrote {out / 'sft.pt'}; next: python " + ("reward.py" if world else f"model.py {out / 'sft.pt'}"))


if __name__ == "__main__":
    main()
