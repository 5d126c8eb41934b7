"""What does PPO make of a reward that you write down yourself, or of the true taste itself?

    python docs/lab/own_reward.py brief.py:score --init out/sft.pt --out out/brief
    python docs/lab/own_reward.py gold --init out/sft.pt --out out/gold
The first: brief.py defines score(question, answer) -> a number, such as -len(answer.split()). The
second: the gold judge, whom a reward model can only guess from labels. Flags, files: as ppo.py."""
import argparse
import runpy
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import data
import model as m
import ppo
from reward import preference_prompts

COLUMNS = {"kl": "kl_nats", "score": "score", "length": "length_tokens", "eos_rate": "eos_rate"}
LARGEST = 1e9                     # float32 holds the squares of such rewards, and sums of these

def call(path, function, *arguments):
    """function(*arguments), or a sentence that names the line of the user's file where it fails."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:   # where it names no file, its lineno is of other text
        places = [*traceback.extract_tb(error.__traceback__), *[error] * hasattr(error, "lineno")]
        lines = [f", line {x.lineno}" for x in places if getattr(x, "filename", 0) == path]
        raise SystemExit(f"{path}{['', *lines][-1]}: {type(error).__name__}: {error}") from None

def own_reward(where):
    """`file.py:function` -> that function, which stops the run if it fails or gives no number."""
    path, _, name = where.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))   # where its own imports are, too
    function = call(path, runpy.run_path, path).get(name) if Path(path).is_file() else None
    if not callable(function):
        raise SystemExit(f"{where}: say gold, or file.py:function, of (question, answer) -> number")
    def checked(question, text):
        number = call(path, function, question, text)
        real = isinstance(number, (int, float, np.integer, np.floating))
        if real and abs(number) > LARGEST:     # an int may even have too many digits to be shown
            raise SystemExit(f"{where}: more than {LARGEST:g} is too large: {question!r}, {text!r}")
        if not real or number != number:       # nan is no number
            raise SystemExit(f"{where} should return a number: {question!r}, {text!r}: {number!r}")
        return number
    return checked

def score_by_function(function, tokenizer, reference_answers):
    """-> score_answers, for ppo.judge. The reference's [(question, answer)] set its scale as they
    set a reward model's, so that a nat of KL costs as much: numbers 10 20 30 -> -1.22 0 1.22."""
    raw = torch.tensor([float(function(question, text)) for question, text in reference_answers])
    mean, std = raw.mean(), raw.std(correction=0)
    std = torch.where(std < 1e-6, 1.0, std)                # all alike: a reward earned seldom
    scale = {"mean": mean, "std": std, "lowest": ((raw.min() - mean) / std).item()}
    def score_answers(questions, replies):
        texts = [data.decode_reply(tokenizer, reply) for reply in replies]
        raw = torch.tensor([float(function(q, text)) for q, text in zip(questions, texts)])
        return ppo.on_scale(raw, replies, scale, tokenizer)
    return score_answers

def main(argv=None):
    p = argparse.ArgumentParser(description="PPO against a function, or against the gold judge.")
    p.add_argument("reward", help="gold, or file.py:function")
    p.add_argument("--prompts", help="a file of prompts; default: the world's questions")
    p.add_argument("--eval-prompts", type=m.positive, default=1000, help="held-out questions")
    ppo.ppo_flags(p)
    m.common_flags(p, "default: OUT/sft.pt", "seed of prompts, samples and data order")
    args = p.parse_args(argv)
    ppo.check_warmup(args)
    if args.prompts and args.reward == "gold":
        raise SystemExit("the gold judge knows nothing about --prompts of your own: leave one out")
    own = own_reward(args.reward) if args.reward != "gold" else None   # before the work
    torch.manual_seed(args.seed)                           # the value model's head is new
    out = Path(args.out)
    policy = m.load_gpt(args.init or out / "sft.pt", "sft.py", m.pick_device(args.device))
    m.gentle_rates(args, policy, **ppo.RATES)
    before, world = m.copy_of(policy), None if args.prompts else data.world_of(policy)
    prompts = preference_prompts(world, "train", 4000) if world else data.read_prompts(args.prompts)
    prompts = ppo.prompts_that_fit(prompts, policy.tokenizer, policy.config.context - args.max_new)
    utility = lambda question, text: data.utility(world, question, text)
    texts = m.answer(policy, prompts[:256], args.max_new, seed=(args.seed, 48))    # for the scale
    score_answers = score_by_function(own or utility, policy.tokenizer, list(zip(prompts, texts)))
    value = m.ScalarModel(m.copy_of(policy)).to(policy.device)     # no reward model to start from
    def questions_at(step):                                # as in ppo.py
        drawn = np.random.default_rng([args.seed, 5, step])
        return [prompts[i] for i in drawn.integers(0, len(prompts), args.batch_size)]
    gold = (lambda asked, texts: list(map(utility, asked, texts))) if world else None
    history = ppo.train(policy, value, questions_at, score_answers, args, gold,
                        (out / "ppo.resume.pt", args))
    m.save_model(out / "ppo.pt", policy)
    more = world and ppo.evaluate(policy, before, world, args.eval_prompts, args.seed, "polite")
    figures = {name: history[-1][column] for name, column in COLUMNS.items()} | (more or {})
    data.write_results(out, "ppo", history, figures)
    print("  ".join(f"{name} {x:.3g}" for name, x in figures.items()))

if __name__ == "__main__":
    main()
