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
import torch

import data
import model as m
import pretrain
import reward
import sft

TOKENIZER = data.make_tokenizer("bytes", [])
ROOT = Path(__file__).parent.parent
needs_torchrun = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_available(),
    reason="torchrun does not work everywhere",
)


def torchrun(script, *arguments):
    """Run a script in two processes on the CPU -> (exit status, what all of them printed)."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        *map(str, arguments),
    ]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
    return done.returncode, done.stdout


def tiny_gpt():
    torch.manual_seed(0)
    return m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 64, 2, 2, 32)).train()


def uneven_batch(step):
    """Four rows with very different amounts of padding."""
    rows = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(step))
    rows[:, 0] = TOKENIZER.eot
    for i, row in enumerate(rows):
        row[30 - 9 * i:] = TOKENIZER.pad
    return pretrain.split_rows(rows, TOKENIZER)


def pretrain_args(resume=False):
    return argparse.Namespace(
        lr=3e-3,
        muon_lr=0.005,
        muon_momentum=0.95,
        warmup=2,
        decay=0.5,
        eval_every=1,
        grad_accum=2,
        compile=False,
        resume=resume,
    )


def train_all(folder):
    """The three `train` functions with tiny settings -> name -> (losses, norm of the gradient at
    each step, outputs of the trained model)."""
    figures, norms, clip = {}, [], torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda *args: norms.append(clip(*args).item())
    tokens, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)

    def keep(name, history, model):
        with torch.no_grad():
            outputs = model(tokens, mask)
        assert torch.allclose(m.mean_over_processes(outputs), outputs, atol=1e-7), (
            f"{name}: the processes have different models"
        )
        figures[name] = [row["train_loss_nats"] for row in history], list(norms), outputs
        norms.clear()

    # rank 0 alone is asked; it also keeps the progress as it was after step 3
    def evaluate():
        if (folder / "p.pt").exists() and m.load(folder / "p.pt")["step"] == 3:
            shutil.copy(folder / "p.pt", folder / "p3.pt")
        assert m.rank() == 0
        return {"val": 0.0}

    gpt = tiny_gpt()
    keep(
        "pretrain",
        pretrain.train(gpt, uneven_batch, 6, pretrain_args(), evaluate, folder / "p.pt")[0],
        gpt,
    )
    m.mean_over_processes(torch.zeros(1))                         # wait for the copy
    gpt = tiny_gpt()
    history, _ = pretrain.train(
        gpt, uneven_batch, 6, pretrain_args(resume=True), evaluate, folder / "p3.pt"
    )
    keep("resumed", history, gpt)

    gpt, answers = (
        tiny_gpt(),
        ["Ann.", "In Rome, where it rains.", "No.", "Tom has a goat and a horse.", "Yes."],
    )
    # batches of 4, and a last one of 1: fewer than processes
    conversations = [("Who?" * (i % 3 + 1), answers[i % 5]) for i in range(21)]
    keep(
        "sft",
        sft.train(gpt, TOKENIZER, conversations, 2, 4, 1e-3, 0, progress=folder / "s.pt"),
        gpt,
    )

    torch.manual_seed(0)
    judge = m.ScalarModel(tiny_gpt())
    groups = [
        (
            "Who?",
            answers[: 2 + i % 3],
            [(a, b, 1.0 - 0.2 * i) for a in range(2 + i % 3) for b in range(a)],
        )
        for i in range(5)
    ]
    keep(
        "reward",
        reward.train(judge, TOKENIZER, groups, 2, 1e-3, 0, progress=folder / "r.pt"),
        judge,
    )
    torch.nn.utils.clip_grad_norm_ = clip
    return figures


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
    assert (
        one["resumed"][0] == one["pretrain"][0]
        and len(one["sft"][1]) == 12
        and max(one["pretrain"][1]) > 0.1
    )


@needs_torchrun
def test_the_script_in_two_processes(tmp_path, capsys):
    """Files written by two processes at once, bars and tables printed twice, or a mistake of the
    user's that prints two tracebacks."""
    text = tmp_path / "verse.txt"
    text.write_text("Zoë mends a kite; the wind mends Zoë.\n" * 200, encoding="utf-8")
    flags = (
        "--steps 4 --batch-size 4 --grad-accum 2 --layers 1 --heads 2 --channels 16 --context 32 --eval-every 2 --tokenizer bytes --device cpu "
        f"--data {text} --out"
    ).split()
    pretrain.main([*flags, str(tmp_path / "one")])
    status, printed = torchrun(ROOT / "pretrain.py", *flags, tmp_path / "two")
    assert status == 0 and printed.count("wrote ") == 1 and printed.count("2 processes") == 1, (
        printed
    )
    one, two = (
        [
            [float(x) for x in line.split(",")]
            for line in (tmp_path / n / "pretrain.csv").read_text().splitlines()[1:]
        ]
        for n in ("one", "two")
    )
    assert [row == pytest.approx(other, abs=1e-4) for row, other in zip(one, two)] == [True, True]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"Who is {i}?", "chosen": "Me.", "rejected": "You"}) + "\n"
            for i in range(25)
        )
    )
    flags = f"--data {pairs} --init {tmp_path / 'one' / 'pretrain.pt'} --epochs 2 --batch-size 4 --device cpu --out".split()
    reward.main([*flags, str(tmp_path / "one")])
    status, printed = torchrun(ROOT / "reward.py", *flags, tmp_path / "two")
    assert (
        status == 0 and printed.count("wrote ") == 1 and printed.count("held-out prompts") == 1
    ), printed
    one, two = (json.loads((tmp_path / n / "reward.json").read_text()) for n in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)
    status, printed = torchrun(ROOT / "sft.py", "--out", tmp_path / "nowhere", "--device", "cpu")
    assert (
        status != 0
        and printed.count("pretrain.pt not found: run `python pretrain.py` first") == 1
        and "FileNotFoundError" not in printed
    )


def test_a_batch_that_cannot_be_shared_evenly(monkeypatch):
    """Micro-batches of different sizes, which would be right, and slower than they look; and
    scripts that know nothing of torchrun."""
    with pytest.raises(SystemExit, match="choose a multiple"):
        pretrain.main(["--batch-size", "8", "--grad-accum", "3", "--device", "cpu"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="run as one process"):
        patch.setattr(reward, "processes", lambda: 2)
        reward.main(["--best-of", "4", "--device", "cpu"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit, match="one process"):
        m.pick_device("cpu")


if __name__ == "__main__":
    m.start_training("cpu")
    folder = Path(sys.argv[1])
    figures = train_all(folder)
    m.save(folder / "figures.pt", **figures)
    m.finish_training()
