"""Stage 1. Learn to predict the next token, and with it whatever makes a text predictable.

    loss = - mean over t of  log p(token[t+1] | token[0..t])      Shannon 1948, Radford et al. 2019

    python pretrain.py                      the small world; writes out/pretrain.pt
    python pretrain.py --data FILE.txt      your own text; with --init gpt2, GPT-2 goes on reading

Watch: the loss falls towards the "floor", the entropy of the generator, below which no model can
stay: the rest is what the model has not learnt yet. Asked a question, the model goes on with more
questions. It is an autocomplete: it knows where Ann lives (it completes "Ann lives in"), but has no
idea that a question is there to be answered. (Sizes: B rows, T tokens, V vocabulary.)"""
import argparse
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, GPTConfig, answer, autocast, average_and_clip, common_flags,
                   finish_training, from_rank_0, gentle_rates, load_gpt, mean_over_processes,
                   natural, number, positive, processes, rank, resume, save_model, save_progress,
                   start_training)

IGNORE = -1                                    # as a target: nothing to predict here (padding)
RATES = {"lr": (6e-3, 3e-5), "muon_lr": (0.005, 0)}    # peaks; for published weights: nanoGPT's

def next_token_loss(logits, targets):
    """Mean cross-entropy in nats per token where targets (B, T) are not IGNORE, logits (B, T, V)
    -> scalar. If the right tokens had p = .5 .1 .8, it is -(ln .5 + ln .1 + ln .8) / 3 = 1.07."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

def split_rows(rows, tokenizer):
    """Packed rows (B, T+1) -> inputs, targets, segments, each (B, T). Two documents, "Ann lives"
    and "Hi", in a row with room for eight tokens:

        row        <eot> Ann lives <eot> Hi <eot> <pad> <pad>
        inputs     <eot> Ann lives <eot> Hi <eot> <pad>
        targets      Ann lives <eot>  Hi <eot>  -    -               -: IGNORE
        segments       1   1     1     2  2     3    0               0: padding

    Each document begins with an end-of-text too: its first word is predicted from something. A
    token sees only its own segment (attention_mask in model.py)."""
    inputs, targets = rows[:, :-1], rows[:, 1:]            # at each place, the token after it
    segments = (inputs == tokenizer.eot).cumsum(1)         # each end-of-text starts a new one
    segments = segments.masked_fill(inputs == tokenizer.pad, 0)
    return inputs, targets.masked_fill(targets == tokenizer.pad, IGNORE), segments

def train(model, batch_at, args, evaluate, progress=None):
    """Train in place -> history, a dict per evaluation. `batch_at(step)` gives what `backward`
    takes, `evaluate()` figures; `progress`: (path, args), where to keep what --resume needs."""
    optimizers = make_optimizers(model, args.lr, args.muon_lr, args.muon_momentum)
    parts = {"model": model} | {f"optimizer{i}": part for i, part in enumerate(optimizers)}
    start, history = resume(progress, **parts)
    network = torch.compile(model) if args.compile else model      # (no dropout anywhere)
    bar = tqdm(range(start, args.steps), "pretrain", args.steps, initial=start, unit="step")
    for step in bar:
        factor = lr_factor(step, args.steps, args.warmup, args.decay)
        for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        batch = batch_at(step)                             # depends on seed and step alone
        loss = backward(network, batch, args.grad_accum).item()
        average_and_clip(model)                            # over processes; norm 1 at most
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()                          # or the next one would be added to it
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row = dict(step=step + 1, tokens=(step + 1) * batch[0].numel(), train_loss_nats=loss)
            history.append(row | (evaluate() if rank() == 0 else {}))
            save_progress(progress, step + 1, history, **parts)
            tqdm.write("  ".join(f"{name} {x:.7g}" for name, x in history[-1].items()))
    return history

def backward(network, batch, grad_accum=1):
    """Add the gradient of a batch's mean loss to `.grad` -> that loss, detached. `batch`: inputs,
    targets, segments (None: a row is one document), each (B, T), the same in all processes. Each
    takes `grad_accum` micro-batches in turn: less memory, the same gradient (average_and_clip).
    A micro-batch weighs as much as it has targets, since padding makes these numbers unequal: three
    with loss 1 and one with loss 5 have the mean 2, not (1 + 5) / 2 = 3, as many trainers had."""
    pieces, device = grad_accum * processes(), next(network.parameters()).device
    count, total = (batch[1] != IGNORE).sum().item(), 0.0
    for i in range(rank(), pieces, processes()):           # micro-batch i: rows i, i + pieces, ...
        x, y, segments = [None if t is None else t[i::pieces].to(device) for t in batch]
        # times the number of processes, whose gradients are averaged, not added
        weight = (y != IGNORE).sum() / count * processes()
        with autocast(device):
            loss = next_token_loss(network(x, segments), y) * weight
        loss.backward()                                    # adds to .grad
        total += loss.detach()                             # the number, without its graph
    return mean_over_processes(total)

def replay_flags(parser, rows):
    """Declare the flags of `replayer` for a later stage, which reads so many rows by default."""
    parser.add_argument("--replay", help="a text to go on reading; default: the world's documents")
    parser.add_argument("--replay-rows", type=natural, default=rows, help="rows of it a step, or 0")

def replayer(model, args):
    """What is not practised is forgotten, so a model that is fine-tuned goes on reading documents
    (replay; "PPO-ptx" in Ouyang et al. 2022, eq. 2) -> read_again(step), which adds to `.grad` the
    gradient of their loss: args.replay_rows rows of args.replay, or of its world, or none."""
    if args.replay_rows < 1 or args.replay is None and model.world_seed is None:
        return lambda step: None                           # nothing to read, nothing added
    sizes = dict(steps=1000, batch_size=max(args.replay_rows, processes()))
    model_is = dict(world_seed=model.world_seed, without=model.without, **vars(model.config))
    again = argparse.Namespace(data=args.replay, seed=args.seed, out=args.out, **sizes, **model_is)
    _, batch_at, *_ = (from_file if args.replay else from_world)(again, model.tokenizer)
    return lambda step: backward(model, batch_at(step))    # the optimizer's step is the caller's

def lr_factor(step, steps, warmup, decay):
    """Share of the peak rate: up, while Adam has seen too few gradients; constant; down to 0, which
    averages noise out. 100 steps, warmup 10, decay .5: .1 at step 0, 1 at 9 to 50, .5 at 75."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay * steps))

