"""Speed, as ratios side by side in one run: python tests/bench.py (transformers is optional). Not a
test: run it on a machine that does nothing else.

1. one PPO iteration: 128 prompts of 16 tokens, answers of 32, separate value model, 4 epochs, the
default network
2. sampling those answers with our cache, without one, and with transformers' generate on the same
weights
"""
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import ppo
from model import GPT, GPTConfig, ScalarModel, copy_of, export_gpt2, generate, pick_tokens

B, P, R = 128, 16, 32


def seconds(function, repeats=5):
    """Median wall time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


@torch.no_grad()
def generate_without_cache(model, prompts, max_new, pad, noise):
    """What `generate` does, but every new token reads the whole sequence again."""
    tokens = torch.tensor(prompts)
    for t in range(max_new):
        logits = model.head(model.hidden(tokens)[:, -1])
        logits[:, pad] = -torch.inf
        tokens = torch.cat([tokens, pick_tokens(logits, noise[:, t])[:, None]], 1)
    return tokens


def main():
    torch.manual_seed(0)
    tokenizer = data.Tokenizer(
        data.train_bpe(
            data.unmark(
                " ".join(data.write_document(data.World(0), "bench", i)[1] for i in range(3000))
            ),
            1180,
        )
    )
    policy = GPT(GPTConfig(tokenizer.n_vocab)).eval()
    # nobody says end-of-text, so that all answers have the full length
    with torch.no_grad():
        policy.norm.bias[0] = 10.0
        policy.tokens.weight[:, 0] = 0.0
        policy.tokens.weight[tokenizer.eot, 0] = -10.0
    reference, value = copy_of(policy), ScalarModel(copy_of(policy)).eval()
    # a question, between the two role tokens
    ids = torch.randint(0, 256, (B, P - 2))
    prompts = [[tokenizer.user, *row, tokenizer.assistant] for row in ids.tolist()]
    questions = list(range(B))
    data.chat_prompt = lambda tokenizer, i: prompts[i]            # prompts of just this length
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-5, eps=1e-5)
    parts = {"rollout": [], "score": [], "update": []}
    for step in range(6):
        batch = ppo.rollout(
            policy,
            reference,
            value,
            tokenizer,
            questions,
            lambda q, r: torch.zeros(len(r)),
            0.1,
            R,
            -1.0,
            64,
            (0, step),
        )
        assert batch["mask"].sum() == B * R
        began = time.perf_counter()
        ppo.update(policy, value, optimizer, batch, 4, 0.2)
        for name, s in (batch["seconds"] | {"update": time.perf_counter() - began}).items():
            parts[name].append(s)
    parts = {name: float(np.median(s[1:])) for name, s in parts.items()}
    print(
        f"{torch.get_num_threads()} threads; one PPO iteration: {sum(parts.values()):.2f} s = "
        + " + ".join(f"{name} {s:.2f}" for name, s in parts.items())
    )

    noise = torch.rand(B, R)
    ours = seconds(lambda: generate(policy, prompts, R, tokenizer))
    slow = seconds(lambda: generate_without_cache(policy, prompts, R, tokenizer.pad, noise))
    print(
        f"sampling: {B * R / ours:.0f} tokens/s; without a cache {B * R / slow:.0f}, {slow / ours:.1f} times slower"
    )
    try:
        import transformers
    except ImportError:
        return
    with tempfile.TemporaryDirectory() as folder:
        export_gpt2(policy, tokenizer, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = torch.tensor(prompts)
    theirs_s = seconds(
        lambda: theirs.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=0,
            max_new_tokens=R,
            min_new_tokens=R,
        )
    )
    print(
        f"transformers {transformers.__version__} generate: {B * R / theirs_s:.0f} tokens/s, {theirs_s / ours:.1f} times slower"
    )


if __name__ == "__main__":
    main()
