"""GPT-2's weights, both ways: from Hugging Face's files into our network, and our checkpoints into
theirs."""
import gc
import json
import os
import shutil
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# transformers must not look anything up
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import data
import model as m
import pretrain
import sft

transformers = pytest.importorskip("transformers")
try:
    TOKENIZER = data.Tokenizer("gpt2")
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
    return theirs


@torch.no_grad()
def assert_same_model(theirs, gpt, tokenizer):
    ids = tokenizer.encode(TEXT)
    assert (
        theirs(torch.tensor([ids])).logits[0]
        - gpt(torch.tensor([ids]))[0, :, : theirs.config.vocab_size]
    ).abs().max() < 1e-4
    prompt = torch.tensor([ids])
    text = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=10,
        pad_token_id=0,
    )[0, len(ids) :]
    ours, = m.generate(gpt, [ids], 10, tokenizer, temperature=0)
    assert ours == text.tolist() and len(set(ours)) > 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GPT-2 in its files, small in all but its vocabulary."""
    folder = tmp_path_factory.mktemp("tiny")
    return their_gpt2(folder, **TINY), folder


@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(n_layer=3, n_head=16, n_embd=1024)],
    ids=["small", "three layers of medium"],
)
def test_gpt2_of_the_real_size(sizes, tmp_path):
    """One of the four transposed matrices missed, or heads split another way: square matrices load
    all the same and the text is nonsense."""
    theirs = their_gpt2(tmp_path, **sizes)
    gpt, tokenizer, checkpoint = m.load_gpt(tmp_path)
    assert gpt.config == m.GPTConfig(
        50260, 1024, theirs.config.n_layer, theirs.config.n_head, theirs.config.n_embd
    )
    assert checkpoint["world_seed"] is None and not gpt.training
    assert_same_model(theirs, gpt, tokenizer)
    shutil.rmtree(tmp_path)                                       # half a gigabyte
    del theirs, gpt, checkpoint
    gc.collect()


def test_new_tokens_start_as_the_mean_of_all(tiny):
    """Rows of zeros or of noise: a role token that is likelier than every word, or that no gradient
    tells from the others."""
    theirs, folder = tiny
    gpt, tokenizer, _ = m.load_gpt(folder)
    table = theirs.transformer.wte.weight
    assert (
        torch.equal(gpt.tokens.weight[:50257], table)
        and gpt.tokens.weight.shape[0] == tokenizer.n_vocab
    )
    for new in (tokenizer.user, tokenizer.assistant, tokenizer.pad):
        assert torch.allclose(gpt.tokens.weight[new], table.mean(0), atol=1e-6)
    # exp(mean of logits) <= mean of exp(logits): never likelier than 1 in 50257
    with torch.no_grad():
        p = gpt(torch.tensor([tokenizer.encode(TEXT)])).softmax(-1)
    assert p[..., 50257:].max() < 1 / 50257


def write_safetensors(path, tensors, dtype):
    """The format once more, with struct: an independent writer for F32, F16 and BF16."""
    header, body = {}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(t.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("layout", ["pytorch_model.bin", "F16", "BF16", "as OpenAI named it"])
def test_other_layouts_of_the_same_weights(layout, tiny, tmp_path):
    """Files differ in the prefix of names, in masks stored as weights, in a head stored twice, in
    precision; the model is the same."""
    theirs, folder = tiny
    shutil.copy(folder / "config.json", tmp_path)
    state, exact = theirs.state_dict(), theirs
    if layout in ("F16", "BF16"):
        dtype = dict(F16=torch.float16, BF16=torch.bfloat16)[layout]
        write_safetensors(
            tmp_path / "model.safetensors",
            {k: v.to(dtype) for k, v in state.items() if k != "lm_head.weight"},
            layout,
        )
        exact = transformers.GPT2LMHeadModel(theirs.config).eval()
        exact.load_state_dict({k: v.to(dtype).float() for k, v in state.items()})
    # as older versions wrote it: prefix, head and masks
    elif layout == "pytorch_model.bin":
        state |= {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).bool(),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        }
        torch.save(state, tmp_path / layout)
    else:
        bare = {
            k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"
        }
        write_safetensors(
            tmp_path / "model.safetensors",
            bare | {"h.1.attn.bias": torch.ones(1, 1, 32, 32)},
            "F32",
        )
    file, = (p for p in tmp_path.iterdir() if p.name != "config.json")
    for path in (tmp_path, file):
        gpt, tokenizer, _ = m.load_gpt(path)
        assert gpt.tokens.weight.dtype == torch.float32
        assert_same_model(exact, gpt, tokenizer)


@pytest.mark.parametrize(
    "fault, says",
    [
        ("cut", "cut short"),
        ("cut in the header", "cut short"),
        ("pointer", "git-lfs pointer"),
        ("text", "or no safetensors file"),
        ("no config", "config.json"),
        ("no weights", "model.safetensors"),
        ("llama", "model_type is 'llama'"),
        ("relu", "activation_function is 'relu'"),
        ("epsilon", "layer_norm_epsilon is 1e-06"),
        ("other size", "do not fit"),
        ("fewer layers", "do not fit"),
        ("no sizes", "does not describe"),
        ("other vocabulary", "50257"),
        ("header", "is not a safetensors file"),
    ],
)
def test_what_is_not_gpt2_is_refused_in_one_sentence(fault, says, tiny, tmp_path):
    """A download that broke off, a clone without its large files, another family of models: a
    traceback, or, worse, a model that loads."""
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    raw = weights.read_bytes()
    changed = {
        "llama": dict(model_type="llama"),
        "relu": dict(activation_function="relu"),
        "epsilon": dict(layer_norm_epsilon=1e-6),
        "other size": dict(n_positions=64),
        "fewer layers": dict(n_layer=1),
        "other vocabulary": dict(vocab_size=50000),
    }
    if fault in changed:
        config.write_text(json.dumps(json.loads(config.read_text()) | changed[fault]))
    contents = {
        "cut": raw[:-1000],
        "cut in the header": raw[:100],
        "text": b"Not Found",
        "header": struct.pack("<Q", 8) + b'{"a": 1}' + raw,
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n",
    }
    if fault in contents:
        weights.write_bytes(contents[fault])
    if fault.startswith("no "):
        {
            "no config": config.unlink,
            "no weights": weights.unlink,
            "no sizes": lambda: config.write_text("{}"),
        }[fault]()
    with pytest.raises(SystemExit, match=says) as refusal:
        m.load_gpt(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of PyTorch and Hugging Face, and a working folder without anything named gpt2.
    """
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
    with pytest.raises(
        SystemExit,
        match="config.json and model.safetensors from https://huggingface.co/.*gpt2/tree/main into",
    ) as refusal:
        m.load_gpt("gpt2")
    folder = Path(str(refusal.value).split(" into ")[1])
    # no half file that the next run would take for whole
    assert list(folder.iterdir()) == []
    shutil.copytree(tiny[1], folder, dirs_exist_ok=True)
    assert m.load_gpt("gpt2")[0].config.layers == 2


