"""GPT-2's weights: from Hugging Face's files into our network. (The other way: docs/lab/export.py,
tested in test_lab_model.py.)"""
import argparse
import gc
import json
import os
import shutil
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                         # transformers must not look anything up

import pytest
import torch

import data
import model as m
import pretrain
import sft

transformers = pytest.importorskip("transformers")
try:
    data.Tokenizer("gpt2")
except SystemExit as missing:
    pytest.skip(str(missing), allow_module_level=True)
TEXT = "The wind is up, and Zoë's kite"
TINY = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32)


def their_gpt2(folder, **sizes):
    """A random GPT-2 of theirs with decided opinions, biases included, saved to `folder`."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        # or the likeliest next token is the last one again
        theirs.transformer.wpe.weight *= 100
        for name, p in theirs.named_parameters():
            if p.dim() == 1:
                p.normal_(mean=float(".ln_" in name and name.endswith("weight")), std=0.1)
    theirs.save_pretrained(folder)
    write_vocabulary(folder)
    return theirs


def write_vocabulary(folder, name="vocab.json", words=None):
    """GPT-2's list of words as it lies beside its weights, or another of the same length."""
    ranks = data.Tokenizer("gpt2").encoding._mergeable_ranks
    ascii_words = [(word, i) for word, i in ranks.items() if word.strip().isalnum()]
    vocab = {word.decode("latin-1").replace(" ", "\u0120"): i for word, i in ascii_words}
    vocab = vocab if words is None else dict(zip(vocab, words))
    text = vocab if name == "vocab.json" else {"version": "1.0", "model": {"vocab": vocab}}
    (folder / name).write_text(json.dumps(text, indent=1), encoding="utf-8")


