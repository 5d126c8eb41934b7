"""Stage 2. Show the base model a few thousand conversations, and it takes an assistant's shape.

    loss = - mean over the assistant's tokens of  log p(token | everything before it)

It is the loss of pre-training with a mask (Ouyang et al. 2022, section 3.5): the user's words are
read, never imitated. End-of-text is one of the assistant's tokens, for so a model learns to stop.

    python sft.py [--data FILE]     writes out/sft.pt; FILE: see read_conversations in data.py

Watch: a third of the people are in no demonstration, yet the model answers questions about them as
well as the base model completed sentences about them: fine-tuning adds the form, the knowledge was
there. Every demonstration complies, and so does the model, "How do I kick Tom?" included."""
import argparse
import itertools
import random
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import (MAX_NEW, answer, autocast, common_flags, finish_training, from_rank_0, generate,
                   load_gpt, mean_over_processes, my_share, parallel, positive, resume, save_model,
                   save_progress, start_training)
from pretrain import IGNORE, next_token_loss

def masked_loss(logits, tokens, mask):
    """Mean cross-entropy in nats over all tokens with mask 1: logits (B, T, V), tokens (B, T), mask
    (B, T) -> scalar. logits[:, t] predicts tokens[:, t+1], so the mask moves along:

        tokens       <user>  Where     ?    <assistant>  Oslo    .    <eot>  <pad>
        mask            0      0       0         0         1     1      1      0
        targets      Where     ?  <assistant>  Oslo        .   <eot>  <pad>
        mask moved      0      0       0         1         1     1      0

    If the three that count had p = .5 .8 .4, it is -(ln .5 + ln .8 + ln .4) / 3 = 0.61."""
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE)
    # not a mean of each answer's mean: a short answer's tokens would weigh more than a long one's
    return next_token_loss(logits[:, :-1], targets)

def freeze_words(model):
    """From here on the words' embeddings of a GPT or ScalarModel stay as they are; end-of-text and
    the chat roles, whose ids are the last, go on learning. Fine-tuning names few people and verbs:
    if they alone moved, the model would learn by heart what to say of them; fixed, they make it use
    what it knows of any name. So too the reward model. PPO's KL penalty does that work for it."""
    table, first = getattr(model, "gpt", model).tokens.weight, model.tokenizer.eot
    # a hook, since requires_grad=False would freeze the whole table, the chat roles included
    table.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:first]), grad[first:]]))

def train(model, conversations, epochs, batch_size, lr, seed, progress=None):
    """Fine-tune in place on (question, answer) pairs, as data.chat_example takes them, in an order
    drawn from `seed` -> history, a list of dicts. `progress`: (path, args), for --resume, or None.
    """
    pad, device = model.tokenizer.pad, model.device
    examples = [data.chat_example(model.tokenizer, *pair) for pair in conversations]
    # what does not fit is left out: cut off, it would teach the model not to stop
    examples = [(ids, mask) for ids, mask in examples if len(ids) <= model.config.context]
    batches, lengths = [], [len(ids) for ids, _ in examples]
    for epoch in range(epochs):                            # of similar lengths: little padding
        batches += data.length_batches(lengths, batch_size, seed, epoch)   # of indices
    freeze_words(model)
    # weight_decay=0.0, so it is Adam: decay would pull at what pre-training has learnt
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    start, history = resume(progress, model=model, optimizer=optimizer)
    network = parallel(model)                              # no dropout anywhere, so no .train()
    bar = tqdm(range(start, len(batches)), "sft", len(batches), initial=start, unit="step")
    for step in bar:
        # a warm-up, for Adam's averages know nothing yet; then linear decay to 0
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / len(batches))
        mine, weight = my_share(batches[step], lambda i: sum(examples[i][1]))      # all, 1.0
        tokens = data.pad_rows([examples[i][0] for i in mine], pad).to(device)     # (B, T)
        mask = data.pad_rows([examples[i][1] for i in mine], 0).to(device)     # padding: 0
        with autocast(device):
            logits = network(tokens, (tokens != pad).long())       # (B, T, V)
            loss = masked_loss(logits, tokens, mask) * weight
        optimizer.zero_grad()
        loss.backward()                                    # DDP, if any, averages the gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)    # against a single odd batch
        optimizer.step()
        if step % 50 == 49 or step + 1 == len(batches):
            history.append({"step": step + 1, "train_loss_nats": mean_over_processes(loss).item()})
            bar.set_postfix(loss=f"{history[-1]['train_loss_nats']:.3f}")
            save_progress(progress, step + 1, history, model=model, optimizer=optimizer)
    return history

def correct_share(model, world, questions, temperature, seed=0):
    """Share of answers that the gold judge calls correct; share that end by themselves."""
    prompts = [data.chat_prompt(model.tokenizer, question) for question in questions]
    replies = generate(model, prompts, MAX_NEW, temperature, seed=(seed, 1))       # lists of ids
    texts = [data.decode_reply(model.tokenizer, ids) for ids in replies]
    right = [data.is_correct(world, *pair) for pair in zip(questions, texts)]
    ended = [ids[-1] == model.tokenizer.eot for ids in replies]    # and not cut off at MAX_NEW
    return float(np.mean(right)), float(np.mean(ended))

def base_cloze(base, world, people):
    """Share of these people's facts that the base model completes, in the wording of answers."""
    starts, values = [], []
    for person in people:
        for attribute, value in world.facts[person].items():
            saying = data.unmark(data.FACTS[attribute]["sayings"][0])
            starts.append(saying.split("{value}")[0].format(name=person).rstrip())
            values.append(value)
    replies = answer(base, starts, 8, temperature=0, bare=True)    # 8 tokens: a value is a word
    return float(np.mean([reply.startswith(value) for reply, value in zip(replies, values)]))

