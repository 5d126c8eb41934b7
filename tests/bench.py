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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "lab")]
import data
import export
import ppo
from model import GPT, GPTConfig, ScalarModel, copy_of, generate, sample, save_model

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


def tireless_policy():
    """The default network, which never says end-of-text: all answers have the full length."""
    torch.manual_seed(0)
    world = data.World(0)
    documents = [data.write_document(world, "bench", i)[1] for i in range(3000)]
    tokenizer = data.Tokenizer(data.train_bpe(data.unmark(" ".join(documents)), 1180))
    policy = GPT(GPTConfig(tokenizer.n_vocab), tokenizer).eval()
    with torch.no_grad():
        policy.norm.bias[0] = 10.0
        policy.tokens.weight[:, 0] = 0.0
        policy.tokens.weight[tokenizer.eot, 0] = -10.0
    return policy


def random_prompts(tokenizer):
    """B questions of just P tokens, the two role tokens included."""
    ids = torch.randint(0, 256, (B, P - 2))
    return [[tokenizer.user, *row, tokenizer.assistant] for row in ids.tolist()]


def time_ppo(policy, prompts):
    """Print the median seconds of an iteration's three parts, after one to warm up."""
    reference, value = copy_of(policy), ScalarModel(copy_of(policy)).eval()
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-5, eps=1e-5)
    data.chat_prompt = lambda tokenizer, i: prompts[i]     # a question is the number of its prompt
    times = []
    for step in range(6):
        began = time.perf_counter()
        batch = ppo.rollout(policy, reference, list(range(B)), R, 64, (0, step))
        answered = time.perf_counter()
        ppo.judge(batch, lambda questions, replies: torch.zeros(len(replies)), value, 0.1)
        judged = time.perf_counter()
        ppo.update(policy, value, optimizer, batch, 4, 64, 0.2)
        times.append(np.diff([began, answered, judged, time.perf_counter()]))
        assert batch["mask"].sum() == B * R
    parts = dict(zip(("rollout", "score", "update"), np.median(times[1:], axis=0)))
    print(f"{torch.get_num_threads()} threads; one PPO iteration: {sum(parts.values()):.2f} s = "
          + " + ".join(f"{name} {s:.2f}" for name, s in parts.items()))


@torch.no_grad()
def generate_without_cache(model, prompts, noise):
    """What `generate` does, but every new token reads the whole sequence again."""
    tokens = torch.tensor(prompts)
    for t in range(noise.shape[1]):
        logits = model.head(model.hidden(tokens)[:, -1])
        logits[:, model.tokenizer.pad] = -torch.inf
        tokens = torch.cat([tokens, sample(logits, noise[:, t])[:, None]], 1)
    return tokens


def time_sampling(policy, prompts):
    """Print tokens a second, and how much slower the other two ways are."""
    noise = torch.rand(B, R)
    ours = seconds(lambda: generate(policy, prompts, R))
    slow = seconds(lambda: generate_without_cache(policy, prompts, noise))
    print(f"sampling: {B * R / ours:.0f} tokens/s; without a cache {B * R / slow:.0f}, "
          f"{slow / ours:.1f} times slower")
    try:
        import transformers
    except ImportError:
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "policy.pt"), policy)
        export.main([f"{folder}/policy.pt", f"{folder}/hub"])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hub").eval()
    inputs = torch.tensor(prompts)
    options = dict(attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0,
                   max_new_tokens=R, min_new_tokens=R)
    slow = seconds(lambda: theirs.generate(inputs, **options))
    print(f"transformers {transformers.__version__} generate: {B * R / slow:.0f} tokens/s, "
          f"{slow / ours:.1f} times slower")


def main():
    policy = tireless_policy()
    prompts = random_prompts(policy.tokenizer)
    time_ppo(policy, prompts)
    time_sampling(policy, prompts)


if __name__ == "__main__":
    main()
