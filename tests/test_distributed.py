"""Two processes under torchrun against one: the same batches, the same gradients, the same model.
Run by torchrun, this file is the program they run."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_stages as stages
import torch

import data
import model as m
import ppo
import pretrain
import reward
import sft

TOKENIZER = data.make_tokenizer("bytes", [])
ROOT = Path(__file__).parent.parent
ANSWERS = ["Ann.", "In Rome, where it rains.", "No.", "Tom has a goat and a horse.", "Yes."]
needs_torchrun = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_available(),
    reason="torchrun does not work everywhere")


def torchrun(script, *arguments):
    """Run a script in two processes on the CPU -> (exit status, what all of them printed)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", timeout=300)
    return done.returncode, done.stdout


def tiny_gpt():
    torch.manual_seed(0)
    return m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 64, 2, 2, 32), TOKENIZER).train()


def test_gradients_of_processes_are_averaged(monkeypatch):
    """Their sum: Adam hides it, but clipping does not, and two processes go another way than one.
    """
    gpt = tiny_gpt()
    pretrain.next_token_loss(gpt(torch.tensor([[1, 2]])), torch.tensor([[2, 3]])).backward()
    for p in gpt.parameters():
        p.grad *= 1e-3                                     # a norm below 1: nothing to clip
    before = [p.grad.clone() for p in gpt.parameters()]
    monkeypatch.setattr(m, "processes", lambda: 2)         # and the other one has the same gradient
    monkeypatch.setattr(m.dist, "all_reduce", lambda x: x.mul_(2))
    m.average_and_clip(gpt)
    assert all(torch.equal(p.grad, old) for p, old in zip(gpt.parameters(), before))


def uneven_batch(step):
    """Four rows with very different amounts of padding."""
    rows = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(step))
    rows[:, 0] = TOKENIZER.eot
    for i, row in enumerate(rows):
        row[30 - 9 * i:] = TOKENIZER.pad
    return pretrain.split_rows(rows, TOKENIZER)


def pretrain_twice(folder):
    """Six steps at once, then the last three again from what was kept after the third -> two pairs
    of (history, model)."""
    args = argparse.Namespace(steps=6, lr=3e-3, muon_lr=0.005, muon_momentum=0.95, warmup=2,
                              decay=0.5, eval_every=1, grad_accum=2, compile=False, resume=False,
                              fresh=False)
    again = argparse.Namespace(**vars(args) | {"resume": True})

    def evaluate():
        """Rank 0 alone is asked; it also puts aside the progress as it was after step 3."""
        if (folder / "p.pt").exists() and m.load(folder / "p.pt")["step"] == 3:
            shutil.copy(folder / "p.pt", folder / "p3.pt")
        assert m.rank() == 0
        return {"val": 0.0}

    gpt, resumed = tiny_gpt(), tiny_gpt()
    history = pretrain.train(gpt, uneven_batch, args, evaluate, (folder / "p.pt", args))
    m.mean_over_processes(torch.zeros(1))                  # wait for the copy
    rest = pretrain.train(resumed, uneven_batch, again, evaluate, (folder / "p3.pt", again))
    return (history, gpt), (rest, resumed)


def fine_tune(folder):
    """Batches of 4, and a last one of 1: fewer than processes; two rows of text beside each."""
    text = folder / f"text{m.rank()}.txt"                  # the same, but none reads a half-written
    text.write_text("The cat sat on the mat.\n" * 60, encoding="utf-8")
    args = argparse.Namespace(epochs=2, batch_size=4, lr=1e-3, seed=0, resume=False, fresh=False,
                              replay_rows=2, replay=str(text), out=str(folder))
    gpt, progress = tiny_gpt(), (folder / "s.pt", args)
    conversations = [("Who?" * (i % 3 + 1), ANSWERS[i % 5]) for i in range(21)]
    return sft.train(gpt, conversations, args, progress), gpt


def fit_rewards(folder):
    """Five questions with 1 to 6 pairs each, two a batch."""
    torch.manual_seed(0)
    judge, groups = m.ScalarModel(tiny_gpt()), []
    for i in range(5):
        answers = ANSWERS[:2 + i % 3]
        pairs = [(a, b) for a in range(len(answers)) for b in range(a)]
        groups.append(("Who?", answers, [(a, b, 1.0 - 0.2 * i) for a, b in pairs]))
    progress = folder / "r.pt", argparse.Namespace(resume=False, fresh=False)
    return reward.train(judge, groups, 1, 2, 1e-3, 0, progress), judge


