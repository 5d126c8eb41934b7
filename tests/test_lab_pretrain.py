"""The experiment on the base model: its losses by kind of document."""
import json

import pytest
import torch

import data
import losses_by_kind
import model as m

TOKENIZER = data.make_tokenizer("bytes", [])


def tiny_gpt(context=1000):
    torch.manual_seed(0)
    return m.GPT(m.GPTConfig(TOKENIZER.n_vocab, context, 1, 2, 16), TOKENIZER, world_seed=0)


def test_each_kind_has_its_own_losses():
    """A table in which every kind is the next one's, by a shift or by another order of packing."""
    gpt, world = tiny_gpt(), data.World(0)
    table = losses_by_kind.measure(gpt, world, 40, without=())
    documents = [data.write_document(world, "validation", i) for i in range(40)]
    for kind in ("story", "drill"):
        nats, floor, hits, count = 0.0, 0.0, [], 0
        for text, logp in [document[1:] for document in documents if document[0] == kind]:
            ids, forced = data.encode_document(TOKENIZER, text)
            logits = gpt(torch.tensor([[TOKENIZER.eot, *ids[:-1]]]))[0]
            targets = torch.tensor(ids)
            nats -= logits.log_softmax(-1)[torch.arange(len(ids)), targets].sum().item()
            hits += (logits.argmax(-1) == targets)[torch.tensor(forced)].tolist()
            floor, count = floor - logp, count + len(ids)
        expected = nats / count, floor / count, sum(hits) / len(hits)
        assert table[kind] == pytest.approx(expected, rel=1e-4)


def test_the_table_is_printed_and_recorded(tmp_path, monkeypatch, capsys):
    """A control that is compared with the floor of all kinds, though some were left out."""
    gpt = tiny_gpt(192)
    gpt.without = ["drill"]
    m.save_model(tmp_path / "pretrain.pt", gpt, documents={"story": 9})     # those that judge
    monkeypatch.setattr(losses_by_kind, "RESULTS", tmp_path / "results")
    flags = f"--out {tmp_path} --documents 60 --device cpu --record".split()
    losses_by_kind.main(flags)
    printed = capsys.readouterr().out
    assert "story" in printed and "biography" in printed and "drill" not in printed
    written = (tmp_path / "results" / "losses_by_kind.json").read_text(encoding="utf-8")
    figures = json.loads(written)
    assert figures["val_loss"] > figures["entropy_floor"] and "val_loss_loose_facts" in figures


def test_a_missing_model_names_the_script_to_run(tmp_path):
    """A traceback that ends in FileNotFoundError."""
    with pytest.raises(SystemExit, match="run `python pretrain.py` first"):
        losses_by_kind.main(["--out", str(tmp_path), "--device", "cpu"])