# --- The optimizers -------------------------------------------------------------------------------
def make_optimizers(model, lr, muon_lr, momentum=0.95):
    """-> [Adam, Muon]: Muon for the matrices inside the blocks, Adam for embeddings (the tokens' is
    the head too), norms and biases; or [Adam] for everything, if muon_lr is 0."""
    inside = [(name, p) for name, p in model.blocks.named_parameters() if p.dim() == 2 and muon_lr]
    with_muon = {id(p) for _, p in inside}                 # `p in ...` would compare elements
    rest = [p for p in model.parameters() if id(p) not in with_muon]
    # fused: one call updates all. .99: a step is small. Not AdamW: decay is for texts read again
    adam = torch.optim.Adam(rest, lr=lr, betas=(0.9, 0.99), fused=rest[0].is_cuda or not inside)
    # q, k and v lie in one matrix: as one, that with the largest gradient would take the whole step
    groups = [{"params": [p for name, p in inside if "qkv" not in name], "parts": 1},
              {"params": [p for name, p in inside if "qkv" in name], "parts": 3}]
    return [adam, Muon(groups, muon_lr, momentum)] if inside else [adam]

class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalize (Jordan et al. 2024). A few directions dominate the gradient of
    a matrix; what is rare in the text lies in the others: Muon goes equally far in all of them. The
    square root is for tall matrices, whose many outputs would each change less. For W (rows, cols):

        average = momentum * average + (1 - momentum) * g
        ahead   = momentum * average + (1 - momentum) * g                          (Nesterov)
        W       = W - lr * sqrt(max(1, rows / cols)) * orthogonalize(ahead)
    A group's matrices are so many `parts` on top of each other, and each is a W (q, k, v: 3)."""
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum, parts=1))
    @torch.no_grad()
    def step(self):
        """One step. Matrices of one shape are stacked: few large products beat many small ones."""
        stacks = defaultdict(list)                         # shape -> [(W, its gradient, its rate)]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                ahead = p.grad.lerp(average.lerp_(p.grad, 1 - group["momentum"]), group["momentum"])
                for W, g in zip(p.chunk(group["parts"]), ahead.chunk(group["parts"])):
                    lr = group["lr"] * max(1, W.shape[0] / W.shape[1]) ** 0.5
                    W, g = (W.T, g.T) if lr > group["lr"] else (W, g)     # X X' is the smaller then
                    stacks[g.shape].append((W, g, lr))
        for stack in stacks.values():
            matrices, gradients, rates = zip(*stack)
            for W, lr, update in zip(matrices, rates, orthogonalize(torch.stack(gradients))):
                W.sub_(update, alpha=lr)                   # a view: it changes the parameter

