"""Stage 2. Show the base model a few thousand conversations, and it behaves like an assistant.

    loss = - mean over the assistant's tokens of  log p(token | everything before it)

This is the loss of pre-training with a mask (Ouyang et al. 2022, section 3.5): the user's words are
read, but never imitated. End-of-text counts as one of the assistant's tokens, and that is how the
model learns to stop. The network is the same, and so is the loop, but for words that are frozen.

    python sft.py [--data FILE]     writes out/sft.pt; FILE: see read_conversations in data.py

Watch: no demonstration tells facts about a third of the people, yet the model answers for them as
well as the base model completed sentences about them. Fine-tuning adds the form of an answer; the
knowledge was there already. Every demonstration does what the user asks, and so does the model,
even when asked "How do I kick Tom?". (Sizes: B conversations, T tokens, V vocabulary.)"""
import argparse
import random
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import (MAX_NEW, answer, autocast, average_and_clip, common_flags, finish_training,
                   from_rank_0, generate, gentle_rates, load_gpt, mean_over_processes, my_share,
                   number, positive, resume, save_model, save_progress, start_training)
from pretrain import IGNORE, cloze, next_token_loss, replay_flags, replayer

def masked_loss(logits, tokens, mask):
    """Mean cross-entropy in nats over all tokens with mask 1: logits (B, T, V), tokens (B, T), mask
    (B, T) -> scalar. logits[:, t] predicts tokens[:, t+1], so the mask moves along:

        tokens       <user>  Where     ?    <assistant>  Oslo    .    <eot>  <pad>
        mask            0      0       0         0         1     1      1      0
        targets      Where     ?  <assistant>  Oslo        .   <eot>  <pad>
        mask moved      0      0       0         1         1     1      0

    If the three that count had p = .5 .8 .4, it is -(ln .5 + ln .8 + ln .4) / 3 = 0.61."""
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE)
    # not a mean of the answers' means, in which the tokens of short answers would weigh more
    return next_token_loss(logits[:, :-1], targets)

def colour_mask(tokenizer, question, reply):
    """One conversation, the tokens that the loss counts in green and all others in grey."""
    shown, tokens = "", zip(*data.chat_example(tokenizer, question, reply))    # (id, mask) pairs
    for counts, run in groupby(tokens, key=lambda token: token[1]):
        # a run is decoded as a whole, since one token may be half a letter; 32: green, 90: grey
        shown += f"\033[{32 if counts else 90}m" + tokenizer.decode([i for i, _ in run])
    return shown + "\033[0m"

def freeze_words(model):
    """From here on the embeddings of all words of a GPT or ScalarModel get a gradient of 0 (and the
    tied head's rows with them): only the last rows of the table learn, end-of-text, the roles.

    The demonstrations tell facts about some people. If the embeddings of these moved, the model
    would learn by heart what to say about each; while they are fixed, it has to use what it knows
    of any name. reward.py does the same; in ppo.py, the KL penalty does this work."""
    table, first = getattr(model, "gpt", model).tokens.weight, model.tokenizer.eot
    # by a hook on the gradient: requires_grad=False would freeze the chat roles as well
    table.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:first]), grad[first:]]))

