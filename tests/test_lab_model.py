"""docs/lab/export.py, against the library it writes for, and docs/lab/pictures.py."""
import csv
import io
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"                         # transformers must not look anything up

import numpy as np
import pytest
import torch

import data
import export
import model as m
import pictures

VERSE = ("First Citizen:\nBefore we proceed any further, hear me speak.\n\n"
         "All: What, ho! 'tis I; we'll not be wrong'd: they'd say\n\n  'What's he?'")
UNICODE = ("Zoë, naïve café: 中文字符, हिन्दी नमस्ते, می‌خواهم, 👨‍👩‍👧😀, ½²Ⅷ٣٤ x‿y _a_b__ \t\n\n "
           "a\u00a0b\u0085c\u200bd\ufeff 1234 aaaaaaa ---- \r\n  \n")


@pytest.fixture(scope="module")
def texts():
    """A page of the world, and what a rule for splitting text into words may get wrong."""
    world = data.World(0)
    documents = [data.write_document(world, "train", i)[1] for i in range(300)]
    return [data.unmark("\n".join(documents)), VERSE, UNICODE]


def exported(name, texts, folder):
    """A random model with decided opinions and one of the three tokenizers, exported to `folder`.
    """
    try:
        tokenizer = data.make_tokenizer(name, [*texts, UNICODE * 2], 1280)
    except SystemExit as missing:                          # GPT-2's is downloaded once
        pytest.skip(str(missing))
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(tokenizer.n_vocab, 64, 2, 4, 32), tokenizer, world_seed=3).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1) * 0.1, std=0.2)
    m.save_model(folder / "ppo.pt", gpt)
    export.main([str(folder / "ppo.pt"), str(folder / "hub")])
    return gpt


@pytest.mark.parametrize("name", ["bpe", "bytes", "gpt2"])
def test_an_exported_model_gives_the_same_logits(name, texts, tmp_path):
    """Matrices transposed, or ids that mean other words elsewhere: it loads, runs and talks
    rubbish. And back again, nothing may have changed."""
    transformers = pytest.importorskip("transformers")
    gpt = exported(name, texts, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, gpt.tokenizer.n_vocab, (2, 30), generator=draw)
    with torch.no_grad():
        pad = gpt.tokenizer.pad                            # ours never says it
        assert (theirs(tokens).logits - gpt(tokens))[..., :pad].abs().max() < 1e-4
    special = theirs.config.eos_token_id, theirs.config.pad_token_id
    assert special == (gpt.tokenizer.eot, gpt.tokenizer.pad)
    written = json.loads((tmp_path / "hub" / "config.json").read_text(encoding="utf-8"))
    assert written["n_ctx"] == gpt.config.context          # what llama.cpp's converter asks for

    theirs.save_pretrained(tmp_path / "theirs")            # as after fine-tuning it there
    for folder in ("hub", "theirs"):
        back, weights = m.load_gpt(tmp_path / folder), gpt.state_dict()
        assert back.config == gpt.config and back.world_seed == 3
        assert back.tokenizer.vocab == gpt.tokenizer.vocab
        assert all(torch.equal(x, weights[name]) for name, x in back.state_dict().items())


@pytest.mark.parametrize("name", ["bpe", "bytes", "gpt2"])
def test_an_exported_tokenizer_gives_the_same_ids(name, texts, tmp_path):
    """Merges in another order, words split elsewhere, a chat template a space off: a model that
    reads what it has never read."""
    transformers = pytest.importorskip("transformers")
    ours = exported(name, texts, tmp_path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    special = len(theirs), theirs.eos_token_id, theirs.pad_token_id
    assert special == (ours.n_vocab, ours.eot, ours.pad)
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    question, answer = "Where does Ann live?", "Oslo."
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert prompt == data.chat_prompt(ours, question)
    whole = theirs.apply_chat_template(chat, return_dict=False)
    assert whole == data.chat_example(ours, question, answer)[0]


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_an_export_does_not_overwrite_a_file(folder, tmp_path, capsys):
    """A file of the user's, gone; or a traceback."""
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    with pytest.raises(SystemExit):
        export.main(["a.pt", str(tmp_path / folder)])
    assert "argument DIR: cannot write to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


def save_tiny(path):
    tokenizer = data.make_tokenizer("bytes", [])
    m.save_model(path, m.GPT(m.GPTConfig(tokenizer.n_vocab, 8, 1, 1, 4), tokenizer))


def test_an_export_beside_other_weights(tmp_path):
    """Old shards, which our reader and llama.cpp's prefer to the new weights beside them."""
    save_tiny(tmp_path / "a.pt")
    flags, old = [str(tmp_path / "a.pt"), str(tmp_path)], "model-00001-of-00002.safetensors"
    (tmp_path / old).touch()
    with pytest.raises(SystemExit, match=f"remove {old} or name another folder"):
        export.main(flags)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / old).unlink()
    export.main(flags)
    export.main(flags)                                     # over what it wrote itself
    assert m.load_gpt(tmp_path).config.channels == 4


def test_an_export_to_a_folder_that_the_console_cannot_show(tmp_path, monkeypatch):
    """A traceback after all is written, from a path with an accent on an old console."""
    save_tiny(tmp_path / "a.pt")
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", console)
    export.main([str(tmp_path / "a.pt"), str(tmp_path / "h\u00e9")])
    assert b"h?" in console.buffer.getvalue()


def write_csv(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values())])


def test_pictures_are_drawn_from_the_files_of_runs(tmp_path, capsys):
    """Pictures that nobody can draw again, because the script has fallen behind the files."""
    pytest.importorskip("matplotlib")
    for name in ("rm500", "rm2000", "b50", "."):
        write_csv(tmp_path / name / "ppo.csv", kl_nats=[0.0, 1.0, 2.0, 3.0],
                  score=[0.0, 0.5, 0.9, 1.0], gold_utility=[1.0, 2.0, 2.5, 2.0])
    write_csv(tmp_path / "ppo_measure.csv", kl_nats=[0.1, 1.0, 2.0], score=[0.1, 0.8, 1.0],
              effective_samples=[200, 50, 5])
    figures = {}
    for i, model in enumerate(("sft", "rlhf", "slcai", "rlcai")):
        figures |= {f"harm_{model}_g2": 1 - i / 4, f"utility_{model}": 2 + i / 4}
    (tmp_path / "rlaif.json").write_text(json.dumps(figures), encoding="utf-8")
    pictures.main(["--out", str(tmp_path), "--to", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"frontier.png", "plane.png"}
    assert "rmall" in capsys.readouterr().out              # what is missing, and who makes it


def test_the_fit_of_over_optimisation():
    """a and b swapped, or a logarithm of KL in place of its root."""
    d = np.linspace(0.001, 2, 20)                          # from KL 0 on, as clipped there
    a, b, error = pictures.fit(d, 1.9 + d * (0.9 - 0.8 * np.log(d)))
    assert (a, b, error) == pytest.approx((0.9, 0.8, 0.0), abs=0.02)