@pytest.mark.parametrize("repository", ["models--gpt2", "models--openai-community--gpt2"])
def test_weights_in_hugging_faces_cache_are_found(repository, caches, tiny, monkeypatch):
    """Half a gigabyte downloaded a second time."""
    monkeypatch.setattr(torch.hub, "urlopen", None)
    snapshots = caches / "hf" / "hub" / repository / "snapshots"
    # the configuration alone is of no use
    shutil.copytree(tiny[1], snapshots / "0", ignore=shutil.ignore_patterns("model.*"))
    shutil.copytree(tiny[1], snapshots / "1")
    assert m.load_gpt("gpt2")[0].config.layers == 2


def test_a_name_downloads_once(caches, tiny, monkeypatch):
    """From a server on this machine: the address, the two files, and the second time none."""
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
            assert m.load_gpt("gpt2-medium")[0].config.layers == 2
        server.shutdown()
    assert asked == [
        f"/gpt2-medium/resolve/main/{name}" for name in ("config.json", "model.safetensors")
    ]


def test_pretraining_goes_on_from_gpt2(tiny, tmp_path, capsys):
    """Fine-tuning that starts at the rate of a new model and forgets all it knew; a checkpoint that
    cannot be read back."""
    (tmp_path / "verse.txt").write_text(
        "Zoë mends a kite; the wind mends Zoë.\n" * 60, encoding="utf-8"
    )
    flags = [
        "--init",
        str(tiny[1]),
        "--data",
        str(tmp_path / "verse.txt"),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--batch-size",
        "2",
    ]
    pretrain.main([*flags, "--steps", "2"])
    gpt, tokenizer, checkpoint = m.load_gpt(tmp_path / "pretrain.pt")
    before = m.load_gpt(tiny[1])[0]
    moved = max((a - b).abs().max().item() for a, b in zip(gpt.parameters(), before.parameters()))
    assert (
        checkpoint["tokenizer"] == "gpt2"
        and gpt.config == before.config
        and tokenizer.n_vocab == 50260
    )
    # two steps of a warm-up of 50, at 3e-5
    assert 0 < moved < 1e-5
    m.main(
        [
            str(tmp_path / "pretrain.pt"),
            "--base",
            "--prompt",
            "Zoë",
            "--max-new",
            "4",
            "--device",
            "cpu",
        ]
    )
    # the role tokens, equal at first, learn apart
    sft.train(gpt, tokenizer, [("Who mends?", "Zoë.")] * 4, 1, 2, 1e-3, 0)
    assert not torch.allclose(
        gpt.tokens.weight[tokenizer.user], gpt.tokens.weight[tokenizer.assistant], atol=1e-6
    )


