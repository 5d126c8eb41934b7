"""The network, and every question put to it: GPT-2's architecture, sampling, checkpoints, chat.

    python model.py out/sft.pt                                  chat in the terminal
    python model.py out/pretrain.pt out/sft.pt --prompt "..."   one question to several models

Sizes: B batch, T tokens, C channels, H heads, D channels a head, V vocabulary. And everywhere

    logits[:, t] predicts tokens[:, t+1], so logp[:, t] belongs to tokens[:, t+1]"""
import argparse
import atexit
import contextlib
import copy
import math
import os
import sys
import tempfile
import time
import traceback
import zipfile
from collections import ChainMap, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data

@dataclass
class GPTConfig:
    """What a checkpoint must carry to rebuild its network."""
    vocab_size: int = 808
    context: int = 192                                     # the longest sequence, in tokens
    layers: int = 3
    heads: int = 4
    channels: int = 128
    gelu: str = "none"           # exact; GPT-2's own weights know "tanh", slower on today's CPUs

class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), all heads at once."""
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.channels, 3 * config.channels)     # one product for all three
        self.out = nn.Linear(config.channels, config.channels)
    def forward(self, x, mask, cache=None):                # x (B, T, C) -> (B, T, C)
        """In each head softmax(q k' / sqrt(D) + mask) v; `out` mixes the heads. A row of `qkv` is
        q, k, v, each H heads of D. mask (B, 1, T, T_keys): log 1 where a query sees a key, log 0 =
        -inf elsewhere; None: causal. cache.append(k, v) of the new gives all T_keys so far."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                      # (B, H, T_keys, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

class Block(nn.Module):
    """Look around (attention), then think (MLP); each adds to the residual stream."""
    def __init__(self, config):
        super().__init__()
        C = config.channels
        self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-5), nn.LayerNorm(C, eps=1e-5)
        self.attention, self.gelu = Attention(config), nn.GELU(config.gelu)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)  # nowhere any dropout
    def forward(self, x, mask, cache=None):                # (B, T, C) -> (B, T, C)
        x = x + self.attention(self.norm1(x), mask, cache)
        return x + self.down(self.gelu(self.up(self.norm2(x))))

class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm first, GELU, head
    tied to the embedding. It carries its `tokenizer`, the seed of its world (or None), the kinds of
    documents it is `without`, and whether it began with `published` weights, GPT-2's."""
    def __init__(self, config, tokenizer=None, world_seed=None, published=False, without=()):
        super().__init__()
        if config.channels % config.heads:
            raise ValueError(f"{config.channels} channels are no multiple of {config.heads} heads")
        self.config, self.tokenizer = config, tokenizer
        self.world_seed, self.without, self.published = world_seed, without, published
        self.tokens = nn.Embedding(config.vocab_size, config.channels)
        self.positions = nn.Embedding(config.context, config.channels)     # learned: none beyond
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels, eps=1e-5)                # GPT-2's eps, as above
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))  # 2 * layers add up
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
    device = property(lambda self: self.tokens.weight.device)
    def hidden(self, tokens, segments=None, caches=None):
        """Tokens (B, T) -> the last layer's output (B, T, C), normalised.
        `segments` (B, T): which document a token belongs to, 0 for padding; None: one document a
        row. With `caches`, one a layer, the tokens continue what is cached, and the segments, then
        (B, T_keys), are those of all. ValueError where T does not fit the context."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        if segments is None:
            mask, positions = None, torch.arange(T, device=tokens.device)
        else:
            mask, positions = attention_mask(segments, T).log(), segment_positions(segments)[:, -T:]
        x = self.tokens(tokens) + self.positions(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, caches[i] if caches else None)
        return self.norm(x)
    def head(self, hidden):                                # (..., C) -> logits (..., V)
        bias = hidden.new_zeros(self.config.vocab_size)    # none, but for padding: p is 0, since it
        bias[self.tokenizer.pad] = -1e9                    # marks gaps. With -inf a KL would be nan
        return F.linear(hidden, self.tokens.weight, bias)  # tied: a token's embedding is its scorer
    def forward(self, tokens, segments=None):              # (B, T) -> logits (B, T, V)
        return self.head(self.hidden(tokens, segments))

def attention_mask(segments, T):
    """Who may look at whom, for padding, packed documents and a KV cache: a token sees its own
    segment up to itself. The queries are the last T of the keys; segments (B, T_keys), by hand:

        segments  1 1 2 2   ->   1 . . .
                                 1 1 . .
                                 . . 1 .          the second document starts afresh
                                 . . 1 1          -> bool (B, 1, T, T_keys)
    Padding sees the padding before it: a softmax over an empty row would be NaN."""
    T_keys = segments.shape[1]
    same = segments[:, -T:, None] == segments[:, None, :]  # (B, T, T_keys)
    causal = torch.ones(T, T_keys, dtype=torch.bool, device=segments.device).tril(T_keys - T)
    return (same & causal)[:, None]

def segment_positions(segments):
    """Positions counted from each document's first token: segments 0 0 1 1 1 2 -> 0 1 0 1 2 0."""
    t = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)    # another begins
    return t - torch.where(starts, t, 0).cummax(1).values  # less the latest start so far