def reinforce(folder):
    """Seven answers a rollout, three a minibatch, and a last one of one: fewer than processes."""
    torch.manual_seed(0)
    policy, judge = tiny_gpt(), m.ScalarModel(tiny_gpt())
    judge.scale = {"mean": 0.0, "std": 1.0, "lowest": -1.0}
    sizes = "--iterations 3 --batch-size 7 --minibatch 3 --epochs 2 --max-new 12 --replay-rows 0"
    rates = ["--lr", "1e-3", "--value-lr", "1e-2", "--out", str(folder)]
    args = ppo.read_args([*sizes.split(), *rates])
    questions_at = lambda step: ["Who?" * (i % 3 + 1) for i in range(7)]
    value, score = ppo.value_from(judge), ppo.score_by_model(judge)
    history = ppo.train(policy, value, questions_at, score, args)
    names = ("score", "kl_nats", "policy_loss", "value_loss", "approx_kl", "clipfrac", "eos_rate")
    return [{"train_loss_nats": row[name]} for row in history for name in names], policy


def train_all(folder):
    """The four `train` functions with tiny settings -> name -> (losses, norm of the gradient at
    each step, outputs of the trained model)."""
    figures, norms, clip = {}, [], torch.nn.utils.clip_grad_norm_
    tokens, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)

    def keep(name, history, model):
        with torch.no_grad():
            outputs = model(tokens, mask)
        same = torch.allclose(m.mean_over_processes(outputs), outputs, atol=1e-7)
        assert same, f"{name}: the processes have different models"
        losses = [row["train_loss_nats"] for row in history]
        figures[name] = losses, list(norms), outputs

    def clip_and_note(*args):
        norm = clip(*args)
        norms.append(norm.item())
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_and_note
    try:
        whole, resumed = pretrain_twice(folder)
        keep("pretrain", *whole)
        keep("resumed", *resumed)
        for train in (fine_tune, fit_rewards, reinforce):
            norms.clear()
            keep(train.__name__, *train(folder))
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    return figures


@pytest.mark.slow
@needs_torchrun
def test_two_processes_train_like_one(tmp_path):
    """Means of means, data read twice or not at all, a resumed run that differs: all look healthy,
    and train another model than one GPU would."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = train_all(tmp_path / "one")
    status, printed = torchrun(__file__, tmp_path / "two")
    assert status == 0, printed
    two = torch.load(tmp_path / "two" / "figures.pt")
    for name, (losses, norms, outputs) in one.items():
        assert two[name][0] == pytest.approx(losses, abs=1e-5), name
        assert two[name][1] == pytest.approx(norms, rel=1e-4), name
        assert torch.allclose(two[name][2], outputs, atol=1e-4), name
    assert one["resumed"][0] == one["pretrain"][0] and max(one["pretrain"][1]) > 0.1
    assert len(one["fine_tune"][1]) == 12
    # policy and value, three rollouts, twice three minibatches
    assert len(one["reinforce"][1]) == 36 and one["reinforce"][0][1] == 0 < one["reinforce"][0][-6]


def read_csv(path):
    _, *rows = path.read_text(encoding="utf-8").splitlines()
    return [[float(x) for x in row.split(",")] for row in rows]


@pytest.mark.slow
@needs_torchrun
def test_the_script_in_two_processes(tmp_path, capsys):
    """Files written by two processes at once, bars and tables printed twice, or a mistake of the
    user's that prints two tracebacks."""
    one, two, text = tmp_path / "one", tmp_path / "two", tmp_path / "verse.txt"
    text.write_text("Zoë mends a kite; the wind mends Zoë.\n" * 200, encoding="utf-8")
    flags = ("--steps 4 --batch-size 4 --grad-accum 2 --layers 1 --heads 2 --channels 16 --context "
             f"32 --eval-every 2 --tokenizer bytes --device cpu --data {text} --out").split()
    pretrain.main([*flags, str(one)])
    status, printed = torchrun(ROOT / "pretrain.py", *flags, two)
    counts = printed.count("wrote "), printed.count("2 processes")
    assert (status, *counts) == (0, 1, 1), printed
    rows, others = read_csv(one / "pretrain.csv"), read_csv(two / "pretrain.csv")
    assert len(rows) == 2
    assert [row == pytest.approx(other, abs=1e-4) for row, other in zip(rows, others)] == [True] * 2

    pairs = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"Who is {i}?", "chosen": "Me.", "rejected": "You"} for i in range(25)]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    flags = (f"--data {pairs} --init {one / 'pretrain.pt'} --epochs 2 --batch-size 4 --device cpu "
             "--out").split()
    reward.main([*flags, str(one)])
    status, printed = torchrun(ROOT / "reward.py", *flags, two)
    counts = printed.count("wrote "), printed.count("held-out prompts")
    assert (status, *counts) == (0, 1, 1), printed
    figures, others = (json.loads((out / "reward.json").read_text()) for out in (one, two))
    assert others == pytest.approx(figures, abs=1e-4)

    status, printed = torchrun(ROOT / "sft.py", "--out", tmp_path / "nowhere", "--device", "cpu")
    assert status != 0 and "FileNotFoundError" not in printed
    assert printed.count("pretrain.pt not found: run `python pretrain.py` first") == 1


