"""Stage 1. Learn to predict the next token of a text, and with it whatever makes the text predictable.

    loss = - mean over t of  log p(token[t+1] | token[0..t])          # the chain rule; Shannon 1948, Radford et al. 2019

    python pretrain.py                              the small world; writes out/pretrain.pt
    python pretrain.py --data FILE.txt              your own text, of any size; with --init gpt2, GPT-2 goes on reading it
    torchrun --nproc-per-node 8 pretrain.py ...     on eight GPUs

Watch: the loss falls towards the "floor", the entropy of the generator, which no model can cross: what is left above it is
what the model has not learnt yet. Asked a question, the model goes on with more questions. It is an autocomplete: it knows
where Ann lives (the cloze shows it), but has no idea that a question is there to be answered.
"""
import argparse
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, GPTConfig, autocast, finish_training, forget_progress, from_rank_0, generate, load_gpt, load_progress, mean_over_processes,
                   parallel, positive, processes, rank, save, save_progress, start_training, write_results)


IGNORE = -1                                                       # as a target: this position (padding) does not count


def next_token_loss(logits, targets):                            # (B, T, V), (B, T) -> scalar
    """Mean cross-entropy in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def split_rows(rows, tokenizer):
    """Packed rows (B, T+1) -> inputs, targets and segments, each (B, T): documents do not see one another."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    segments = (inputs == tokenizer.eot).cumsum(1)                # each end-of-text starts the next document
    return inputs, targets.masked_fill(targets == tokenizer.pad, IGNORE), segments.masked_fill(inputs == tokenizer.pad, 0)


# ------------------------------------------------------------------------------------------------------------------
# The optimizer

def orthogonalize(G, steps=5):
    """The nearest matrix with all singular values near 1, for a stack (n, rows, cols): U S V' becomes about U V'.

    A Newton-Schulz iteration whose quintic pushes every singular value towards 1 (Jordan et al. 2024, Muon).
    """
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)             # no singular value above 1, or the iteration would not converge
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[1] > G.shape[2] else X


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalize: every direction of a weight matrix moves by the same amount, also those with small gradients.

    Jordan et al. 2024. In float32, since a CPU may be slow in bfloat16. Equal shapes are stacked and done at once; q, k
    and v, which share one tensor, are three matrices.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One step on all matrices."""
        for group in self.param_groups:
            stacks = defaultdict(list)                            # shape -> [(parameter as (n, rows, cols), its update)]
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])   # Nesterov: look one step ahead
                n = 3 if p.shape[0] == 3 * p.shape[1] else 1
                stacks[p.shape[0] // n, p.shape[1]].append((p.view(n, -1, p.shape[1]), update.view(n, -1, p.shape[1])))
            for (rows, cols), pairs in stacks.items():
                updates = orthogonalize(torch.cat([u for _, u in pairs])) * max(1, rows / cols) ** 0.5
                for (p, _), u in zip(pairs, updates.split([len(p) for p, _ in pairs])):
                    p.sub_(u, alpha=group["lr"])


def make_optimizers(model, lr, muon_lr, momentum=0.95):
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases; AdamW for all if muon_lr is 0."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if muon_lr else []
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    # fused (all tensors in one pass) pays on a GPU, and on a CPU where AdamW has all the weights
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda or not matrices or None)
    return [adamw, Muon(matrices, muon_lr, momentum)] if matrices else [adamw]


def lr_factor(step, steps, warmup, decay):
    """Learning rate as a share of its peak: linear warm-up, constant, then linear decay to 0 over the last `decay` of the run."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay * steps))


