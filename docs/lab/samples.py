"""What could the SFT model say? Many answers of it to each of some held-out questions, with the
reward model's score and the gold utility: what best_of_n.py and frontier.py choose from.

    python docs/lab/samples.py    reads OUT/sft.pt, reward.pt; writes OUT/samples.jsonl

One line a question: {"question", "texts", "scores", "gold"}, the latter three a list of an entry an
answer. Scores are on reward.py's scale: 0 is the mean of SFT answers, 1 their standard deviation.

Found (first edition, seed 0): many answers to a question are the same. To choose the best of 256
costs 2.98 nats of KL (best_of_n.py), and would cost 4.55 if all of them were different.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from tqdm import tqdm

import data
import ppo
import reward
from model import MAX_NEW, generate, load_gpt, natural, pick_device, positive, writable

def samples_of(policy, reward_model, world, question, n, seed):
    """n answers to a question at temperature 1 -> a record of OUT/samples.jsonl."""
    tokenizer, taste = policy.tokenizer, reward_model.taste or "polite"
    prompt = data.chat_prompt(tokenizer, question)
    replies = generate(policy, [prompt] * n, MAX_NEW, seed=seed)
    texts = [data.decode_reply(tokenizer, reply) for reply in replies]
    different = list(dict.fromkeys(texts))                 # they are few: each is judged once
    raw = reward.score_texts(reward_model, [(question, text) for text in different]).tolist()
    raw_of = dict(zip(different, raw))
    gold_of = {text: data.utility(world, question, text, taste) for text in different}
    # a text that was cut short may also be one that ended: it is the reply that says which
    raw = torch.tensor([raw_of[text] for text in texts], dtype=torch.float64)
    scores = ppo.on_scale(raw, replies, reward_model.scale, tokenizer)
    return {"question": question, "texts": texts, "scores": scores.tolist(),
            "gold": [gold_of[text] for text in texts]}


def main(argv=None):
    p = argparse.ArgumentParser(description="Sample many answers to each held-out question.")
    p.add_argument("--prompts", type=positive, default=400, help="held-out questions")
    p.add_argument("--samples", type=positive, default=256, help="answers to each")
    p.add_argument("--init", help="the model that answers; default: OUT/sft.pt")
    p.add_argument("--out", type=writable, default="out", help="of reward.pt, and of the samples")
    p.add_argument("--seed", type=natural, default=0, help="seed of the answers")
    p.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    args = p.parse_args(argv)
    out = Path(args.out)
    policy = load_gpt(args.init or out / "sft.pt", "sft.py", pick_device(args.device))
    reward_model = reward.load_reward(out / "reward.pt", policy)
    world, lines = data.world_of(policy), []
    questions = reward.preference_prompts(world, "test", args.prompts)
    for k, question in enumerate(tqdm(questions, f"{args.samples} answers each", unit="prompt")):
        seed = (args.seed, 44, k)
        record = samples_of(policy, reward_model, world, question, args.samples, seed)
        lines.append(json.dumps(record) + "\n")
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")    # all, or nothing
    print(f"wrote {out / 'samples.jsonl'}; next: python docs/lab/best_of_n.py, or frontier.py")


if __name__ == "__main__":
    main()