@torch.no_grad()
def assert_same_model(theirs, gpt):
    ids = gpt.tokenizer.encode(TEXT)
    prompt, words = torch.tensor([ids]), theirs.config.vocab_size
    assert (theirs(prompt).logits - gpt(prompt)[..., :words]).abs().max() < 1e-4
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                           max_new_tokens=10, pad_token_id=0)
    ours, = m.generate(gpt, [ids], 10, temperature=0)
    assert ours == text[0, len(ids):].tolist() and len(set(ours)) > 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GPT-2 in its files, small in all but its vocabulary."""
    folder = tmp_path_factory.mktemp("tiny")
    return their_gpt2(folder, **TINY), folder


SIZES = {"small": dict(), "three layers of medium": dict(n_layer=3, n_head=16, n_embd=1024)}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gpt2_of_the_real_size(sizes, tmp_path):
    """One of the four transposed matrices missed, or heads split another way: square matrices load
    all the same and the text is nonsense."""
    theirs = their_gpt2(tmp_path, **sizes)
    gpt, size = m.load_gpt(tmp_path), theirs.config
    assert gpt.config == m.GPTConfig(50260, 1024, size.n_layer, size.n_head, size.n_embd, "tanh")
    assert gpt.world_seed is None and not gpt.training
    assert_same_model(theirs, gpt)
    shutil.rmtree(tmp_path)                                # half a gigabyte
    del theirs, gpt
    gc.collect()


def test_new_tokens_start_as_the_mean_of_all(tiny):
    """Rows of zeros or of noise: a role token that is likelier than every word, or that no gradient
    tells from the others."""
    theirs, folder = tiny
    gpt, table = m.load_gpt(folder), theirs.transformer.wte.weight
    tokenizer, ours = gpt.tokenizer, gpt.tokens.weight
    assert torch.equal(ours[:50257], table) and len(ours) == tokenizer.n_vocab
    for new in (tokenizer.user, tokenizer.assistant, tokenizer.pad):
        assert torch.allclose(ours[new], table.mean(0), atol=1e-6)
    # exp(mean of logits) <= mean of exp(logits): never likelier than 1 in 50257
    with torch.no_grad():
        p = gpt(torch.tensor([tokenizer.encode(TEXT)])).softmax(-1)
    assert p[..., 50257:].max() < 1 / 50257


def write_safetensors(path, tensors, dtype):
    """The format once more, with struct: an independent writer for F32, F16 and BF16."""
    header, body = {}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": place}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize("dtype, layout", [("F16", "now"), ("BF16", "now"), ("F32", "older"),
                                           ("F32", "as OpenAI named it")])
def test_other_layouts_of_the_same_weights(dtype, layout, tiny, tmp_path):
    """Files differ in the prefix of names, in masks stored as weights, in a head stored twice, in
    precision; the model is the same."""
    theirs, folder = tiny
    for name in ("config.json", "vocab.json"):
        shutil.copy(folder / name, tmp_path)
    exact, masks = transformers.GPT2LMHeadModel(theirs.config).eval(), torch.ones(1, 1, 32, 32)
    state = {name: x.to(DTYPES[dtype]) for name, x in theirs.state_dict().items()}
    exact.load_state_dict({name: x.float() for name, x in state.items()})
    if layout == "older":                                  # the head once more, and the masks
        state |= {"transformer.h.0.attn.bias": masks,
                  "transformer.h.0.attn.masked_bias": torch.tensor([-1e4])}
    else:
        del state["lm_head.weight"]
    if layout == "as OpenAI named it":
        state = {name.removeprefix("transformer."): x for name, x in state.items()}
        state["h.1.attn.bias"] = masks
    write_safetensors(tmp_path / "model.safetensors", state, dtype)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        gpt = m.load_gpt(path)
        assert gpt.tokens.weight.dtype == torch.float32
        assert_same_model(exact, gpt)


def test_weights_in_several_files_are_read(tiny, tmp_path):
    """Large models come in shards: the first alone is no model, and neither are all but one."""
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    tiny[0].save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert_same_model(tiny[0], m.load_gpt(tmp_path))
    with pytest.raises(SystemExit, match="do not fit|a shard is missing"):
        m.load_gpt(shards[0])
    # a whole file is preferred, as transformers does: the shards may be older
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path, whole, ignore=lambda *_: ["whole"])
    tiny[0].transformer.ln_f.bias.data += 1
    tiny[0].save_pretrained(whole / "new")
    (whole / "new" / "model.safetensors").rename(whole / "model.safetensors")
    assert_same_model(tiny[0], m.load_gpt(whole))
    tiny[0].transformer.ln_f.bias.data -= 1
    for shard in shards:
        moved = shard.rename(tmp_path / "elsewhere")
        with pytest.raises(SystemExit, match="do not fit|a shard is missing"):
            m.load_gpt(tmp_path)
        moved.rename(shard)


def test_pickled_weights_are_refused_with_a_remedy(tiny, tmp_path):
    """Older copies of GPT-2 are pickled, and pickle runs whatever a downloaded file tells it to."""
    shutil.copy(tiny[1] / "config.json", tmp_path)
    torch.save(tiny[0].state_dict(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(SystemExit, match="save_pretrained") as refusal:
            m.load_gpt(path)
        assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


def spoil(fault, folder):
    """Do to the two files what the name of the fault says."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    raw, settings = weights.read_bytes(), json.loads(config.read_text(encoding="utf-8"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"
    contents = {"cut": raw[:-1000], "cut in the header": raw[:100], "text": b"Not Found",
                "header": struct.pack("<Q", 8) + b'{"a": 1}' + raw, "pointer": pointer,
                "empty": b""}
    changes = {"llama": dict(model_type="llama"), "relu": dict(activation_function="relu"),
               "epsilon": dict(layer_norm_epsilon=1e-6), "other size": dict(n_positions=64),
               "fewer layers": dict(n_layer=1), "other vocabulary": dict(vocab_size=50000)}
    texts = {"no sizes": "{}", "a list": "[]", "not JSON": '{"model_type": '}
    if fault in contents:
        weights.write_bytes(contents[fault])
    if fault in changes:
        config.write_text(json.dumps(settings | changes[fault]), encoding="utf-8")
    if fault in texts:
        config.write_text(texts[fault], encoding="utf-8")
    if fault == "no config":
        config.unlink()
    if fault == "no weights":
        weights.unlink()


@pytest.mark.parametrize("fault, says", [
    ("cut", "cut short, or is not a safetensors file"), ("cut in the header", "cut short"),
    ("header", "is not a safetensors file"), ("text", "is not a safetensors file"),
    ("empty", "cut short"), ("pointer", "git-lfs pointer"),
    ("no config", "config.json"), ("no weights", "model.safetensors"),
    ("llama", "not {'model_type': 'llama'"), ("relu", "not {'activation_function': 'relu'"),
    ("epsilon", "not {'layer_norm_epsilon': 1e-06}"), ("other size", "do not fit"),
    ("fewer layers", "do not fit"), ("other vocabulary", "50257"),
    ("no sizes", "it is no GPT-2"), ("a list", "is no GPT-2"),
    ("not JSON", "not JSON")])