def train(model, conversations, args, progress=None):
    """Fine-tune in place on (question, answer) pairs, in an order drawn from args.seed -> history,
    a list of dicts. A question is a string, or a dialogue that ends with one: a list of (role,
    text). `args`: see read_args; `progress`: (path, args), what --resume needs, or None."""
    pad, device = model.tokenizer.pad, model.device
    examples = [data.chat_example(model.tokenizer, *pair) for pair in conversations]   # ids, mask
    # what does not fit is left out: cut off, it would teach the model not to stop
    examples = [(ids, mask) for ids, mask in examples if len(ids) <= model.config.context]
    batches, lengths = [], [len(ids) for ids, _ in examples]
    for epoch in range(args.epochs):                       # indices, similar lengths together
        batches += data.length_batches(lengths, args.batch_size, args.seed, epoch)
    freeze_words(model)
    # Adam, not AdamW: weight decay would pull all weights away from what pre-training has found
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    start, history = resume(progress, model=model, optimizer=optimizer)
    read_again = replayer(model, args)                     # of the documents, to forget nothing
    bar = tqdm(range(start, len(batches)), "sft", len(batches), initial=start, unit="step")
    for step in bar:
        # small steps at first, while Adam has seen few gradients, and at the end, to settle
        warm_up, decay = min(1.0, (step + 1) / 20), 1 - step / len(batches)
        optimizer.param_groups[0]["lr"] = args.lr * warm_up * decay
        # with one process, `mine` is the whole batch and `weight` is 1
        mine, weight = my_share(batches[step], lambda i: sum(examples[i][1]))
        tokens = data.pad_rows([examples[i][0] for i in mine], pad).to(device)     # (B, T)
        mask = data.pad_rows([examples[i][1] for i in mine], 0).to(device)         # (B, T)
        optimizer.zero_grad()                              # or the last step's would be added
        with autocast(device):                             # -> (B, T, V); padding is segment 0
            logits = model(tokens, (tokens != pad).long())     # no dropout anywhere, so no .train()
            loss = masked_loss(logits, tokens, mask) * weight
        loss.backward()
        read_again(step)                                   # adds the gradient of some documents
        average_and_clip(model)                            # over processes; norm 1 at most
        optimizer.step()
        if step % 50 == 49 or step + 1 == len(batches):
            history.append({"step": step + 1, "train_loss_nats": mean_over_processes(loss).item()})
            bar.set_postfix(loss=f"{history[-1]['train_loss_nats']:.3f}")
            save_progress(progress, step + 1, history, model=model, optimizer=optimizer)
    return history

def judge_answers(model, world, questions, meant, temperature):
    """Answer all questions -> is each answer correct (the gold judge); did it end by itself. A
    dialogue's last question leans on the others: it is judged by `meant`, the same in full."""
    prompts = [data.chat_prompt(model.tokenizer, question) for question in questions]
    replies = generate(model, prompts, MAX_NEW, temperature, seed=(0, 1))      # lists of ids
    texts = [data.decode_reply(model.tokenizer, ids) for ids in replies]
    correct = [data.is_correct(world, *pair) for pair in zip(meant, texts)]
    return correct, [ids[-1] == model.tokenizer.eot for ids in replies]    # not cut off at MAX_NEW

def evaluate_world(model, world, facts, howto):
    """The figures of out/sft.json: the share of correct answers to questions about people, and to
    requests for acts, that are in no demonstration; the share of answers that end by themselves."""
    figures, all_ended = {}, []
    asked = {"fact_accuracy_undemonstrated": facts, "howto_accuracy_heldout": howto}
    for name, questions in asked.items():
        # at 0, always the likeliest token, it shows what it knows; at 1 it errs where it is unsure
        correct, ended = judge_answers(model, world, questions, questions, temperature=0)
        sampled, _ = judge_answers(model, world, questions, questions, temperature=1)
        figures |= {name: float(np.mean(correct)), f"{name}_t1": float(np.mean(sampled))}
        all_ended += ended
    dialogues, meant, dice = [], [], data.Dice("second turns")     # ending with "And Tom?"
    for question in facts[:100] + howto[:100]:
        asked, full = data.follow_up(world, dice, question, "test")
        dialogues.append([("user", question), ("assistant", world.answer(question)[1]),
                          ("user", asked)])
        meant.append(full)
    correct, _ = judge_answers(model, world, dialogues, meant, temperature=0)
    figures["second_turn_accuracy"] = float(np.mean(correct))
    return figures | {"stops": float(np.mean(all_ended))}

def from_world(args, model):
    """The world's demonstrations -> (question, answer) pairs; questions to show; the figures before
    training; evaluate(), the figures after it: on people and acts that are in no demonstration."""
    world = data.world_of(model)
    conversations = data.demonstrations(world, args.demonstrations)
    print(f"{len(conversations)} conversations.\n{colour_mask(model.tokenizer, *conversations[1])}")
    people = world.people["train"] + world.people["test"]  # no demonstration tells their facts
    facts = data.fact_questions(world, "train") + data.fact_questions(world, "test")
    howto = []
    for harmful in (True, False):
        # half of them with verbs that no critique names: a question of stage 5, but known by now
        for cells in (("g2r", "g2", "strict"), ("g1",)):
            acts = data.act_prompts(world, "test", 84, harmful, cells)     # 12 of each kind
            howto += [act.question() for act in acts]
    before = {"fact_cloze_base": cloze(model, world, people, 1)}
    return (conversations, [facts[0], howto[0], howto[-1]], before,
            lambda: evaluate_world(model, world, facts, howto))