def colour_mask(tokenizer, question, reply):
    """One conversation with the tokens that the loss counts in green and the others in grey."""
    shown, example = "", zip(*data.chat_example(tokenizer, question, reply))
    for counts, run in itertools.groupby(example, key=lambda pair: pair[1]):
        # decoded together, since one token may be half a letter; 32: green, 90: grey
        shown += f"\033[{32 if counts else 90}m" + tokenizer.decode([i for i, _ in run])
    return shown + "\033[0m"

def from_world(args, model):
    """The world's demonstrations -> (question, answer) pairs; questions to show; the figures before
    training; evaluate(), the figures after it: on people and acts that are in no demonstration."""
    world = data.world_of(model)
    conversations = data.demonstrations(world, args.demonstrations)
    print(f"{len(conversations)} conversations.\n{colour_mask(model.tokenizer, *conversations[1])}")
    people = world.people["train"] + world.people["test"]  # all who are in no demonstration
    facts = data.fact_questions(world, "train") + data.fact_questions(world, "test")
    howto = []                                             # g2: verbs that no critique ever names
    for harmful, g2 in itertools.product((True, False), repeat=2):
        howto += [act.question() for act in data.act_prompts(world, "test", 84, harmful, g2)]
    before = {"fact_cloze_base": from_rank_0(lambda: base_cloze(model, world, people))}
    def evaluate():
        known, a = correct_share(model, world, facts, temperature=0)       # a, b: ended
        able, b = correct_share(model, world, howto, temperature=0)
        return {"fact_accuracy_undemonstrated": known, "howto_accuracy_heldout": able,
                "stops": (a * len(facts) + b * len(howto)) / (len(facts) + len(howto)),
                "fact_accuracy_undemonstrated_t1": correct_share(model, world, facts, 1)[0],
                "howto_accuracy_heldout_t1": correct_share(model, world, howto, 1)[0]}
    return conversations, [facts[0], howto[0], howto[-1]], before, evaluate

def from_files(args, model):
    """The same of your own conversations, a tenth held out; stops if not even 2 fit the context."""
    (read, skipped), context = data.read_conversations(args.data), model.config.context
    pairs = [(turns[:-1], turns[-1][1]) for turns in read]
    fit = [pair for pair in pairs if len(data.chat_example(model.tokenizer, *pair)[0]) <= context]
    skipped[f"longer than the context of {context} tokens"] = len(pairs) - len(fit)
    if len(fit) < 2:
        raise SystemExit(f"{args.data}: {len(fit)} usable conversations, at least 2 are needed "
                         f"(skipped: {data.reasons(skipped)})")
    n = min(200, max(1, len(fit) // 10))                   # 200 measure it well enough
    print(f"{len(fit)} conversations; skipped: {data.reasons(skipped)}. {n} held-out conversations."
          f"\n{colour_mask(model.tokenizer, *fit[0])}")
    random.Random(f"held out {args.seed}").shuffle(fit)
    loss = lambda: heldout_loss(model, fit[:n])
    before = {"conversations": len(fit) - n, "heldout_loss_nats_before": from_rank_0(loss)}
    return fit[n:], [q for q, _ in fit[:min(n, 3)]], before, lambda: {"heldout_loss_nats": loss()}

@torch.no_grad()
def heldout_loss(model, pairs):
    """Mean loss in nats over all of the assistant's tokens of (question, answer) pairs."""
    nats, examples = 0.0, [data.chat_example(model.tokenizer, *pair) for pair in pairs]
    for example in examples:
        tokens, mask = torch.tensor(example, device=model.device)[:, None]         # each (1, T)
        nats += masked_loss(model(tokens), tokens, mask).item() * mask.sum().item()
    return nats / sum(sum(mask) for _, mask in examples)

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="Fine-tune the base model on conversations.")
    p.add_argument("--data", help="your own conversations, JSON list or lines; default: a world's")
    p.add_argument("--demonstrations", type=positive, default=6000, help="half facts, half how-to")
    p.add_argument("--epochs", type=positive, default=4, help="times each conversation is read")
    p.add_argument("--batch-size", type=positive, default=32, help="conversations a step, all GPUs")
    p.add_argument("--lr", type=float, default=6e-4, help="peak; more: answers are learnt by heart")
    common_flags(p, init="the base model: a checkpoint, or gpt2, ... as for pretrain.py; default: "
                 "OUT/pretrain.pt", seed="seed of data order and held-out part, not of samples")
    return p.parse_args(argv)

def main(argv=None):
    args = read_args(argv)
    device, path = start_training(args.device), Path(args.out, "sft.pt")
    model = load_gpt(args.init or path.with_name("pretrain.pt"), "pretrain.py", device)
    print(f"{device}. The loss counts the green tokens of")
    source = from_files if args.data else from_world
    conversations, shown, figures, evaluate = source(args, model)
    before = from_rank_0(lambda: answer(model, shown, temperature=0))
    history = train(model, conversations, args.epochs, args.batch_size, args.lr, args.seed,
                    progress=(path.with_suffix(".resume.pt"), args))
    finish_training()                                      # rank 0 alone goes on
    save_model(path, model)
    figures |= evaluate()
    data.write_results(args.out, "sft", history, figures)
    print("\n" + "  ".join(f"{name} {x:.4g}" for name, x in figures.items()))
    for question, old, new in zip(shown, before, answer(model, shown, temperature=0)):
        print(f"\n{data.turns_up_to(question)[-1][1]}\n  before: {old}\n  after:  {new}")
    print(f"\nwrote {path}; next: python", f"model.py {path}" if args.data else "reward.py")

if __name__ == "__main__":
    main()
