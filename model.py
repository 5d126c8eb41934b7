"""The network, and every question put to it: GPT-2's architecture, sampling, log-probabilities, a scalar head, checkpoints.

    python model.py out/sft.pt                                     chat in the terminal
    python model.py out/pretrain.pt out/sft.pt --prompt "..."      the same question to several models, side by side
    python model.py gpt2 --base                                    continue a text with GPT-2's own weights
    python model.py out/ppo.pt --export DIR                        write it the way transformers reads it

Letters for sizes: B batch, T tokens, C channels, H heads, D channels per head, V vocabulary, P prompt, U different prompts.
One convention everywhere: logits[:, t] predicts tokens[:, t+1], so logp[:, t] belongs to tokens[:, t+1].
"""
import argparse
import atexit
import contextlib
import csv
import json
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data


@dataclass
class GPTConfig:
    """What a checkpoint must carry to rebuild its network."""
    vocab_size: int = 1280
    context: int = 192                                            # the longest sequence, in tokens
    layers: int = 4
    heads: int = 4
    channels: int = 128


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), all heads at once."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.channels, 3 * config.channels)
        self.out = nn.Linear(config.channels, config.channels)

    def forward(self, x, mask, cache=None):                       # x (B, T, C), mask (B, 1, T, T_keys) or None
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)    # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                             # (B, H, T_keys, D)
        # Without a mask there is no padding, no second document and no cache: plain causal attention, the fast path.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Look around (attention), then think (MLP); each adds to the residual stream after a LayerNorm of its own."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.channels, eps=1e-5), nn.LayerNorm(config.channels, eps=1e-5)
        self.attention = Attention(config)
        self.up, self.down = nn.Linear(config.channels, 4 * config.channels), nn.Linear(4 * config.channels, config.channels)

    def forward(self, x, mask, cache=None):                       # (B, T, C) -> (B, T, C)
        x = x + self.attention(self.norm1(x), mask, cache)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LayerCache:
    """The keys and values of one layer for all tokens so far, so that a new token costs one step and not a whole pass."""

    def __init__(self, B, H, length, D, like):
        self.k = torch.empty(B, H, length, D, device=like.device, dtype=like.dtype)
        self.v, self.used = torch.empty_like(self.k), 0

    def append(self, k, v):                                       # (B, H, T, D) -> all so far (B, H, used, D)
        T = k.shape[2]
        self.k[:, :, self.used:self.used + T], self.v[:, :, self.used:self.used + T] = k, v
        self.used += T
        return self.k[:, :, :self.used], self.v[:, :, :self.used]

    def take(self, rows):
        """From here on the batch consists of these rows: numbers, which may repeat, or a mask."""
        self.k, self.v = self.k[rows], self.v[rows]


def attention_mask(query_segments, key_segments):
    """Who may look at whom, for padding, packed documents and a KV cache alike -> bool (B, 1, T, T_keys).

    A segment number says which document a token belongs to (0: padding). A token sees the tokens of its own
    document up to itself. The queries (B, T) are the last T of the keys (B, T_keys).
    """
    T, T_keys = query_segments.shape[1], key_segments.shape[1]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    causal = torch.ones(T, T_keys, dtype=torch.bool, device=same.device).tril(T_keys - T)
    return (same & causal)[:, None]


def segment_positions(segments):
    """Positions counted from the first token of each document: segments [0, 0, 1, 1, 1, 2] -> [0, 1, 0, 1, 2, 0]. (B, T) -> (B, T)"""
    t = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return t - torch.where(starts, t, 0).cummax(1).values


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, tanh-approximated GELU, head tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        if config.channels % config.heads:
            raise SystemExit(f"{config.channels} channels cannot be split into {config.heads} heads: choose a multiple")
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.channels)
        self.positions = nn.Embedding(config.context, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels, eps=1e-5)
        for name, p in self.named_parameters():
            if p.dim() > 1:                                       # GPT-2's init; what writes to the residual stream starts smaller
                scale = 1 / math.sqrt(2 * config.layers) if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens, segments=None, caches=None, seen=None):
        """Tokens (B, T) -> the last layer's output (B, T, C), normalised.

        `segments` (B, T): document numbers, 0 for padding; None: one unpadded document a row. With `caches` (one a layer), `tokens`
        continue what is cached and `seen` (B, T_keys) holds the segments of all tokens, the new ones included.
        """
        T = tokens.shape[1]
        if seen is not None:
            mask, positions = attention_mask(seen[:, -T:], seen), segment_positions(seen)[:, -T:]
        elif segments is not None:
            mask, positions = attention_mask(segments, segments), segment_positions(segments)
        else:
            mask, positions = None, torch.arange(T, device=tokens.device)
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        x = self.tokens(tokens) + self.positions(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, caches[i] if caches else None)
        return self.norm(x)

    def head(self, hidden):                                       # (..., C) -> logits (..., V)
        return F.linear(hidden, self.tokens.weight)

    def forward(self, tokens, segments=None):                     # (B, T) -> logits (B, T, V)
        return self.head(self.hidden(tokens, segments))