class ScalarModel(nn.Module):
    """A GPT with one number a token in place of a vocabulary: a reward model or a value function.
    A reward model carries its `scale` (see normalise in reward.py) and its annotator's `taste`."""
    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.tokenizer, self.world_seed = gpt, gpt.tokenizer, gpt.world_seed
        self.scale, self.taste = None, None
        self.scalar = nn.Linear(gpt.config.channels, 1)
        nn.init.normal_(self.scalar.weight, std=1 / math.sqrt(gpt.config.channels + 1))
        nn.init.zeros_(self.scalar.bias)                   # deviation about 1: Stiennon et al. 2020
    device = property(lambda self: self.scalar.weight.device)
    def forward(self, tokens, segments):                   # (B, T) -> (B, T)
        return self.scalar(self.gpt.hidden(tokens, segments)).squeeze(-1)

def copy_of(gpt):
    """A second GPT with the same weights: a reference to compare with, or another model's start."""
    return copy.deepcopy(gpt, {id(gpt.tokenizer): gpt.tokenizer}).eval()   # which both share

# --- Sampling: prefill reads the prompts; then, again and again, sample a token and decode it -----
MAX_NEW = 56                      # the longest answer in tokens: room for a refusal with its reason
SAMPLING_BATCH = 256              # sequences sampled together: what a small memory holds
class LayerCache:
    """One layer's keys and values for all tokens so far: a new token costs a step, not a pass."""
    def __init__(self, B, H, length, D, like):
        self.k = torch.empty(B, H, length, D, device=like.device, dtype=like.dtype)
        self.v, self.used = torch.empty_like(self.k), 0
    def append(self, k, v):                                # (B, H, T, D) -> (B, H, used, D)
        new = slice(self.used, self.used + k.shape[2])
        self.k[:, :, new], self.v[:, :, new], self.used = k, v, new.stop
        return self.k[:, :, :self.used], self.v[:, :, :self.used]

def sample(logits, noise, temperature=1.0, truncate=None):
    """Logits (B, V) and one uniform number each (B,) -> one token each (B,), the one at which the
    cumulative probability passes the noise: with p = .5 .3 .2, noise .1 takes 0 and .6 takes 1.
    Temperature 0: the likeliest. `truncate`: logits -> logits without the unlikely tail."""
    if temperature == 0:
        return logits.argmax(-1)                           # the limit: all probability on one token
    logits = logits / temperature if truncate is None else truncate(logits / temperature)
    cumulative = logits.softmax(-1).cumsum(-1)             # (B, V)
    # its last entry is 1 only up to rounding: scale the noise, or it may run past the last token
    passed = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    return passed.squeeze(-1).clamp(max=logits.shape[-1] - 1)

