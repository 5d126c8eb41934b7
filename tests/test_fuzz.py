"""What users hand over, damaged at random: a sentence that names the file, or all of it read; never
a traceback, never a part in silence. FUZZ_CASES=2000 tries more than the suite does."""
import copy
import json
import os
import random

import pytest
import torch

import data
import model as m
import pretrain
import reward
import rlaif
import sft

CASES = int(os.environ.get("FUZZ_CASES", 240))
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
RECORDS = [
    {"messages": CHAT, "system": "Be kind.", "id": 3}, {"messages": CHAT * 2, "weight": 1},
    {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    {"instruction": "Say hi.", "input": "now", "output": "Hi.", "history": [["A?", "B."]]},
    {"prompt": "Hi?", "completion": "Yes."}, {"prompt": CHAT[:1], "completion": CHAT[1]},
    {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "votes": [2, 1]},
    {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
    {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "No."}]},
    {"transcript": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rating": 1.0}, {"text": "One two."},
    {"critic": "Say what is bad.", "revision": "Make it better."}, CHAT]
ODD = [None, float("nan"), float("inf"), 0, -1, 1.5, True, False, "", " ", "\ud800", "\0",
       "x" * 999,       [], {}, [[]], [None], ["a", "b"], {"role": "user"}, CHAT[:1], 10**9]


def places(value, found=None):
    """Every (container, key) inside a record."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def damaged(rng, record):
    """A record with one to three places changed, dropped or added."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        inside = places(record)
        if not inside:
            break
        container, key = rng.choice(inside)
        what = rng.random()
        if what < 0.6:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif what < 0.8 and isinstance(container, dict):
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(["system", "history", "label", "weight", "tools", "votes",
                                  "prompt"])] = copy.deepcopy(rng.choice(ODD))
    return record


def damaged_bytes(rng, raw):
    """Bytes cut off, flipped, doubled or put in the wrong order."""
    at, what = rng.randrange(len(raw) + 1), rng.randrange(4)
    if what == 0:
        return raw[:at]
    if what == 1 and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
    return raw[:at] + raw[at // 2:] if what == 2 else raw[at:] + raw[:at]


def one_sentence(stop, path):
    """A SystemExit of ours: it names the file, and is short."""
    words = str(stop.value if hasattr(stop, "value") else stop)
    assert path.name.split(".")[0] in words and len(words) < 900, words


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_of_records(seed, tmp_path):
    """KeyError: 'content', in somebody else's file, and a record that is lost without a word."""
    rng = random.Random(f"fuzz records {seed}")
    readers = [data.read_conversations, data.read_preferences, data.read_prompts,
               data.read_constitution_file, lambda path: list(data.stream_text(path))]
    for case in range(CASES // 4):
        base = rng.choice(RECORDS)
        records = [base, *(damaged(rng, base) for _ in range(rng.randint(1, 3)))]
        rng.shuffle(records)
        text = "\n".join(map(json.dumps, records)) if rng.random() < 0.7 else json.dumps(records)
        raw = text.encode("utf-8")
        whole = rng.random() < 0.7
        path = tmp_path / f"case{case}{rng.choice(['.jsonl', '.json', '.txt', '', '.NDJSON'])}"
        path.write_bytes(raw if whole else damaged_bytes(rng, raw))
        for read in readers:
            try:
                found = read(path)
            except SystemExit as stop:
                one_sentence(stop, path)
                continue
            if whole and isinstance(found, tuple) and "\n" in text:        # nothing is lost
                assert len(found[0]) + sum(found[1].values()) == len(records), text
            if isinstance(found, tuple) and found[0] and read is data.read_conversations:
                for turns in found[0]:
                    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
                    assert all(said.strip() for _, said in turns)


def test_damaged_checkpoints(tmp_path):
    """Weights in which a bit has turned over, learnt from for a night; a traceback from torch.load
    for a file of another program."""
    rng, tokenizer = random.Random("fuzz checkpoints"), data.make_tokenizer("bytes", [])
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(tokenizer.n_vocab, 32, 1, 2, 16), tokenizer, world_seed=0)
    good, path = tmp_path / "good.pt", tmp_path / "bad.pt"
    m.save_model(good, gpt)
    raw, contents = good.read_bytes(), m.load(good)
    for case in range(CASES):
        if case % 2:
            path.write_bytes(damaged_bytes(rng, raw))
        else:
            changed = copy.deepcopy(contents)
            container, key = rng.choice([(changed, key) for key in changed]
                                        + [(changed["config"], key) for key in changed["config"]]
                                        + [(changed["model"], key) for key in changed["model"]])
            if rng.random() < 0.3:
                del container[key]
            else:
                odd = [*ODD, torch.full((3,), torch.nan), torch.zeros(272, 16) / 0]
                container[key] = rng.choice([value for value in odd if value != "\ud800"])
            torch.save(changed, path)
        for load in (m.load_gpt, lambda path: reward.load_reward(path, gpt)):
            try:
                loaded = load(path)
            except SystemExit as stop:
                one_sentence(stop, path)
                continue
            if case % 2:                                   # then nothing that matters was changed
                for weight, other in zip(loaded.parameters(), gpt.parameters()):
                    assert torch.equal(weight, other)


FLAGS = {pretrain: ["--steps", "--lr", "--muon-lr", "--warmup", "--decay", "--context", "--heads",
                    "--muon-momentum", "--batch-size", "--vocab-size", "--world-seed", "--seed"],
         sft: ["--demonstrations", "--epochs", "--lr", "--replay-rows", "--seed", "--batch-size"],
         rlaif: ["--red-team", "--rounds", "--clamp", "--beta", "--clip", "--sl-lr"]}


@pytest.mark.parametrize("stage", FLAGS, ids=lambda stage: stage.__name__)
def test_odd_flags(stage, capsys):
    """A flag of no sense, found out after an hour: ValueError: Seed must be between 0 and 2**32."""
    rng = random.Random(f"fuzz flags {stage.__name__}")
    for _ in range(CASES // 4):
        flag, value = rng.choice(FLAGS[stage]), rng.choice(["nan", "x", "", "1e999", "0x1", "[]"])
        with pytest.raises(SystemExit):
            stage.read_args([f"{flag}={value}"])
    assert "Traceback" not in capsys.readouterr().err