def from_files(args, model):
    """The same for conversations of your own; the figure is the loss on a tenth, held out."""
    (read, skipped), context = data.read_conversations(args.data), model.config.context
    pairs = [(turns[:-1], turns[-1][1]) for turns in read]     # a dialogue and its last answer
    fit = [pair for pair in pairs if len(data.chat_example(model.tokenizer, *pair)[0]) <= context]
    skipped[f"longer than the context of {context} tokens"] = len(pairs) - len(fit)
    asked, why = sorted({str(question[0]) for question, _ in fit}), data.reasons(skipped)
    if len(asked) < 2:
        raise SystemExit(f"{args.data}: at least 2 different questions are needed; skipped: {why}")
    held = set(random.Random(f"held out {args.seed}").sample(asked, len(asked[:2000]) // 10 or 1))
    learn = [pair for pair in fit if str(pair[0][0]) not in held]  # one question, one side
    test = [pair for pair in fit if str(pair[0][0]) in held]  # 200 questions give a steady mean
    print(f"{len(fit)} conversations; skipped: {why}. {len(test)} held-out conversations, "
          f"{len(held)} different.\n{colour_mask(model.tokenizer, *fit[0])}")
    loss = lambda: heldout_loss(model, test)
    before = {"conversations": len(learn), "heldout_loss_nats_before": from_rank_0(loss)}
    return learn, [q for q, _ in test[:3]], before, lambda: {"heldout_loss_nats": loss()}

@torch.no_grad()
def heldout_loss(model, pairs):
    """Mean loss in nats over all of the assistant's tokens of (question, answer) pairs."""
    nats, examples = 0.0, [data.chat_example(model.tokenizer, *pair) for pair in pairs]
    for example in examples:                               # one at a time, so without any padding
        tokens, mask = torch.tensor(example, device=model.device).split(1)         # each (1, T)
        nats += masked_loss(model(tokens), tokens, mask).item() * mask.sum().item()
    return nats / sum(sum(mask) for _, mask in examples)

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="Fine-tune the base model on conversations.")
    p.add_argument("--data", help="your own conversations, JSON list or lines; default: a world's")
    p.add_argument("--demonstrations", type=positive, default=6000, help="half facts, half how-to")
    p.add_argument("--epochs", type=positive, default=3, help="times each conversation is read")
    p.add_argument("--batch-size", type=positive, default=32, help="examples per step, on all GPUs")
    p.add_argument("--lr", type=number(0, 1), help="peak; default: 6e-4, of published weights 3e-5")
    replay_flags(p, rows=1)
    common_flags(p, init="the base model: a checkpoint, or gpt2, ... as for pretrain.py; default: "
                 "OUT/pretrain.pt", seed="seed of data order and held-out part, not of samples")
    return p.parse_args(argv)

def main(argv=None):
    args = read_args(argv)
    device, path = start_training(args.device), Path(args.out, "sft.pt")
    model = load_gpt(args.init or path.with_name("pretrain.pt"), "pretrain.py", device)
    gentle_rates(args, model, lr=(6e-4, 3e-5))             # more: answers are learnt by heart
    print(f"{device}. The loss counts the green tokens of")
    conversations, shown, figures, evaluate = (from_files if args.data else from_world)(args, model)
    before = answer(model, shown, temperature=0)
    history = train(model, conversations, args, progress=(path.with_suffix(".resume.pt"), args))
    finish_training()                                      # rank 0 alone goes on
    save_model(path, model)
    figures |= evaluate()
    data.write_results(args.out, "sft", history, figures)
    print("\n" + "  ".join(f"{name} {x:.4g}" for name, x in figures.items()))
    for question, old, new in zip(shown, before, answer(model, shown, temperature=0)):
        print(f"\n{data.turns_up_to(question)[-1][1]}\n  before: {old}\n  after:  {new}")
    then = f"model.py {path}" if args.data else f"reward.py --out {args.out}"
    print(f"\nwrote {path}; next: python {then}")

if __name__ == "__main__":
    main()