def backward(network, batch, device, grad_accum=1):
    """Leave in `.grad` the gradient of the mean loss over a batch's targets, and return that loss. `batch`: (inputs, targets, segments or
    None), each (B, T).

    All processes are given the same batch. It is cut into micro-batches, `grad_accum` for each process, so that less memory is needed at a
    time. Rows have more or less padding, so a micro-batch's mean counts by its share of the targets: the gradient is the same, however the
    batch is cut.
    """
    parts, targets, total = grad_accum * processes(), (batch[1] != IGNORE).sum().item(), 0.0
    for i in range(rank(), parts, processes()):
        x, y, segments = (t[i::parts] if t is not None else None for t in batch)
        weight = (y != IGNORE).sum().item() / targets * processes()          # parallel() takes the mean over processes, and the sum is meant
        x, y, segments = (t.to(device) if t is not None else None for t in (x, y, segments))
        network.require_backward_grad_sync = i + processes() >= parts        # DistributedDataParallel: average once, with the last micro-batch
        with autocast(device):
            loss = next_token_loss(network(x, segments), y) * weight
        loss.backward()
        total += loss.detach()
    return mean_over_processes(total)


def train(model, batch_at, steps, args, evaluate, progress):
    """`batch_at(step)` -> (inputs, targets, segments). `evaluate()` -> dict of figures. Returns (history, tokens per second)."""
    device = model.tokens.weight.device
    optimizers = make_optimizers(model, args.lr, args.muon_lr, args.muon_momentum)
    parts = {"model": model, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "device", "out", "compile", "grad_accum")}
    start, history = load_progress(progress, settings, **parts) if args.resume else (0, [])
    if args.resume and len(history[-1]) == 3 and rank() == 0:     # saved before its evaluation: three columns are there, the figures are not
        history[-1] |= evaluate()
    network = parallel(torch.compile(model) if args.compile else model)
    bar, trained, seconds = tqdm(range(start, steps), initial=start, total=steps, unit="step", desc="pretrain"), 0, 0.0
    for step in bar:
        began = time.perf_counter()
        for optimizer, peak in zip(optimizers, (args.lr, args.muon_lr)):
            optimizer.param_groups[0]["lr"] = peak * lr_factor(step, steps, args.warmup, args.decay)
        batch = batch_at(step)
        loss = backward(network, batch, device, args.grad_accum)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)   # one odd batch must not throw the weights far
        for optimizer in optimizers:
            optimizer.step()                                      # every process takes the same step, Muon's included
            optimizer.zero_grad()
        loss = loss.item()                                        # waits for the device, or the clock would measure how fast work is handed to it
        trained, seconds = trained + batch[0].numel(), seconds + time.perf_counter() - began
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{trained / seconds:.0f}")
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            history.append({"step": step + 1, "tokens": (step + 1) * batch[0].numel(), "train_loss_nats": loss})
            save_progress(progress, step + 1, settings, history, **parts)     # before the evaluation: nothing is lost if that fails
            history[-1] |= evaluate() if rank() == 0 else {}
            tqdm.write("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in history[-1].items()))
    return history, trained / max(seconds, 1e-9)


# ------------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def token_losses(model, rows, tokenizer, batch_size=16):
    """Packed rows (N, T+1) -> loss in nats and whether the likeliest token is right, each (N, T); 0 at padding."""
    losses, hits = [], []
    for batch in rows.split(batch_size):
        inputs, targets, segments = (x.to(model.tokens.weight.device) for x in split_rows(batch, tokenizer))
        logits = model(inputs, segments)
        losses.append(F.cross_entropy(logits.mT, targets, ignore_index=IGNORE, reduction="none").cpu())
        hits.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(losses), torch.cat(hits)


def mean_loss(losses, rows, tokenizer):
    """Mean of `token_losses` in nats a token."""
    return (losses.sum() / (rows[:, 1:] != tokenizer.pad).sum()).item()


def validation_windows(ids, context, at_most=500):
    """A long text (N,) -> windows of context + 1 tokens, end to end, or `at_most` of them at equal distances: (windows, context + 1)."""
    starts = range(0, len(ids) - context, context)
    starts = starts[::math.ceil(len(starts) / at_most)]
    return torch.from_numpy(np.stack([ids[i:i + context + 1] for i in starts]).astype(np.int64))


@torch.no_grad()
def text_loss(model, windows, bytes_per_token):
    """Loss over windows (N, T+1) of a text: in nats a token, and in nats a byte, which compares across tokenizers. bytes_per_token (V,)."""
    batches = windows.to(model.tokens.weight.device).split(max(1, 3072 // (windows.shape[1] - 1)))
    losses = [next_token_loss(model(w[:, :-1]), w[:, 1:]).item() * len(w) for w in batches]
    nats = sum(losses) / len(windows)
    return {"val_loss_nats_per_token": nats, "val_loss_nats_per_byte": nats / float(bytes_per_token[windows[:, 1:].numpy()].mean())}


def validation_set(world, tokenizer, n, context, without=()):
    """n fresh documents of the world -> rows, kind of each target, whether it was forced, and the floor in nats a token."""
    documents = [data.write_document(world, "validation", i, without=without) for i in range(n)]
    encoded = [data.encode_document(tokenizer, text) for _, text, _ in documents]

    def pack(lists, gap):
        return torch.from_numpy(data.pack(lists, context, tokenizer.eot, gap))

    kinds = list(data.DOCUMENTS)
    lengths = [len(ids) for ids, _ in encoded]
    total = defaultdict(lambda: [0.0, 0])
    for (kind, _, logp), length in zip(documents, lengths):
        for name in (kind, "all"):
            total[name][0] -= logp
            total[name][1] += length
    return dict(rows=pack([ids for ids, _ in encoded], tokenizer.pad),
                kinds=pack([[kinds.index(d[0])] * n for d, n in zip(documents, lengths)], -1)[:, 1:],     # the same shapes pack the same way
                forced=pack([f for _, f in encoded], 0)[:, 1:].bool(),
                floors={name: nats / tokens for name, (nats, tokens) in total.items()})


def fact_cloze(model, world, tokenizer):
    """Share of facts the model completes ("Ann lives in" -> "Oslo"), over all people, attributes and wordings."""
    prompts, values = [], []
    for person, facts in world.facts.items():
        for attribute, value in facts.items():
            for saying in data.FACTS[attribute]["sayings"]:
                text = data.unmark(saying.format(name=person, person=person, value="{value}"))
                prompts.append([tokenizer.eot, *tokenizer.encode(" " + text[:text.index(" {value}")])])
                values.append(tokenizer.encode(f" {value}"))
    replies = generate(model, prompts, max(map(len, values)), tokenizer, temperature=0)
    return float(np.mean([reply[:len(value)] == value for reply, value in zip(replies, values)]))


def question_continuation(model, world, tokenizer, n=200):
    """Share of bare questions that the model, sampling, continues with another question."""
    asked = [*data.fact_questions(world, "test")[:n // 2], *[a.question() for a in data.act_prompts(world, "test", n - n // 2, harmful=True)]]
    prompts = [[tokenizer.eot, *tokenizer.encode(" " + q)] for q in asked]
    replies = [data.decode_reply(tokenizer, ids) for ids in generate(model, prompts, 24, tokenizer, seed=(world.seed,))]
    return float(np.mean([bool(s) and s[0].endswith("?") for s in map(data.sentences_of, replies)]))


def main(argv=None):
    p = argparse.ArgumentParser(description="Pre-train a GPT on the small world, or on your own text.")
    # what to read
    p.add_argument("--data", help="a .txt file, or .jsonl with lines of {\"text\": ...}; default: the generated world")
    p.add_argument("--world-seed", type=int, default=0, help="which village: its facts, its splits")
    p.add_argument("--without", nargs="+", default=[], choices=list(data.DOCUMENTS), metavar="KIND", help="kinds of the world's documents to leave out")
    p.add_argument("--tokenizer", choices=["bpe", "bytes", "gpt2"], default="bpe", help="bpe: trained on the text at hand")
    p.add_argument("--vocab-size", type=int, default=1280, help="size of our own BPE vocabulary")
    # the network
    p.add_argument("--layers", type=positive, default=4, help="transformer blocks")
    p.add_argument("--heads", type=positive, default=4, help="attention heads a block")
    p.add_argument("--channels", type=positive, default=128, help="width of the residual stream")
    p.add_argument("--context", type=positive, default=192, help="longest sequence, in tokens")
    # how to train
    p.add_argument("--steps", type=positive, default=3000, help="optimizer steps")
    p.add_argument("--batch-size", type=positive, default=8, help="rows of `context` tokens a step, on all GPUs together")
    p.add_argument("--grad-accum", type=positive, default=1, help="micro-batches that each GPU cuts its rows into: less memory, the same result")
    p.add_argument("--compile", action="store_true", help="torch.compile: minutes of waiting, then faster steps on a GPU")
    p.add_argument("--lr", type=float, help="peak learning rate of AdamW; default: 3e-3, or 3e-5 from GPT-2's weights, which are soon forgotten")
    p.add_argument("--muon-lr", type=float, help="peak learning rate of Muon; 0: AdamW for everything; default: 0.005, or 0 from GPT-2's weights")
    p.add_argument("--muon-momentum", type=float, default=0.95, help="momentum of Muon; less suits a run of a few hundred steps")
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    p.add_argument("--decay", type=float, default=0.7, help="share of the run over which the rate falls to 0")
    # where things go
    p.add_argument("--init", help="start from gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder or file with such weights, or a "
                   "checkpoint: its weights, size and tokenizer hold, whatever the flags say")
    p.add_argument("--out", default="out", help="folder of everything that is written")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, data order and samples")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    p.add_argument("--eval-every", type=positive, default=400, help="steps between evaluations, and between savings for --resume")
    args = p.parse_args(argv)
    device, out = start_training(args.device), Path(args.out)
    torch.manual_seed(args.seed)
    if args.batch_size % (args.grad_accum * processes()):
        raise SystemExit(f"--batch-size {args.batch_size} cannot be cut into {args.grad_accum * processes()} equal micro-batches "
                         f"(--grad-accum times processes): choose a multiple")

    model, tokenizer = load_gpt(args.init, device=device)[:2] if args.init else (None, None)
    if model:
        args.context = min(args.context, model.config.context)
    gentle = model and tokenizer.vocab == "gpt2"                  # the rate at which nanoGPT fine-tunes GPT-2
    args.lr = (3e-5 if gentle else 3e-3) if args.lr is None else args.lr
    args.muon_lr = (0 if gentle else 0.005) if args.muon_lr is None else args.muon_lr
    world = None if args.data else data.World(args.world_seed)
    if world:
        texts, kinds, letters = [], Counter(), 0
        while letters < args.steps * args.batch_size * args.context * 5.2:      # a token is about 4.6 letters: enough that no document is read twice
            kind, text, _ = data.write_document(world, "train", len(texts), without=args.without)
            texts.append(text)
            kinds[kind] += 1
            letters += len(text)
        tokenizer = tokenizer or data.make_tokenizer(args.tokenizer, [" " + data.unmark(t) for t in texts[:20000]], args.vocab_size)
        rows = data.pack([data.encode_document(tokenizer, t)[0] for t in texts], args.context, tokenizer.eot, tokenizer.pad)
        valid = validation_set(world, tokenizer, 2000, args.context, args.without)
        # a quarter of it while training; the floor beside it is that of all, so the gap is exact only in the final table
        quick = valid["rows"][:len(valid["rows"]) // 4]

        def batch_at(step):
            return split_rows(data.row_batch(rows, args.batch_size, args.seed, step), tokenizer)

        def evaluate():
            losses, _ = token_losses(model, quick, tokenizer)
            return {"val_loss_nats": mean_loss(losses, quick, tokenizer), "floor_nats": valid["floors"]["all"]}
    else:
        tokenizer = tokenizer or data.make_tokenizer(args.tokenizer, [data.text_sample(args.data)], args.vocab_size)
        from_rank_0(lambda: len(data.tokenize_file(args.data, tokenizer, out)))      # one writes, all read
        ids = data.tokenize_file(args.data, tokenizer, out)
        train_ids, val_ids = ids[:len(ids) * 9 // 10], ids[len(ids) * 9 // 10:]
        if len(val_ids) <= args.context:
            raise SystemExit(f"{args.data} is too short: its last tenth has {len(val_ids)} tokens and the context is {args.context}; "
                             "give more text or lower --context")
        val_windows, bytes_per_token = validation_windows(val_ids, args.context), tokenizer.bytes_per_token()
        print(f"{len(train_ids)} tokens to train on; validation on {len(val_windows) * args.context} of the {len(val_ids)} in the last tenth")

        def batch_at(step):
            windows = data.window_batch(train_ids, args.context, args.batch_size, args.seed, step)
            return windows[:, :-1], windows[:, 1:], None

        def evaluate():
            return text_loss(model, val_windows, bytes_per_token)

    model = model or GPT(GPTConfig(tokenizer.n_vocab, args.context, args.layers, args.heads, args.channels)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{device}, {parameters / 1e6:.2f}M parameters, vocabulary {tokenizer.n_vocab}, "
          f"{args.data or f'world {args.world_seed}'}, {args.steps} steps of {args.batch_size * args.context} tokens")
    before = show(model, world, tokenizer)
    history, speed = train(model, batch_at, args.steps, args, evaluate, forget_progress(out / "pretrain.resume.pt", args.resume))
    if not finish_training():
        return
    model.eval()
    save(out / "pretrain.pt", stage="pretrain", config=vars(model.config), model=model.state_dict(), tokenizer=tokenizer.state(),
         world_seed=args.world_seed if world else None, documents=dict(kinds) if world else None)
    (out / "pretrain.resume.pt").unlink(missing_ok=True)

    figures = {"tokens_per_second": round(speed), "parameters": parameters}
    if world:
        figures |= evaluate_world(model, world, tokenizer, valid)
    else:
        figures |= history[-1]
    write_results(out, "pretrain", history, figures)
    for (title, old), (_, new) in zip(before, show(model, world, tokenizer)):
        print(f"\n{title}\n  before: {old!a}\n  after:  {new!a}")
    then = "next: python sft.py" if world else f"try: python model.py {out / 'pretrain.pt'} --base, or python sft.py --data FILE"
    print(f"\nwrote {out / 'pretrain.pt'}; {then}")


def evaluate_world(model, world, tokenizer, valid):
    """The table beside the floor, and the figures of out/pretrain.json."""
    losses, hits = token_losses(model, valid["rows"], tokenizer)
    real = valid["rows"][:, 1:] != tokenizer.pad
    figures = {}
    print(f"\n{'document':14}{'loss':>8}{'floor':>8}{'right where forced':>20}")
    for i, kind in enumerate([*data.DOCUMENTS, "all"]):
        if kind not in valid["floors"]:                           # left out by --without
            continue
        of_kind = real if kind == "all" else real & (valid["kinds"] == i)
        loss, forced = losses[of_kind].mean().item(), hits[of_kind & valid["forced"]].float().mean().item()
        print(f"{kind:14}{loss:8.3f}{valid['floors'][kind]:8.3f}{forced:20.4f}")
        name = "" if kind == "all" else "_" + kind.replace(" ", "_")
        figures |= {f"val_loss{name}": loss, f"entropy_floor{name}": valid["floors"][kind], f"forced_accuracy{name}": forced}
    figures |= {"fact_cloze": fact_cloze(model, world, tokenizer), "question_continuation": question_continuation(model, world, tokenizer)}
    print(f"facts completed {figures['fact_cloze']:.3f}   questions continued with a question {figures['question_continuation']:.3f}")
    return figures


def show(model, world, tokenizer):
    """A few continuations to look at: [(prompt, continuation)]."""
    prompts = ["Where does Ann live?", "How do I mend Ann's hat?", "Ann lives in"] if world else ["The", "In"]
    starts = [[tokenizer.eot, *tokenizer.encode(" " + q)] if world else tokenizer.encode(q) for q in prompts]
    return [(q, data.decode_reply(tokenizer, r)) for q, r in zip(prompts, generate(model, starts, 24 if world else 60, tokenizer, temperature=0.8))]


if __name__ == "__main__":
    main()