def keep_likely(logits, top_k=None, top_p=None):
    """Logits (B, V) with -inf for all but the top_k likeliest tokens, and then, once the p of these
    add up to 1, all but the fewest that reach top_p (nucleus sampling, Holtzman et al. 2020)."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p                 # those before it were enough already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits

@torch.no_grad()
def generate(model, prompts, max_new, temperature=1.0, seed=(0,), stop=(), truncate=None):
    """Continue each prompt (a list of ids) by at most `max_new` tokens -> lists of new ids,
    end-of-text included where the model ended by itself; `stop`: further ids that end a reply.
    The noise of a sequence depends on `seed` (a tuple of ints) and its index, not on what else is
    in the batch. All processes call this and share the work. ValueError: no room for a prompt."""
    max_new = min(max_new, model.config.context)           # no reply can be longer
    replies, stops = [], torch.tensor([model.tokenizer.eot, *stop], device=model.device)
    numbers = range(len(prompts))[rank()::processes()]     # this process's share: all, if alone
    for first in range(0, len(numbers), SAMPLING_BATCH):
        batch = numbers[first:first + SAMPLING_BATCH]      # noise for all of a reply, used or not
        streams = [np.random.default_rng([*seed, i]) for i in batch]
        noise = torch.from_numpy(np.stack([s.random(max_new, dtype=np.float32) for s in streams]))
        asked = [prompts[i] for i in batch]
        replies += generate_batch(model, asked, noise, temperature, stops, truncate)
    return from_all(replies)

def generate_batch(model, prompts, noise, temperature, stops, truncate):
    """One batch of `generate`, noise (B, max_new) -> lists of new ids."""
    pad, noise = model.tokenizer.pad, noise.to(model.device)
    hidden, segments, caches = prefill(model, prompts, noise.shape[1])
    start, max_new = caches[0].used, segments.shape[1] - caches[0].used
    replies = torch.full((len(prompts), max_new), pad, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)     # the replies that still go on
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for t in range(max_new):
        ended |= segments[:, start + t] == 0               # the context has no room for more
        chosen = sample(model.head(hidden), noise[rows, t], temperature, truncate)     # (B,)
        replies[rows, t] = chosen = torch.where(ended, pad, chosen)
        ended |= torch.isin(chosen, stops)
        if ended.all() or t + 1 == max_new:                # there is nothing left to decode for
            break
        if ended.sum() > len(ended) / 3:                   # not at every end: caches are copied
            rows, chosen, segments, ended = keep_rows(~ended, caches, rows, chosen, segments, ended)
        hidden = model.hidden(chosen[:, None], segments[:, :caches[0].used + 1], caches)[:, -1]
    return [row[:row.index(pad)] if pad in row else row for row in replies.tolist()]

def prefill(model, prompts, max_new):
    """Read B prompts -> the last hidden state (B, C), the segments (B, P + max_new) of prompt and
    reply, the caches. Equal prompts are read once: a k-th of the work for k answers to each."""
    config, pad = model.config, model.tokenizer.pad
    different = {prompt: u for u, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens = data.pad_rows(list(different), pad, left=True).to(model.device)
    U, P = tokens.shape         # different prompts, their length; padded left, so all end together
    if P >= config.context:
        raise ValueError(f"a prompt of {P} tokens leaves no room in the context, {config.context}")
    size = (U, config.heads, P + max_new, config.channels // config.heads)
    caches = [LayerCache(*size, model.tokens.weight) for _ in range(config.layers)]
    rows = F.pad((tokens != pad).long(), (0, max_new), value=1)    # 1: prompt, reply; 0: padding
    segments = rows.masked_fill(rows.cumsum(1) > config.context, 0)    # and past the context
    hidden = model.hidden(tokens, segments[:, :P], caches)[:, -1]
    copies = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=model.device)
    return *keep_rows(copies, caches, hidden, segments), caches

def keep_rows(rows, caches, *tensors):
    """From here on the batch is these rows: numbers, which may repeat, or a mask."""
    for cache in caches:
        cache.k, cache.v = cache.k[rows], cache.v[rows]
    return [tensor[rows] for tensor in tensors]

def answer(model, questions, max_new=MAX_NEW, temperature=1.0, seed=(0,), bare=False, whole=False):
    """Questions, each a str or a list of turns -> the model's answers, as text. `bare`: texts to be
    continued, as a base model does that knows no chat. `whole`: "" for what was cut off."""
    as_prompt = data.bare_prompt if bare else data.chat_prompt
    prompts = [as_prompt(model.tokenizer, question) for question in questions]
    replies = generate(model, prompts, max_new, temperature, seed)
    kept = [ids if ids[-1:] == [model.tokenizer.eot] or not whole else [] for ids in replies]
    return [data.decode_reply(model.tokenizer, ids) for ids in kept]

# --- Checkpoints, and an interrupted run ----------------------------------------------------------
def save(path, **contents):
    """Write a checkpoint of plain values and tensors, whole or not at all."""
    if rank():                                             # of several processes, rank 0 writes
        return
    temporary = Path(f"{path}.tmp")                        # an older one stays until this is whole
    try:
        torch.save(contents, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                           # a full disk
        raise SystemExit(f"{path} was not written ({error!r}); one from before is intact") from None
    finally:                                                           # after Ctrl-C too
        temporary.unlink(missing_ok=True)

def save_model(path, model, **more):
    """Write a GPT or a ScalarModel, with all that it takes to use it and what is in `more`."""
    path, gpt = Path(path), getattr(model, "gpt", model)
    save(path, **more, stage=path.stem, config=vars(gpt.config), published=gpt.published,
         tokenizer=gpt.tokenizer.state(), world_seed=gpt.world_seed, without=list(gpt.without),
         model=model.state_dict())

def load(path, made_by=None):
    """A checkpoint as a dict; stops if there is none. `weights_only`: no code in it can run."""
    remedy = f"run `python {made_by}` first" if made_by else "check the path"
    if not Path(path).exists():
        raise SystemExit(f"{path} not found: {remedy}")
    try:
        if zipfile.ZipFile(path).testzip():                # torch.load looks at no checksum
            raise ValueError
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                             # of whatever type
        raise SystemExit(f"{path} is no checkpoint of ours, or damaged ({error!r:.80})") from None

def load_gpt(path, made_by=None, device="cpu"):
    """A checkpoint of ours, or GPT-2 by name or folder -> GPT in eval mode, with its tokenizer."""
    name = str(path).removeprefix("openai-community/")     # as the hub names it
    if name in GPT2_NAMES and not Path(path).exists():
        path = from_rank_0(lambda: find_gpt2(name))        # one downloads, all read
    theirs = Path(path).is_dir() or Path(path).suffix in (".safetensors", ".bin")
    checkpoint = read_gpt2(Path(path)) if theirs else load(path, made_by)
    if not {"model", "tokenizer"} <= checkpoint.keys() or "scale" in checkpoint:   # a reward model
        raise SystemExit(f"{path} holds no language model: run `python {made_by or 'pretrain.py'}`")
    try:
        tokenizer = data.Tokenizer.load(checkpoint["tokenizer"])
        with torch.device("meta"):                         # no memory for weights that are replaced
            model = GPT(GPTConfig(**checkpoint["config"]), tokenizer, checkpoint.get("world_seed"),
                        checkpoint.get("published", False), checkpoint.get("without", ()))
        model.load_state_dict(checkpoint["model"], assign=True)
    except Exception as error:                             # of whatever type a key may be
        raise SystemExit(f"{path}: the weights do not fit: {repr(error)[-200:]}") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise SystemExit(f"{path} holds weights that are no numbers (nan): train it again")
    return model.to(device).eval()

MAY_DIFFER = ("resume", "fresh", "device", "out", "compile", "grad_accum", "eval_prompts")
def settings_of(path, args, stages=("pretrain", "sft", "reward", "ppo")):
    """The flags, and checksums: of the files that they name, of the models of earlier stages."""
    own, folder = Path(path).name.split(".")[0], vars(args).get("inputs") or vars(args).get("out")
    files = {f"--{name}": value for name, value in vars(args).items() if isinstance(value, str)}
    files |= {f"{name}.pt": f"{folder}/{name}.pt" for name in stages[:[*stages, own].index(own)]}
    files = {name: file for name, file in files.items() if os.path.isfile(file)}
    return vars(args) | {f"content of {name}": data.checksum(f) for name, f in files.items()}

def save_progress(progress, step, history, **parts):
    """Keep parts (models, optimizers), history for --resume; `progress`: (path, args), or None."""
    if progress:                                           # no random state: batches and samples
        path, args = progress                              # are functions of (seed, step)
        states = {name: part.state_dict() for name, part in parts.items()}
        save(path, step=step, settings=settings_of(*progress), history=history, **states)

def resume(progress, finished=None, **parts):
    """Where training starts -> (step, history): (0, []), or with --resume what was saved, and loads
    `parts`. Stops on other flags, and before it overwrites a run not yet at step `finished`."""
    path, args = progress or (None, None)
    if progress and args.fresh:
        Path(path).unlink(missing_ok=True)
    there = progress and Path(path).exists()
    if progress and args.resume and not there:
        raise SystemExit(f"{path} not found: there is no interrupted run; leave out --resume")
    if there and not args.resume and load(path).get("step", -1) != finished:
        raise SystemExit(f"{path} holds an unfinished run: --resume goes on, --fresh gives it up")
    if not progress or not args.resume:
        return 0, []
    state = load(path)
    for name, value in settings_of(path, args).items():
        old = state.get("settings", {}).get(name)
        if name not in MAY_DIFFER and old != value:
            raise SystemExit(f"--resume: {name} was {old}, now {value}: use what it began with")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["history"]

# --- Devices, one or several ----------------------------------------------------------------------
# `torchrun --nproc-per-node 2 sft.py` runs it twice. All draw the same batch by (seed, step); each
# takes its share; gradients are averaged; rank 0 alone evaluates and writes.
def number(low, high=math.inf, kind=float):
    """argparse type of a flag -> what reads a number from `low` to `high` (never nan)."""
    def number(text):                                      # argparse says: invalid number value
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number
positive, natural = number(1, 2 ** 31, int), number(0, 2 ** 31, int)     # a count; a seed

def writable(folder):
    """argparse type of a folder: made, and written to, before the work rather than after it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {folder}: {error.strerror}") from None
    return folder