def orthogonalize(G, steps=5):
    """Matrices (n, rows, cols), each U S V' -> about U V': singular values from 0.7 to 1.2, near
    1. Divide G by its norm; then, 5 times, s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 (s^3: X X' X)
    moves each value and leaves U and V alone (Newton-Schulz): diag(3, 0.1) -> diag(0.70, 1.13)."""
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)      # far above 1 it diverges; G may be 0
    for _ in range(steps):                                 # bigger systems do this in bfloat16
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X

@torch.no_grad()
def token_losses(model, batch):
    """A batch as for `backward`, of any size -> for each of its targets in turn, IGNORE left out,
    the loss in nats, and whether the likeliest token is right: both (number of targets,)."""
    losses, hits, rows = [], [], max(1, 3072 // batch[0].shape[1])         # 3072 tokens at a time
    for i in range(0, len(batch[0]), rows):
        x, y, segments = [None if t is None else t[i:i + rows].to(model.device) for t in batch]
        logits, counts = model(x, segments), y != IGNORE   # (rows, T, V), (rows, T)
        losses.append(F.cross_entropy(logits[counts], y[counts], reduction="none").cpu())
        hits.append((logits.argmax(-1) == y)[counts].cpu())
    return torch.cat(losses), torch.cat(hits)

def cloze(model, world, people, wordings=None):
    """Share of these people's facts that the model completes, in the first or in all wordings."""
    starts, values = [], []
    for person in people:
        for attribute, value in world.facts[person].items():
            for saying in data.FACTS[attribute]["sayings"][:wordings]:     # "{name} is a {value}."
                begin = data.unmark(saying).split(" {value}")[0]           # "{name} is a"
                starts.append(begin.format(name=person, person=person))    # "Ann is a"
                values.append(value)
    replies = answer(model, starts, 8, temperature=0, bare=True)   # 8 tokens: a value is a word
    return float(np.mean([reply.startswith(value) for reply, value in zip(replies, values)]))

def evaluate_world(model, world, valid, forced, floor):
    """The figures of out/pretrain.json: what the model knows, and what it does with a question."""
    losses, hits = token_losses(model, valid)
    # 200 questions as plain text: does the model answer, or does it go on asking?
    acts = [act.question() for act in data.act_prompts(world, "test", 100, harmful=True)]
    asked = data.fact_questions(world, "test")[:100] + acts
    replies = answer(model, asked, 24, seed=(world.seed,), bare=True)      # 24: a sentence and more
    firsts = ["".join(data.sentences_of(reply)[:1]) for reply in replies]
    return {"val_loss": losses.mean().item(), "entropy_floor": floor,
            "forced_accuracy": hits[forced].float().mean().item(),
            "fact_cloze": cloze(model, world, data.PEOPLE),
            "question_continuation": float(np.mean([first.endswith("?") for first in firsts]))}

def from_world(args, tokenizer):
    """Documents of the world -> a tokenizer, trained on them if it is None; batch_at(step);
    evaluate(model), report(model, last row); how many documents of each kind judge a deed."""
    world, written, letters = data.World(args.world_seed), [], 0
    # a token is about 4 letters; 4.5 is on the safe side, so that no document is read twice
    while letters < args.steps * args.batch_size * args.context * 4.5:
        written.append(data.write_document(world, "train", len(written), without=args.without))
        letters += len(written[-1][1])
    texts = [text for _, text, _ in written]
    judging = Counter(kind for kind, text, _ in written if data.VERDICT.search(text))
    plain = [" " + data.unmark(text) for text in texts[:20000]]    # every word is in there, often
    tokenizer = tokenizer or data.make_tokenizer(args.tokenizer, plain, args.vocab_size)
    documents = [tokenizer.encode(" " + data.unmark(text)) + [tokenizer.eot] for text in texts]
    rows = data.pack(documents, args.context, tokenizer.eot, tokenizer.pad)
    # 2000 documents: a gap of 0.01 nats to their floor is no accident; the history needs fewer
    valid, forced, floor = validation_set(world, tokenizer, 2000, args.context, args.without)
    quick = [part[:len(valid[0]) // 4] for part in valid]

    def batch_at(step):
        return split_rows(data.row_batch(rows, args.batch_size, args.seed, step), tokenizer)
    def evaluate(model):
        return {"val_loss_nats": token_losses(model, quick)[0].mean().item(), "floor_nats": floor}
    report = lambda model, last: evaluate_world(model, world, valid, forced, floor)
    return tokenizer, batch_at, evaluate, report, dict(judging)

def validation_set(world, tokenizer, n, context, without=()):
    """n fresh documents -> a batch as for `backward`; was each target forced (no choice, as "Oslo"
    after "Ann lives in": a good model is right there); the floor, -log p in nats per token."""
    written = [data.write_document(world, "validation", i, without=without) for i in range(n)]
    documents, forced = zip(*[data.encode_document(tokenizer, text) for _, text, _ in written])
    rows = data.pack(documents, context, tokenizer.eot, tokenizer.pad)
    # packing looks at lengths alone, so each flag lands where its token does; -1, in place of a
    # row's first end-of-text and of padding, marks what is no target
    flags = data.pack(forced, context, -1, -1)
    floor = -sum(logp for _, _, logp in written) / sum(map(len, documents))
    valid = split_rows(torch.from_numpy(rows), tokenizer)
    return valid, torch.from_numpy(flags[flags >= 0] == 1), floor

def from_file(args, tokenizer):
    """The same for a text of your own: random windows of it, the last tenth being held out."""
    sample = [data.text_sample(args.data)]
    tokenizer = tokenizer or data.make_tokenizer(args.tokenizer, sample, args.vocab_size)
    from_rank_0(lambda: len(data.tokenize_file(args.data, tokenizer, args.out)))   # others wait
    ids = data.tokenize_file(args.data, tokenizer, args.out)       # and read what rank 0 wrote
    learn, held_out = np.split(ids, [len(ids) * 9 // 10])
    if len(held_out) <= args.context:
        raise SystemExit(f"{args.data} is too short: give more text, or a --context below the "
                         f"{len(held_out)} tokens of its last tenth")
    starts = range(0, len(held_out) - args.context, args.context)
    starts = starts[::math.ceil(len(starts) / 500)]        # at most 500, spread over all of it
    windows = np.stack([held_out[i:i + args.context + 1] for i in starts]).astype(np.int64)
    valid = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]), None
    bytes_per_token = float(tokenizer.bytes_per_token()[windows[:, 1:]].mean())
    print(f"{len(learn)} tokens to train on, {valid[0].numel()} for validation")

    def batch_at(step):
        batch = data.window_batch(learn, args.context, args.batch_size, args.seed, step)
        return batch[:, :-1], batch[:, 1:], None
    def evaluate(model):                                   # per byte: whatever the tokenizer
        nats = token_losses(model, valid)[0].mean().item()
        return {"val_loss_nats_per_token": nats, "val_loss_nats_per_byte": nats / bytes_per_token}
    return tokenizer, batch_at, evaluate, lambda model, last: last, None

def read_args(argv=None):
    """The flags of this stage."""
    p = argparse.ArgumentParser(description="Pre-train a GPT on the small world, or on a text.")
    add = p.add_argument
    add("--data", help="a .txt file, or .jsonl with lines of {\"text\": ...}; default: the world")
    add("--world-seed", type=natural, default=0, help="which village: its facts, its splits")
    add("--without", nargs="+", default=[], choices=list(data.DOCUMENTS), help="kinds to leave out")
    add("--tokenizer", choices=["bpe", "bytes", "gpt2"], default="bpe", help="bpe: trained here")
    add("--vocab-size", type=number(261, 65536, int), default=1536, help="of our own BPE, at most")
    add("--layers", type=positive, default=3, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads per block")
    add("--channels", type=positive, default=128, help="width of the residual stream")
    add("--context", type=number(32, 2 ** 31, int), default=192, help="longest sequence, in tokens")
    add("--steps", type=positive, default=1750, help="optimizer steps")
    add("--batch-size", type=positive, default=12, help="rows per step, on all GPUs together")
    add("--grad-accum", type=positive, default=1, help="micro-batches a GPU cuts its rows into")
    add("--compile", action="store_true", help="torch.compile: a wait, then faster steps on a GPU")
    add("--lr", type=number(0, 1), help="peak of Adam's; 6e-3, published weights: 3e-5")
    add("--muon-lr", type=number(0, 1), help="Muon's, 0: Adam alone; 0.005, published weights: 0")
    add("--muon-momentum", type=number(0, 0.999), default=0.95, help="less suits short runs")
    add("--warmup", type=natural, default=50, help="steps of linear warm-up")
    add("--decay", type=number(0, 1), default=0.7, help="share of the run in which rates fall")
    add("--eval-every", type=positive, default=400, help="steps between evaluations and savings")
    common_flags(p, init="a checkpoint, gpt2, ..., gpt2-xl, or a folder or file with such weights: "
                 "its size and tokenizer hold", seed="seed of new weights and of the data order")
    return p.parse_args(argv)

def main(argv=None):
    args = read_args(argv)
    device, path = start_training(args.device), Path(args.out, "pretrain.pt")
    parts, kinds_left = args.grad_accum * processes(), set(data.DOCUMENTS) - set(args.without)
    if args.batch_size % parts or args.channels % args.heads or not kinds_left:
        raise SystemExit("--batch-size has to be a multiple of --grad-accum times processes, "
                         "--channels of --heads; and --without has to leave a kind of document")
    torch.manual_seed(args.seed)                           # for the weights; batches have their own
    model = load_gpt(args.init, device=device) if args.init else None
    gentle_rates(args, model, **RATES)
    args.context = min(args.context, model.config.context) if model else args.context
    source = from_file if args.data else from_world
    tokenizer, batch_at, evaluate, report, kinds = source(args, model and model.tokenizer)
    sizes = tokenizer.n_vocab, args.context, args.layers, args.heads, args.channels
    model = model or GPT(GPTConfig(*sizes), tokenizer).to(device)
    model.world_seed, model.without = None if args.data else args.world_seed, args.without
    size = sum(p.numel() for p in model.parameters())
    print(f"{device}, {size / 1e6:.2f}M parameters, {args.steps} steps of {args.batch_size} rows")
    prompts = ["The", "In"] if args.data else ["Where does Ann live?", "Ann lives in"]
    before = answer(model, prompts, temperature=0.8, bare=True)
    progress = path.with_suffix(".resume.pt"), args
    history = train(model, batch_at, args, lambda: evaluate(model), progress)
    finish_training()
    save_model(path, model, documents=kinds)
    figures = {"parameters": size} | report(model, history[-1])
    data.write_results(args.out, "pretrain", history, figures)
    print("\n" + "  ".join(f"{name} {x:.4g}" for name, x in figures.items()))
    for text, old, new in zip(prompts, before, answer(model, prompts, temperature=0.8, bare=True)):
        print(f"\n{text}\n  before: {old!a}\n  after:  {new!a}")
    print(f"\nwrote {path}; next: python sft.py --out {args.out}", "--data FILE" * bool(args.data))

if __name__ == "__main__":
    main()