def run_stage(folder, stage):
    """A stage with tiny settings; two rows of documents a step, for one cannot be shared."""
    replay = ["--replay-rows", "2"] if stage in ("ppo", "rlaif") else []
    with pytest.MonkeyPatch.context() as patch:
        stages.smaller_evaluations(patch)
        stages.run(stage, folder, *replay)


@pytest.mark.slow
@needs_torchrun
def test_reinforcement_in_two_processes(tmp_path):
    """Answers that depend on who samples them, scores and values of half of a batch, a checkpoint
    read before it is written: PPO that works on one GPU alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    for stage in stages.MODULES:
        run_stage(one, stage)
    two.mkdir()
    for name in ("pretrain.pt", "sft.pt", "reward.pt", "preferences.jsonl"):
        shutil.copy(one / name, two / name)
    for stage in ("ppo", "rlaif"):
        status, printed = torchrun(__file__, two, stage)
        assert (status, printed.count("wrote "), printed.count("2 processes")) == (0, 1, 1), printed
        rows, others = read_csv(one / f"{stage}.csv"), read_csv(two / f"{stage}.csv")
        close = lambda x: pytest.approx(x, rel=1e-4, abs=1e-3)
        assert [row == close(other) for row, other in zip(rows, others)] == [True] * len(rows)
        figures, others = (json.loads((out / f"{stage}.json").read_text()) for out in (one, two))
        assert others == close(figures)
    for name in ("rlaif_traces.jsonl", "rlaif_labels.jsonl"):
        traces, others = ((out / name).read_text(encoding="utf-8") for out in (one, two))
        assert traces.count("\n") == others.count("\n") > 5
    for name in ("ppo", "slcai", "rlaif_pm", "rlaif"):
        a, b = (m.load(out / f"{name}.pt")["model"] for out in (one, two))
        assert all(torch.allclose(a[key], b[key], atol=1e-3) for key in a), name


def test_a_batch_that_cannot_be_shared_evenly(monkeypatch):
    """Micro-batches of different sizes, which would be right, and slower than they look; and
    scripts that know nothing of torchrun."""
    with pytest.raises(SystemExit, match="a multiple of --grad-accum"):
        pretrain.main(["--batch-size", "8", "--grad-accum", "3", "--device", "cpu"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit, match="one process"):
        m.pick_device("cpu")


def test_shares_by_hand(monkeypatch):
    """A mean of means: the three tokens of a short answer count as much as the thirty of a long."""
    assert m.my_share([1, 4, 2], lambda tokens: tokens) == ([1, 4, 2], 1)
    monkeypatch.setattr(m, "processes", lambda: 2)
    assert m.my_share([1, 4, 2], lambda tokens: tokens) == ([1, 2], 2 * 3 / 7)
    monkeypatch.setattr(m, "rank", lambda: 1)
    assert m.my_share([1, 4, 2], lambda tokens: tokens) == ([4], 2 * 4 / 7)
    # too few for all: something to read, and it does not count
    assert m.my_share([1], lambda tokens: tokens) == ([1], 0)


if __name__ == "__main__" and len(sys.argv) == 3:          # by torchrun: OUT, and a stage
    run_stage(Path(sys.argv[1]), sys.argv[2])
elif __name__ == "__main__":
    m.start_training("cpu")
    folder = Path(sys.argv[1])
    figures = train_all(folder)
    m.save(folder / "figures.pt", **figures)
    m.finish_training()