def common_flags(parser, init, seed):
    """Declare what every stage takes; `init` and `seed` are the help texts that differ."""
    parser.add_argument("--init", help=init)
    parser.add_argument("--out", type=writable, default="out", help="folder of all that is written")
    parser.add_argument("--seed", type=natural, default=0, help=seed)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    one.add_argument("--fresh", action="store_true", help="give up an interrupted run")

def gentle_rates(args, model, **rates):
    """Fill in rates that no flag gave: {flag: (ours, a gentle one for published weights)}."""
    for name, pair in rates.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[bool(model and model.published)])

def say_interrupted(kind, error, trace):
    """A sys.excepthook: a sentence after Ctrl-C or on a full disk, a traceback for a mistake."""
    if not issubclass(kind, (KeyboardInterrupt, OSError)):
        return traceback.print_exception(kind, error, trace, file=sys.__stderr__)
    kept = "--resume goes on if --out holds *.resume.pt or rlaif.progress"
    print(f"\nstopped: {kind.__name__} {error}".rstrip() + f"; {kept}", file=sys.stderr)

def pick_device(name=None):
    """The device of that name, or else cuda, mps or cpu; stops if it cannot be used."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        raise SystemExit("this script runs as one process: start it with python, not torchrun")
    if "" in sys.argv[1:]:
        raise SystemExit("an empty argument: is a variable of the shell not set?")
    sys.excepthook = say_interrupted
    if hasattr(sys.stdout, "reconfigure"):                 # a character that the terminal cannot
        sys.stdout.reconfigure(errors="replace")           # show becomes a question mark
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name or best).item()         # better to fail here than after loading
    except Exception as error:                             # unknown, or not in this build of torch
        raise SystemExit(f"--device {name} cannot be used here ({type(error).__name__}): "
                         "leave it out, or say cpu") from None
    return torch.device(name or best)

def autocast(device):
    """For training on a GPU that can: matrix products in bfloat16; weights, gradients and losses
    stay float32. What PPO compares to the fourth decimal is computed outside of it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able)   # a CPU is slower with it