@pytest.fixture(scope="module")
def world_text():
    world = data.World(0)
    return "\n".join(data.unmark(data.write_document(world, "train", i)[1]) for i in range(300))


VERSE = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll: What, ho! 'tis I; we'll not be wrong'd: they'd say\n\n  'What's he?'"
UNICODE = "Zoë, naïve café: 中文字符, हिन्दी नमस्ते, می‌خواهم, 👨‍👩‍👧😀, ½²Ⅷ٣٤ x‿y _a_b__ \t\n\n a\u00a0b\u0085c\u200bd\ufeff 1234 aaaaaaa ---- \r\n  \n"


@pytest.mark.parametrize("name", ["bpe", "bytes", "gpt2"])
def test_export_gives_the_same_logits_and_ids(name, world_text, tmp_path, capsys):
    """A model whose ids mean other words elsewhere: it loads, runs and talks rubbish. And back
    again, nothing may have changed."""
    tokenizer = data.make_tokenizer(name, [world_text, VERSE, UNICODE * 3], 1280)
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(tokenizer.n_vocab, 64, 2, 4, 32)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1) * 0.1, std=0.2)
    m.save(
        tmp_path / "ppo.pt",
        config=vars(gpt.config),
        model=gpt.state_dict(),
        tokenizer=tokenizer.state(),
        world_seed=3,
    )
    m.main([str(tmp_path / "ppo.pt"), "--export", str(tmp_path / "hub")])

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    tokens = torch.randint(
        0, tokenizer.n_vocab, (2, 30), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        assert (theirs(tokens).logits - gpt(tokens)).abs().max() < 1e-4
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert (len(auto), auto.eos_token_id, auto.pad_token_id) == (
        tokenizer.n_vocab,
        tokenizer.eot,
        tokenizer.pad,
    )
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (
        tokenizer.eot,
        tokenizer.pad,
    )
    for text in (world_text, VERSE, UNICODE):
        assert (
            auto.encode(text) == tokenizer.encode(text)
            and auto.decode(tokenizer.encode(text)) == text
        )
    chat = [
        {"role": "user", "content": "Where does Ann live?"},
        {"role": "assistant", "content": "Oslo."},
    ]
    assert auto.apply_chat_template(
        chat[:1], add_generation_prompt=True, return_dict=False
    ) == data.chat_prompt(tokenizer, chat[0]["content"])
    assert (
        auto.apply_chat_template(chat, return_dict=False)
        == data.chat_example(tokenizer, chat[0]["content"], chat[1]["content"])[0]
    )

    theirs.save_pretrained(tmp_path / "theirs")                   # as after fine-tuning it there
    for folder in ("hub", "theirs"):
        back, again, checkpoint = m.load_gpt(tmp_path / folder)
        assert (
            back.config == gpt.config
            and again.vocab == tokenizer.vocab
            and checkpoint["world_seed"] == 3
        )
        assert all(
            torch.equal(a, b) for a, b in zip(back.state_dict().values(), gpt.state_dict().values())
        )


def test_export_takes_one_checkpoint_and_a_folder(tmp_path):
    """Two models written to one folder, the second over the first."""
    (tmp_path / "file").write_text("precious")
    for arguments in (
        ["a.pt", "b.pt", "--export", str(tmp_path)],
        ["a.pt", "--export", str(tmp_path / "file")],
    ):
        with pytest.raises(SystemExit, match="--export takes one checkpoint and a folder"):
            m.main(arguments)
    assert (tmp_path / "file").read_text() == "precious"