def test_what_is_not_gpt2_is_refused_in_one_sentence(fault, says, tiny, tmp_path):
    """A download that broke off, a clone without its large files, another family of models: a
    traceback, or, worse, a model that loads."""
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    spoil(fault, tmp_path)
    with pytest.raises(SystemExit, match=says) as refusal:
        m.load_gpt(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_a_header_of_any_length_is_read(tiny, tmp_path):
    """The length of the header comes first in the file: if it is a multiple of 256, its first byte
    is a 0, with which no text begins."""
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    for padded in (-(-length // 256) * 256, -(-length // 256) * 256 + 8):
        header = raw[8:8 + length].ljust(padded)
        body = struct.pack("<Q", padded) + header + raw[8 + length:]
        (tmp_path / "model.safetensors").write_bytes(body)
        assert m.load_gpt(tmp_path).config == m.load_gpt(tiny[1]).config


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of PyTorch and Hugging Face, and a working folder with nothing named gpt2."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_network_it_says_which_files_to_put_where(caches, tiny, monkeypatch):
    """A traceback out of urllib; and a reader who has the files, but not the folder."""
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    says = "config.json, vocab.json, model.safetensors from https://huggingface.co/.*main into"
    with pytest.raises(SystemExit, match=says) as refusal:
        m.load_gpt("gpt2")
    folder = Path(str(refusal.value).split(" into ")[1])
    # no half file that the next run would take for whole
    assert list(folder.iterdir()) == []
    shutil.copytree(tiny[1], folder, dirs_exist_ok=True)
    assert m.load_gpt("gpt2").config.layers == 2


@pytest.mark.parametrize("name, words, fits", [
    ("vocab.json", None, True), ("tokenizer.json", None, True), (None, None, False),
    ("vocab.json", range(50257), False), ("tokenizer.json", range(1, 50257), False)])
def test_a_vocabulary_is_known_by_its_words(name, words, fits, tiny, tmp_path):
    """Another language's GPT-2, of 50,257 tokens too: it loads, and answers with nonsense."""
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").unlink()
    if name:
        write_vocabulary(tmp_path, name, words)
    if fits:
        assert m.load_gpt(tmp_path).config.layers == 2
        return
    with pytest.raises(SystemExit, match="vocab.json or tokenizer.json is needed") as refusal:
        m.load_gpt(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_a_head_of_its_own_is_refused(tiny, tmp_path):
    """A head that is not the embedding, declared or not: dropped in silence, it was nonsense."""
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    tensors = {name: t.clone() for name, t in tiny[0].state_dict().items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, "F32")      # tied, and in the file
    assert m.load_gpt(tmp_path).config.layers == 2
    tensors["lm_head.weight"][0, 0] += 1
    write_safetensors(tmp_path / "model.safetensors", tensors, "F32")
    with pytest.raises(SystemExit, match="its head is not its embedding"):
        m.load_gpt(tmp_path)


def test_a_name_with_its_owner(caches, tiny, monkeypatch):
    """As the hub spells it: "not found: check the path", beside a folder full of its files."""
    monkeypatch.setattr(torch.hub, "urlopen", None)
    shutil.copytree(tiny[1], caches / "torch" / "hub" / "checkpoints" / "gpt2")
    assert m.load_gpt("openai-community/gpt2").config.layers == 2


def test_a_name_downloads_once(caches, tiny, monkeypatch):
    """From a server on this machine: the address, the three files, and the second time none."""
    (caches / "site" / "gpt2-medium" / "resolve").mkdir(parents=True)
    shutil.copytree(tiny[1], caches / "site" / "gpt2-medium" / "resolve" / "main")
    asked = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=caches / "site")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(m, "GPT2_HUB", f"http://127.0.0.1:{server.server_port}")
        for _ in range(2):
            assert m.load_gpt("gpt2-medium").config.layers == 2
        server.shutdown()
    files = ("config.json", "vocab.json", "model.safetensors")
    assert asked == [f"/gpt2-medium/resolve/main/{name}" for name in files]


def test_pretraining_goes_on_from_gpt2(tiny, tmp_path, capsys):
    """Fine-tuning that starts at the rate of a new model and forgets all it knew; a checkpoint that
    cannot be read back."""
    verse, out = tmp_path / "verse.txt", str(tmp_path)
    verse.write_text("Zoë mends a kite; the wind mends Zoë.\n" * 60, encoding="utf-8")
    pretrain.main(["--init", str(tiny[1]), "--data", str(verse), "--out", out, "--device", "cpu",
                   "--batch-size", "2", "--steps", "2"])
    gpt, before = m.load_gpt(tmp_path / "pretrain.pt"), m.load_gpt(tiny[1])
    pairs = zip(gpt.parameters(), before.parameters())
    moved = max((a - b).abs().max().item() for a, b in pairs)
    assert gpt.tokenizer.vocab == "gpt2" and gpt.config == before.config
    assert 0 < moved < 1e-5                                # two steps of a warm-up of 50, at 3e-5
    m.main([str(tmp_path / "pretrain.pt"), "--base", "--prompt", "Zoë", "--max-new", "4",
            "--device", "cpu"])
    # the role tokens, equal at first, learn apart
    args = argparse.Namespace(epochs=1, batch_size=2, lr=1e-3, seed=0, replay=None, replay_rows=0)
    sft.train(gpt, [("Who mends?", "Zoë.")] * 4, args)
    table = gpt.tokens.weight
    assert not torch.allclose(table[gpt.tokenizer.user], table[gpt.tokenizer.assistant], atol=1e-6)