def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

def processes():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def start_training(name=None):
    """Pick this process's device; under torchrun, join the others, who wait a day for rank 0."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        gpus = torch.cuda.device_count() if (name or "cuda").startswith("cuda") else 0
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))
        if rank():                                         # who is silent, but for tracebacks
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
            atexit.register(time.sleep, 2)                 # torchrun ends all: let rank 0 say why
        print(f"{processes()} processes train together")
        name = f"cuda:{os.environ['LOCAL_RANK']}" if gpus else "cpu"
    device = pick_device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")         # what is float32 goes through TF32
        torch.cuda.set_device(device.index or 0)
    return device

def average_and_clip(model):
    """Average the gradients over all processes, so that their weights stay equal, and scale them to
    norm 1 at most, or one odd batch throws the weights far. Stops where one is nan or infinite."""
    for p in model.parameters():
        if processes() > 1 and p.grad is not None:
            p.grad = mean_over_processes(p.grad)
    if not torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
        raise SystemExit("a gradient is nan or infinite: lower the learning rates (with --fresh)")

def my_share(batch, size):
    """A batch (a sequence, the same for all) -> this process's items, and the weight of their mean
    loss: their `size` (tokens, pairs) over the mean size of all shares. The mean over processes
    of weight * loss is then the loss of the whole batch; of one process, the weight is 1."""
    mine = batch[rank()::processes()]                      # by turns, as a batch may be sorted
    weight = sum(map(size, mine)) * processes() / sum(map(size, batch))
    # too few items for all: some take the first at weight 0, for the others wait for them
    return (mine if len(mine) else batch[:1]), weight

def mean_over_processes(x):
    """A tensor, with another value in each process -> the mean, in all of them."""
    if processes() > 1:
        x = x.detach().clone()                             # all_reduce writes the sum into it
        dist.all_reduce(x)
    return x / processes()

def from_rank_0(function):
    """`function()`, computed by rank 0 while the others wait. Not `generate`, which needs all."""
    return from_all([] if rank() else [function()])[0]

def from_all(mine):
    """Each process's share of a list (see my_share) -> the list: [a, c] and [b] give [a, b, c]."""
    shares = [mine] * processes()
    if processes() > 1:
        dist.all_gather_object(shares, mine)
    return [shares[i % processes()][i // processes()] for i in range(sum(map(len, shares)))]

def finish_training():
    """Part from the other processes, which end here; rank 0 alone goes on to evaluate."""
    if processes() > 1:
        me = rank()                                        # after the parting, all are rank 0
        dist.destroy_process_group()
        if me:                                             # nothing is left for the others to do
            sys.exit()

# --- GPT-2's weights (Radford et al. 2019), from Hugging Face's files -----------------------------
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")     # 124 to 1558 million weights
GPT2_HUB = "https://huggingface.co/openai-community"
GPT2_SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")   # in GPTConfig's order
GPT2_KIND = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}     # and ours
GELUS = {"none": "gelu", "tanh": "gelu_new"}               # GPTConfig.gelu: what they call it
GPT2_PARTS = {"tokens.": "wte.", "positions.": "wpe.", "blocks.": "h.", "norm1.": "ln_1.",
              "norm2.": "ln_2.", "norm.": "ln_f.", "attention.qkv.": "attn.c_attn.",
              "attention.out.": "attn.c_proj.", "up.": "mlp.c_fc.", "down.": "mlp.c_proj."}

def find_gpt2(name, files=("config.json", "vocab.json", "model.safetensors")):
    """The folder of "gpt2", ...: in PyTorch's cache, or downloaded there (0.5-6 GB)."""
    folder, source = Path(torch.hub.get_dir(), "checkpoints", name), f"{GPT2_HUB}/{name}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file in [f for f in files if not (folder / f).exists()]:   # whole or not at all
            torch.hub.download_url_to_file(f"{source}/resolve/main/{file}", folder / file)
    except Exception as error:                             # whatever goes wrong on a network
        raise SystemExit(f"{name} could not be downloaded ({type(error).__name__}): put "
                         f"{', '.join(files)} from {source}/tree/main into {folder}") from None
    return folder

def read_gpt2(path):
    """A folder in Hugging Face's layout, or the weights in it -> what `load` gives of ours. GPT-2
    knows no chat: our three further tokens get a row each, the mean of all rows, which makes none
    of them likely (Hewitt 2021). Stops if it is another network, or another vocabulary."""
    file = path / "model.safetensors" if path.is_dir() else path
    config_file = file.with_name("config.json")
    shards = [file] if file.exists() else sorted(path.glob("model-*-of-*.safetensors")) or [file]
    if file.suffix == ".bin" or not shards[0].exists() or not config_file.exists():
        raise SystemExit(f"{path}: config.json and model.safetensors, in one piece or several, are "
                         "needed, as save_pretrained writes them; a .bin could run code")
    config, weights = data.parse_json(config_file, data.read_text(config_file)), {}
    config = config if isinstance(config, dict) else {}    # of no size, and refused for that
    gelu = "none" if config.get("activation_function") == GELUS["none"] else "tanh"
    kind = GPT2_KIND | {"activation_function": GELUS[gelu]}
    other = {key: config[key] for key, ours in kind.items() if config.get(key, ours) != ours}
    if other:
        raise SystemExit(f"{config_file}: only GPT-2 can be read, with {kind}, not {other}")
    for name, weight in ChainMap(*map(data.read_safetensors, shards)).items():
        name = name.removeprefix("transformer.")
        for ours, theirs in GPT2_PARTS.items():
            name = name.replace(theirs, ours)
        if weight.dim() == 2 and name.startswith("blocks."):
            weight = weight.T                              # theirs (in, out), nn.Linear (out, in)
        if not name.endswith((".attn.bias", ".attn.masked_bias")):     # causal masks
            weights[name] = weight.float().contiguous()
    sizes = [config.get(key) for key in GPT2_SIZES]
    tokenizer, table = config.get("tokenizer", "gpt2"), weights.get("tokens.weight")
    head = weights.pop("lm_head.weight", table)            # left out where it is the embedding
    if table is not None and not torch.equal(head, table):
        raise SystemExit(f"{file}: its head is not its embedding, as GPT-2's is: it cannot be read")
    lists = filter(Path.exists, map(file.with_name, ("vocab.json", "tokenizer.json")))
    words = "".join("".join(map(data.read_text, lists)).split())
    if "tokenizer" not in config and 'SolidGoldMagikarp":43453' not in words:  # in no other list
        raise SystemExit(f"{path}: GPT-2's vocab.json or tokenizer.json is needed beside the "
                         "weights (other vocabularies have as many tokens)")
    if tokenizer == "gpt2" and sizes[0] == 50257 and table is not None:
        weights["tokens.weight"] = torch.cat([table, table.mean(0).expand(3, -1)])
        sizes[0] += 3
    if None in sizes or tokenizer == "gpt2" and sizes[0] != 50260:
        raise SystemExit(f"{path}: a shard is missing, or it is no GPT-2 of 50257 tokens: {sizes}")
    return dict(config=vars(GPTConfig(*sizes, gelu)), model=weights, tokenizer=tokenizer,
                world_seed=config.get("world_seed"), published=True)

# --- Chat -----------------------------------------------------------------------------------------
def read_args(argv=None):
    """The flags of the chat."""
    p = argparse.ArgumentParser(description="Chat with a checkpoint, or ask several one question.")
    p.add_argument("checkpoints", nargs="+", help="out/sft.pt, gpt2, a folder with GPT-2's weights")
    p.add_argument("--prompt", help="ask this and stop; default: read questions from the terminal")
    p.add_argument("--base", action="store_true", help="continue the bare text: no chat template")
    p.add_argument("--max-new", type=positive, default=64, help="longest answer, in tokens")
    p.add_argument("--temperature", type=number(0, 100), default=0.7, help="0: the likeliest token")
    p.add_argument("--top-k", type=positive, help="sample among the k likeliest tokens only")
    p.add_argument("--top-p", type=number(1e-6, 1), help="... those that together reach p only")
    p.add_argument("--seed", type=natural, default=0, help="seed of the sampling")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return p.parse_args(argv)

def answer_talk(model, talk, args, turn):
    """The answer to a talk's latest turn; the oldest go until it fills half of the context."""
    as_prompt = lambda: (data.bare_prompt(model.tokenizer, talk[-1][1]) if args.base
                         else data.chat_prompt(model.tokenizer, talk))
    while len(talk) > 1 and len(as_prompt()) > model.config.context // 2:
        del talk[:2]                                       # a question and its answer
    try:
        reply, = generate(model, [as_prompt()], args.max_new, args.temperature, (args.seed, turn),
                          truncate=lambda logits: keep_likely(logits, args.top_k, args.top_p))
    except ValueError as error:                            # this question alone is too long
        return f"({error})"
    return data.decode_reply(model.tokenizer, reply)

def main(argv=None):
    args, talks = read_args(argv), defaultdict(list)       # what was said, for each model
    models = {path: load_gpt(path, device=pick_device(args.device)) for path in args.checkpoints}
    if args.prompt is None:
        print("/new forgets, Ctrl-D ends. Ask: Where does Ann live?  or  How do I nab Ann's hat?")
    with contextlib.suppress(EOFError, KeyboardInterrupt):     # Ctrl-D and Ctrl-C end the chat
        for turn in range(2 ** 31 if args.prompt is None else 1):
            question = (input("\n> ") if args.prompt is None else args.prompt).strip()
            talks = defaultdict(list) if question == "/new" else talks
            if question in ("", "/new"):
                print("Ask something.")
                continue
            for path, model in models.items():
                talks[path].append(("user", question))
                talks[path].append(("assistant", answer_talk(model, talks[path], args, turn)))
                print(f"{path}:  " * (len(models) > 1) + talks[path][-1][1])

if __name__ == "__main__":
    main()