class ScalarModel(nn.Module):
    """A GPT with one number per token instead of a vocabulary: a reward model or a value function."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt
        self.scalar = nn.Linear(gpt.config.channels, 1)
        nn.init.normal_(self.scalar.weight, std=1 / math.sqrt(gpt.config.channels + 1))    # Stiennon et al. 2020
        nn.init.zeros_(self.scalar.bias)

    def forward(self, tokens, segments):                          # (B, T) -> (B, T)
        return self.scalar(self.gpt.hidden(tokens, segments)).squeeze(-1)


def freeze_words(model, tokenizer):
    """From here on the embeddings of words stay as pre-training left them; those of end-of-text and of the chat roles go on learning.

    A fine-tuning set names a few people and verbs. If their embeddings move and all others stay, the model learns by heart what to say
    about the ones it was shown; with all of them fixed it has to use what it knows of any name. (A hook: the gradient of these rows is 0.)
    """
    table = getattr(model, "gpt", model).tokens.weight
    table.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:tokenizer.eot]), gradient[tokenizer.eot:]]))


def token_logprobs(model, tokens, segments=None, temperature=1.0):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) at [:, t], under the distribution that sampling at `temperature` uses. (B, T) -> (B, T-1)

    (Sampling also forbids the pad token, whose probability is next to nothing in a trained model.)"""
    logits = model(tokens, segments)[:, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------------
# Sampling

MAX_NEW = 56                                                      # the longest answer in tokens: room for a refusal with its reason


def pick_tokens(logits, noise, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) and one uniform number each (B,) -> one token each (B,). Temperature 0 takes the likeliest.

    Inverse-transform sampling: the token at which the cumulative probability passes the noise. top_k keeps the k likeliest,
    top_p the likeliest that together reach probability p (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = (p.cumsum(-1) - p >= top_p).scatter(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(beyond, -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1)                    # (B, V)
    # the last sum is 1 only up to rounding: scale the noise by it, so that the search never runs past a possible token
    return torch.searchsorted(cumulative, (noise[:, None] * cumulative[:, -1:]), right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new, tokenizer, temperature=1.0, top_k=None, top_p=None, seed=(0,), stop=None, batch_size=256):
    """Continue each prompt (a list of ids) -> list of lists of new ids, `tokenizer.eot` included where the model ended by itself.

    The noise of a sequence depends on `seed` (a tuple of ints) and its index alone: not on what else is in the batch.
    `stop`: further ids that end a sequence (a chat role, say). Sampling ends when every sequence has ended.
    """
    stops = torch.tensor([tokenizer.eot, *(stop or [])])
    replies = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first:first + batch_size]
        noise = torch.tensor(np.stack([np.random.default_rng([*seed, first + i]).random(max_new, dtype=np.float32) for i in range(len(batch))]))
        replies += generate_batch(model, batch, max_new, tokenizer.pad, stops, noise, temperature, top_k, top_p)
    return replies


def generate_batch(model, prompts, max_new, pad, stops, noise, temperature, top_k, top_p):
    """One batch of `generate`: the prompts are read at once, each of the U different ones once; then one token a step.
    `noise` (B, max_new), `stops` (n,)."""
    device, config, B = model.tokens.weight.device, model.config, len(prompts)
    different = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    tokens = data.pad_rows(list(different), pad, left=True).to(device)      # (U, P): left padding, so that all prompts end together
    U, P = tokens.shape
    max_new = min(max_new, config.context - P)
    if max_new < 1:
        raise ValueError(f"a prompt of {P} tokens leaves no room in the context of {config.context}")
    noise, stops = noise.to(device), stops.to(device)
    caches = [LayerCache(U, config.heads, P + max_new, config.channels // config.heads, model.tokens.weight) for _ in range(config.layers)]
    seen = torch.ones(U, P + max_new, dtype=torch.long, device=device)
    seen[:, :P] = (tokens != pad).long()                          # segment 1: the conversation; 0: padding
    hidden = model.hidden(tokens, caches=caches, seen=seen[:, :P])[:, -1]                   # (U, C)

    copies = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=device)  # (B,): the number of its prompt
    hidden, seen = hidden[copies], seen[copies]
    for cache in caches:
        cache.take(copies)
    replies, rows = torch.full((B, max_new), pad, device=device), torch.arange(B, device=device)       # rows: those that are in the batch
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = model.head(hidden)
        logits[:, pad] = -torch.inf                               # padding marks where a reply is over: the model may not say it
        chosen = pick_tokens(logits, noise[rows, t], temperature, top_k, top_p)
        chosen = torch.where(ended, pad, chosen)
        replies[rows, t] = chosen
        ended |= torch.isin(chosen, stops)
        if ended.all() or t + 1 == max_new:
            break
        if ended.sum() > len(ended) / 3:                          # go on with the others; not each time one ends, for it copies the caches
            on = ~ended
            rows, seen, chosen, ended = rows[on], seen[on], chosen[on], ended[on]
            for cache in caches:
                cache.take(on)
        hidden = model.hidden(chosen[:, None], caches=caches, seen=seen[:, :P + t + 1])[:, -1]
    return [row[:row.index(pad)] if pad in row else row for row in replies.tolist()]


# ------------------------------------------------------------------------------------------------------------------
# Devices, one or several. `torchrun --nproc-per-node 2 sft.py` runs the script twice: all processes have the same model and draw the same batch,
# a function of (seed, step); each takes its share of it, and their gradients are averaged. Rank 0 alone evaluates, prints and writes.

def positive(text):
    """argparse type of a flag that counts something -> int of at least 1; otherwise argparse names the flag and stops."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few: at least 1")
    return int(text)


def pick_device(name=None):
    """cuda, else mps, else cpu; or the one named."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        raise SystemExit("this script runs as one process: start it with python and not with torchrun")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:                                    # an unknown name, or a torch that was built without it
        raise SystemExit(f"--device {name} cannot be used here ({type(error).__name__}): leave it out, or say cpu") from None
    return torch.device(name)


def autocast(device):
    """A context in which a GPU that can (Ampere and later) takes matrix products in bfloat16; weights, gradients, softmax and losses stay float32.
    Elsewhere it does nothing. Only for training: what PPO compares to the fourth decimal is computed outside of it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16) if able else contextlib.nullcontext()


def rank():
    """The number of this process: 0, or up to processes() - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def processes():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def start_training(name=None):
    """Pick this process's device and, under torchrun, join the others -> device. --out must be a folder that all of them see."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        gpus = torch.cuda.device_count() if (name or "cuda").startswith("cuda") else 0
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))    # rank 0 may tokenize or evaluate for long
        if rank():
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
            sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
            atexit.register(time.sleep, 2)                        # a mistake stops all of them: rank 0 first says which, then torchrun ends the rest
        if 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
            raise SystemExit(f"there are {gpus} GPUs: use torchrun --nproc-per-node {gpus}, or --device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}" if gpus else "cpu"
        print(f"{processes()} processes train together")
    device = pick_device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                # what is float32 goes through TF32
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def parallel(model):
    """The model, wrapped for training: under torchrun, DistributedDataParallel gives all processes the same start, and after each backward
    the mean of their gradients: the gradient of the whole batch, if each loss was multiplied by the weight of its share (see `my_share`)."""
    return DistributedDataParallel(model) if processes() > 1 else model


def my_share(batch, size):
    """A batch (a list, the same for all) -> this process's items, and the weight of their mean loss: their `size` (tokens, pairs) over the
    mean size of all shares. The mean over processes of weight * loss is then the loss of the batch; of one process, the weight is 1.

    Where there are fewer items than processes, some take the first one at weight 0, for the others wait for their gradients.
    """
    mine = batch[rank()::processes()]
    weight = sum(map(size, mine)) * processes() / sum(map(size, batch))
    return (mine if len(mine) else batch[:1]), weight


def mean_over_processes(x):
    """A tensor, with another value in each process -> the mean, in all of them."""
    if processes() > 1:
        dist.all_reduce(x := x.detach().clone())
    return x / processes()


def from_rank_0(function):
    """`function()`, computed by rank 0 while the others wait for the result."""
    result = [function() if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def finish_training():
    """Part from the other processes -> whether this is rank 0, which goes on alone to evaluate and write."""
    first = rank() == 0
    if processes() > 1:
        dist.destroy_process_group()
    return first


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save(path, **contents):
    """Write a checkpoint of plain values and tensors: first to a temporary file, then renamed, so that a crash never leaves half a file.
    Of several processes, rank 0 writes."""
    if rank():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(contents, temporary)
    os.replace(temporary, path)


def save_progress(path, step, settings, history, **parts):
    """What an interrupted run needs to go on: `parts` are models and optimizers. Nothing else is needed, since batches and samples
    are functions of (seed, step). `settings`: the flags, compared on resuming."""
    save(path, step=step, settings=settings, history=history, **{name: part.state_dict() for name, part in parts.items()})


def forget_progress(path, resume):
    """A new run forgets an interrupted one, so that a later --resume cannot take it up among other inputs. -> path"""
    if not resume:
        Path(path).unlink(missing_ok=True)
    return path


def load_progress(path, settings, **parts):
    """Fill `parts` from an interrupted run -> (the next step, the history so far)."""
    if not Path(path).exists():
        raise SystemExit(f"{path} not found: there is no interrupted run to resume; start without --resume")
    state = load(path)
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise SystemExit(f"--resume: the interrupted run had {name} = {state['settings'].get(name)}, this one has {value}; use the same flags")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["history"]


def write_results(out, stage, history=None, figures=None):
    """out/STAGE.csv, one row an evaluation (a list of dicts with the same keys), and out/STAGE.json, the final figures, a number a name."""
    Path(out).mkdir(parents=True, exist_ok=True)
    if history:
        with open(Path(out, f"{stage}.csv"), "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, history[0].keys())
            writer.writeheader()
            writer.writerows(history)
    if figures:
        Path(out, f"{stage}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def load(path, made_by=None):
    """Read a checkpoint as a dict; `weights_only` means that no code hidden in the file can run."""
    if not Path(path).exists():
        raise SystemExit(f"{path} not found: " + (f"run `python {made_by}` first" if made_by else "check the path"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                    # whatever a file that is no checkpoint makes the reader stumble over
        raise SystemExit(f"{path} is not a checkpoint of this project ({type(error).__name__})") from None


def load_gpt(path, made_by=None, device="cpu"):
    """A checkpoint, or GPT-2 by name, folder or file -> (GPT in eval mode, Tokenizer, the whole dict, whose weights are the GPT's own)."""
    if str(path) in GPT2_NAMES and not Path(path).exists():
        path = from_rank_0(lambda: find_gpt2(path))               # one downloads, all read
    checkpoint = read_gpt2(path) if Path(path).is_dir() or Path(path).suffix in (".safetensors", ".bin") else load(path, made_by)
    if "model" not in checkpoint or "tokenizer" not in checkpoint or "scale" in checkpoint:    # a scale: a reward model
        raise SystemExit(f"{path} holds no language model" + (f": run `python {made_by}` first" if made_by else ""))
    with torch.device("meta"):                                    # no memory and no random numbers for weights that are replaced at once
        model = GPT(GPTConfig(**checkpoint["config"]))
    try:
        model.load_state_dict(checkpoint["model"], assign=True)
    except RuntimeError as error:                                 # its last line says which weight is missing, unknown or of another shape
        raise SystemExit(f"{path}: the weights do not fit the configuration ({str(error).splitlines()[-1].strip()[:200]})") from None
    return model.to(device).eval(), data.Tokenizer.load(checkpoint["tokenizer"]), checkpoint


def copy_of(model):
    """A second model with the same weights: the frozen reference, the start of a reward model."""
    twin = GPT(model.config).to(model.tokens.weight.device)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def answer(model, tokenizer, questions, max_new=MAX_NEW, temperature=1.0, seed=(0,), **sampling):
    """Chat: a list of questions -> the list of the model's answers, as text."""
    prompts = [data.chat_prompt(tokenizer, q) for q in questions]
    return [data.decode_reply(tokenizer, ids) for ids in generate(model, prompts, max_new, tokenizer, temperature, seed=seed, **sampling)]


# ------------------------------------------------------------------------------------------------------------------
# GPT-2's weights (Radford et al. 2019), from Hugging Face's files and back

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")     # 124, 355, 774 and 1558 million parameters
GPT2_HUB = "https://huggingface.co/openai-community"
GPT2_FILES = ("model.safetensors", "pytorch_model.bin")
GPT2_SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")        # of config.json, in the order of GPTConfig
GPT2_KIND = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}    # what our network takes for granted
GPT2_PARTS = {"tokens.": "wte.", "positions.": "wpe.", "blocks.": "h.", "norm1.": "ln_1.", "norm2.": "ln_2.", "norm.": "ln_f.",
              "attention.qkv.": "attn.c_attn.", "attention.out.": "attn.c_proj.", "up.": "mlp.c_fc.", "down.": "mlp.c_proj."}


def find_gpt2(name):
    """The folder with the weights of "gpt2", ...: in PyTorch's cache, or Hugging Face's, or downloaded to PyTorch's (0.5 to 6.4 GB)."""
    folder = Path(torch.hub.get_dir(), "checkpoints", name)
    home = os.environ.get("HF_HOME") or Path("~", ".cache", "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    snapshots = [s for repository in (f"models--openai-community--{name}", f"models--{name}") for s in sorted(hub.glob(f"{repository}/snapshots/*"))]
    for place in [folder, *snapshots]:
        if (place / "config.json").exists() and any((place / file).exists() for file in GPT2_FILES):
            return place
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name} is not on this computer yet: downloading it to {folder}", file=sys.stderr)
    try:
        for file in ("config.json", GPT2_FILES[0]):
            torch.hub.download_url_to_file(f"{GPT2_HUB}/{name}/resolve/main/{file}", str(folder / file))     # to a temporary file, then renamed
    except Exception as error:                                    # whatever goes wrong on a network
        raise SystemExit(f"{name} could not be downloaded ({type(error).__name__}): put config.json and model.safetensors "
                         f"from {GPT2_HUB}/{name}/tree/main into {folder}") from None
    return folder


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}: the length of a header, 8 bytes; the header, JSON; then the raw numbers it describes."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(start - 8)) if start <= size else {}
            header.pop("__metadata__", None)
            end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if end > size:
                raise SystemExit(f"{path} is cut short, or no safetensors file: it has {size} bytes of {end}; delete it and fetch it again")
            tensors = {}
            for name, entry in header.items():
                if entry["dtype"] in dtypes:                      # the only others are attention masks, which nobody needs
                    first, last = entry["data_offsets"]
                    raw = torch.from_numpy(np.fromfile(path, np.uint8, last - first, offset=start + first))
                    tensors[name] = raw.view(dtypes[entry["dtype"]]).view(entry["shape"])
            return tensors
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise SystemExit(f"{path} is not a safetensors file ({type(error).__name__}): delete it and fetch it again") from None


def rename(name, parts):
    """A weight's name with each part that is a key of `parts` replaced by its value."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def read_gpt2(path):
    """A folder in Hugging Face's layout, or the file of weights in it -> what `load` gives for a checkpoint of ours.

    GPT-2 knows no chat: our three further tokens get a row each, the mean of all rows, which makes none of them likely (Hewitt 2021).
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = next((folder / name for name in GPT2_FILES if (folder / name).exists()), folder) if folder == Path(path) else Path(path)
    if not file.is_file() or not (folder / "config.json").is_file():
        raise SystemExit(f"{path}: GPT-2's weights are two files in one folder, config.json and model.safetensors (or pytorch_model.bin)")
    for name in (folder / "config.json", file):
        with open(name, "rb") as start:
            if start.read(8) == b"version ":
                raise SystemExit(f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`, or download it")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in GPT2_KIND.items():
            if config.get(key, value) != value:
                raise SystemExit(f"{folder / 'config.json'}: {key} is {config[key]!r}; only GPT-2 can be read, where it is {value!r}")
        sizes = GPTConfig(*(config[key] for key in GPT2_SIZES))
    except (ValueError, KeyError, AttributeError) as error:
        raise SystemExit(f"{folder / 'config.json'} does not describe a GPT-2 ({type(error).__name__}: {error})") from None
    weights, ours = {}, {theirs: name for name, theirs in GPT2_PARTS.items()}
    found = read_safetensors(file) if file.suffix == ".safetensors" else load(file)
    for name in list(found):
        name, weight = rename(name.removeprefix("transformer."), ours), found.pop(name)    # popped: never two copies of all in memory
        if torch.is_tensor(weight) and name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias")):    # tied head, masks
            # GPT-2 stores the matrices inside its blocks as (in, out), nn.Linear as (out, in)
            weights[name] = (weight.T if weight.dim() == 2 and name.startswith("blocks.") else weight).float().contiguous()
    tokenizer, table = config.get("tokenizer", "gpt2"), weights.get("tokens.weight")
    if tokenizer == "gpt2" and sizes.vocab_size == 50257 and table is not None:
        weights["tokens.weight"] = torch.cat([table, table.mean(0).expand(3, -1)])
        sizes.vocab_size += 3
    if tokenizer == "gpt2" and sizes.vocab_size != 50260:
        raise SystemExit(f"{folder / 'config.json'}: a vocabulary of {sizes.vocab_size} is not GPT-2's, which has 50257 tokens")
    return dict(config=vars(sizes), model=weights, tokenizer=tokenizer, world_seed=config.get("world_seed"))


def export_gpt2(model, tokenizer, folder, world_seed=None):
    """Write config.json, model.safetensors and tokenizer files to `folder`, for transformers, other libraries, and `load_gpt`."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    sizes = (config.vocab_size, config.context, config.layers, config.heads, config.channels)
    files = {"config.json": {**GPT2_KIND, "architectures": ["GPT2LMHeadModel"], **dict(zip(GPT2_SIZES, sizes)), "bos_token_id": tokenizer.eot,
                             "eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.pad, "tokenizer": tokenizer.state(), "world_seed": world_seed},
             **data.hub_tokenizer(tokenizer, config.context)}
    for name, contents in files.items():
        (folder / name).write_text(json.dumps(contents, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    header, weights, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, weight in model.state_dict().items():
        weights.append((weight.T if weight.dim() == 2 and name.startswith("blocks.") else weight).float().cpu().contiguous())
        start, end = end, end + weights[-1].nbytes
        header["transformer." + rename(name, GPT2_PARTS)] = {"dtype": "F32", "shape": list(weights[-1].shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)                           # readers map the numbers into memory, which wants them aligned
    with open(folder / "model.safetensors.tmp", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for weight in weights:
            file.write(weight.numpy())
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")


def main(argv=None):
    p = argparse.ArgumentParser(description="Chat with a checkpoint, or ask several the same question.")
    p.add_argument("checkpoints", nargs="+", help="out/sft.pt, ...; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with such weights")
    p.add_argument("--export", metavar="DIR", help="write the one checkpoint to this folder as transformers reads it, and stop")
    p.add_argument("--prompt", help="ask this and stop; without it, read questions from the terminal")
    p.add_argument("--base", action="store_true", help="continue the bare text, without the chat template: what a base model expects")
    p.add_argument("--max-new", type=int, default=64, help="longest answer, in tokens")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    p.add_argument("--top-k", type=int, help="sample among the k likeliest tokens only")
    p.add_argument("--top-p", type=float, help="sample among the likeliest tokens that together have this probability")
    p.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    args = p.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):                        # a terminal that cannot show a character gets a question mark
        sys.stdout.reconfigure(errors="replace")
    device = pick_device(args.device)
    if args.export:
        if len(args.checkpoints) > 1 or Path(args.export).is_file():
            raise SystemExit("--export takes one checkpoint and a folder: `python model.py out/ppo.pt --export DIR`")
        model, tokenizer, checkpoint = load_gpt(args.checkpoints[0])
        export_gpt2(model, tokenizer, args.export, checkpoint.get("world_seed"))
        print(f"wrote {args.export}; in Python: transformers.AutoModelForCausalLM.from_pretrained({args.export!r})")
        return
    models = [(path, *load_gpt(path, device=device)[:2]) for path in args.checkpoints]
    turn = 0
    while True:
        try:
            question = args.prompt or input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        for path, model, tokenizer in models:
            prompt = [tokenizer.eot, *tokenizer.encode(" " + question)] if args.base else data.chat_prompt(tokenizer, question)
            if len(prompt) >= model.config.context:
                print(f"That is {len(prompt)} tokens; {path} reads at most {model.config.context - 1}.", file=sys.stderr)
                continue
            reply, = generate(model, [prompt], args.max_new, tokenizer, args.temperature, args.top_k, args.top_p, seed=(args.seed, turn))
            print(f"{path + ':  ' if len(models) > 1 else ''}{data.decode_reply(tokenizer, reply)}")
        turn += 1
        if args.prompt:
            return


if __name__ == "__main__":
    main()
