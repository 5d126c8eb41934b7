"""The network against an independent one, and sampling against a slow version of itself."""
import argparse
import itertools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model as m
import ppo

TOKENIZER = data.make_tokenizer("bytes", [])
PROMPTS = [[5, 9, 200], [7], list(range(30, 50)), [100, 101, 102, 103, 104, 105], [42, 42]]


def tiny_gpt(seed=0, **config):
    """A random model with decided opinions, biases included."""
    torch.manual_seed(seed)
    gpt = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 64, 2, 4, 32, **config), TOKENIZER, world_seed=3)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1) * 0.1, std=0.2)
    return gpt.eval()


def random_ids(*size, seed=0):
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed))


def as_theirs(gpt):
    """A network of ours -> transformers' GPT-2 with the same weights."""
    transformers = pytest.importorskip("transformers")
    size, no_dropout = gpt.config, dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = transformers.GPT2Config(
        vocab_size=size.vocab_size, n_positions=size.context, n_embd=size.channels,
        n_layer=size.layers, n_head=size.heads, activation_function=m.GELUS[size.gelu],
        bos_token_id=TOKENIZER.eot, eos_token_id=TOKENIZER.eot, pad_token_id=TOKENIZER.pad,
        **no_dropout)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    weights = {"transformer.wte.weight": gpt.tokens.weight, "lm_head.weight": gpt.tokens.weight,
               "transformer.wpe.weight": gpt.positions.weight,
               "transformer.ln_f.weight": gpt.norm.weight, "transformer.ln_f.bias": gpt.norm.bias}
    for i, block in enumerate(gpt.blocks):
        parts = {"ln_1": block.norm1, "attn.c_attn": block.attention.qkv,
                 "attn.c_proj": block.attention.out, "ln_2": block.norm2,
                 "mlp.c_fc": block.up, "mlp.c_proj": block.down}
        for name, part in parts.items():
            # their matrices are stored (in, out)
            weight = part.weight if name.startswith("ln") else part.weight.T
            weights[f"transformer.h.{i}.{name}.weight"] = weight
            weights[f"transformer.h.{i}.{name}.bias"] = part.bias
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    missing, unexpected = theirs.load_state_dict(copies, strict=False)
    masks = (".attn.bias", ".attn.masked_bias")
    assert not unexpected and all(name.endswith(masks) for name in missing)
    return theirs


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@torch.no_grad()
def test_our_gpt_is_gpt2(gelu):
    """A wrong GELU, a norm in the wrong place, heads split the wrong way: models that train, but
    are not what they say."""
    gpt = tiny_gpt(gelu=gelu)
    theirs, tokens = as_theirs(gpt), random_ids(3, 40, seed=1)
    apart = (gpt(tokens) - theirs(tokens).logits)[..., :TOKENIZER.pad]     # which ours never says
    assert apart.abs().max() < 1e-4
    for prompt, ours in zip(PROMPTS, m.generate(gpt, PROMPTS, 20, temperature=0)):
        ids = torch.tensor([prompt])
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=20)
        assert ours == text[0, len(prompt):].tolist()


def test_a_long_prompt_takes_no_room_from_its_neighbours():
    """One prompt of 190 tokens in a context of 192: everybody else's answer had two tokens."""
    gpt, long = tiny_gpt(), list(range(5, 5 + 62))         # the context is 64
    prompts = [long, [5, 6], [7]]
    together = m.generate(gpt, prompts, 20, temperature=0)
    alone = [m.generate(gpt, [prompt], 20, temperature=0)[0] for prompt in prompts]
    assert together == alone and len(together[0]) <= 2
    assert max(map(len, together[1:])) > 2


def slow_sample(gpt, prompt, max_new, temperature, seed, index):
    """No batch, no padding, no cache: the whole text through the network for each new token."""
    ids = list(prompt)
    noise = np.random.default_rng([*seed, index]).random(max_new, dtype=np.float32)
    for u in noise:
        logits = gpt(torch.tensor([ids]))[0, -1].double()
        logits[TOKENIZER.pad] = -torch.inf                 # the one token a model may never say
        p = (logits / temperature).softmax(-1)
        ids.append(int((p.cumsum(-1) > u).nonzero()[0]))
        if ids[-1] == TOKENIZER.eot:
            break
    return ids[len(prompt):]


@torch.no_grad()
def test_cached_sampling_equals_uncached_sampling():
    """A KV cache one position off, or left padding that moves positions: text that is a little
    worse and nobody knows why."""
    gpt = tiny_gpt()
    fast = m.generate(gpt, PROMPTS, 24, temperature=0.9, seed=(3, 1))
    assert fast == [slow_sample(gpt, p, 24, 0.9, (3, 1), i) for i, p in enumerate(PROMPTS)]


def test_a_sample_depends_on_its_seed_and_index_only(monkeypatch):
    """Results that change with the batch size: nobody can then reproduce a single answer."""
    gpt = tiny_gpt()
    all_at_once = m.generate(gpt, PROMPTS, 16, seed=(7,))
    others = PROMPTS[:1] + [[1, 2]] * 4
    assert m.generate(gpt, others, 16, seed=(7,))[0] == all_at_once[0]
    assert m.generate(gpt, PROMPTS, 8, seed=(7,)) == [reply[:8] for reply in all_at_once]
    assert m.generate(gpt, PROMPTS, 16, seed=(8,)) != all_at_once
    same = m.generate(gpt, [PROMPTS[0]] * 3, 16, seed=(7,))
    assert same[0] != same[1] != same[2]
    monkeypatch.setattr(m, "SAMPLING_BATCH", 2)
    assert m.generate(gpt, PROMPTS, 16, seed=(7,)) == all_at_once


@torch.no_grad()
def test_a_left_padded_prompt_gives_the_same_logits():
    """Positions counted from the padding: the most frequent bug of batched generation."""
    gpt = tiny_gpt()
    tokens = data.pad_rows(PROMPTS, TOKENIZER.pad, left=True)
    logits = gpt(tokens, (tokens != TOKENIZER.pad).long())
    for row, prompt in zip(logits, PROMPTS):
        assert torch.allclose(row[-len(prompt):], gpt(torch.tensor([prompt]))[0], atol=1e-4)


@torch.no_grad()
def test_packed_documents_do_not_see_one_another():
    """Attention across document borders, and positions that go on counting: the model learns that
    texts follow from strangers."""
    gpt, documents = tiny_gpt(), ([1, 2, 3, 4], [9, 8], [4, 4, 7, 1, 2])
    segments = torch.tensor([[1] * 4 + [2] * 2 + [3] * 5])
    packed = gpt(torch.tensor([sum(documents, [])]), segments)[0]
    alone = torch.cat([gpt(torch.tensor([document]))[0] for document in documents])
    assert torch.allclose(packed, alone, atol=1e-4)


@torch.no_grad()
def test_garbage_in_the_padding_changes_nothing():
    """A mask that is right for zeros and wrong for anything else."""
    gpt, tokens = tiny_gpt(), random_ids(2, 7)
    segments = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2, 0]])
    other = torch.where(segments > 0, tokens, 255 - tokens)
    clean, dirty = gpt(tokens, segments), gpt(other, segments)
    assert torch.equal(clean[segments > 0], dirty[segments > 0]) and clean.isfinite().all()


def test_positions_start_again_with_each_document():
    """Positions by hand, padding on the left included."""
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 2, 3, 3, 0, 0]])
    assert m.segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]


@torch.no_grad()
def test_attention_by_hand():
    """Heads cut or put together the wrong way, a scale forgotten, a mask upside down, a cache whose
    old keys are lost. One head, one token at a time."""
    torch.manual_seed(0)
    attention, x = m.Attention(m.GPTConfig(heads=2, channels=8)), torch.randn(2, 5, 8)
    q, k, v = attention.qkv(x).split(8, -1)                # (2, 5, 8): heads of 4, side by side
    segments = torch.tensor([[1, 1, 2, 2, 2], [0, 1, 1, 1, 1]])
    for mask in (None, m.attention_mask(segments, 5)):
        seen = torch.ones(2, 5, 5).tril().bool() if mask is None else mask[:, 0]
        mixed = torch.zeros(2, 5, 8)
        for b, t, head in itertools.product(range(2), range(5), (slice(0, 4), slice(4, 8))):
            keys = seen[b, t].nonzero().flatten()          # the tokens that this one sees
            p = (k[b, keys, head] @ q[b, t, head] / math.sqrt(4)).softmax(-1)
            mixed[b, t, head] = p @ v[b, keys, head]
        assert torch.allclose(attention(x, mask), attention.out(mixed), atol=1e-6)
    cache = m.LayerCache(2, 2, 5, 4, x)                    # the same in two parts: three, then two
    parts = [attention(x[:, :3], m.attention_mask(segments[:, :3], 3), cache),
             attention(x[:, 3:], m.attention_mask(segments, 2), cache)]
    assert torch.allclose(torch.cat(parts, 1), attention.out(mixed), atol=1e-6)


def test_masks_by_hand():
    """A mask that is transposed, or that counts the new tokens from the wrong end of the cache."""
    rows = ["1...", "11..", "..1.", "..11"]                # as in the docstring of attention_mask
    expected = [[x == "1" for x in row] for row in rows]
    segments = torch.tensor([[1, 1, 2, 2]])
    assert m.attention_mask(segments, 4).tolist() == [[expected]]
    assert m.attention_mask(segments, 1).tolist() == [[expected[-1:]]]      # one token, a cache
    padded = torch.tensor([[0, 0, 1]])                     # no row is empty: its softmax is NaN
    assert m.attention_mask(padded, 3).any(-1).all()


@torch.no_grad()
def test_the_future_is_invisible():
    """A mask that lets a token see the one it has to predict: a loss near 0 and a useless model."""
    gpt, tokens = tiny_gpt(), random_ids(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 256
    for segments in (None, torch.ones_like(tokens)):
        before, after = gpt(tokens, segments), gpt(changed, segments)
        assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
        assert not torch.allclose(before[:, 7], after[:, 7], atol=1e-3)


@torch.no_grad()
def test_token_logprobs_are_cross_entropies():
    """Log-probabilities shifted by one, or not divided by the sampling temperature."""
    gpt, tokens = tiny_gpt(), random_ids(2, 9)
    for temperature in (1.0, 0.7):
        logits = gpt(tokens)[:, :-1] / temperature
        expected = -F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        got = ppo.token_logprobs(gpt, tokens, temperature=temperature)
        assert torch.allclose(got, expected, atol=1e-5)


def frequencies(logits, temperature=1.0, **limits):
    """Shares of the tokens that are sampled with evenly spread noise, which inverse-transform
    sampling turns into the exact probabilities. `limits`: those of keep_likely."""
    n = 20000
    noise, many = (torch.arange(n) + 0.5) / n, logits.expand(n, -1)
    chosen = m.sample(many, noise, temperature, lambda x: m.keep_likely(x, **limits))
    return torch.bincount(chosen, minlength=logits.shape[-1]) / n


def test_sampling_at_t_is_scored_at_t():
    """Sampling at T and scoring at 1: the usual cause of a "negative KL"."""
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0])
    for temperature in (1.0, 0.5, 2.0):
        expected = (logits / temperature).softmax(-1)
        assert torch.allclose(frequencies(logits, temperature), expected, atol=2e-4)


@pytest.mark.parametrize("options, expected", [
    (dict(), [.15, .5, .05, .3]),
    (dict(temperature=0), [0, 1, 0, 0]),
    (dict(temperature=0.5), [.0225 / .365, .25 / .365, .0025 / .365, .09 / .365]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=2), [0, .625, 0, .375]),
    (dict(top_k=99), [.15, .5, .05, .3]),
    (dict(top_p=.45), [0, 1, 0, 0]),                       # .5 alone reaches it
    (dict(top_p=.7), [0, .625, 0, .375]),                  # .5 does not, .5 + .3 does
    (dict(top_p=.9), [.15 / .95, .5 / .95, 0, .3 / .95]),
    (dict(top_k=3, top_p=.8), [0, .625, 0, .375]),         # of .5, .3, .15, renormalised, two do
], ids=str)
def test_top_k_top_p_and_temperature_by_hand(options, expected):
    """Filters applied in the wrong order, one token too many or too few, or probabilities not
    renormalised."""
    logits = torch.tensor([.15, .5, .05, .3]).log()
    assert frequencies(logits, **options).tolist() == pytest.approx(expected, abs=2e-4)


def test_impossible_tokens_are_never_sampled():
    """Noise of exactly 0, or rounding in the last sum, picks a token of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert m.sample(logits, torch.tensor([0.0, 1 - 2 ** -24])).tolist() == [1, 2]


def always_says(token, weight):
    """A model that finds one token likelier than all others."""
    gpt = tiny_gpt()
    # by a hook and not by the norm's bias, which not every network has (docs/variants)
    always = gpt.tokens.weight[token].detach() * weight
    gpt.norm.register_forward_hook(lambda _, given, out: always.expand_as(out))
    return gpt


def test_sampling_stops_at_end_of_text():
    """Text that goes on after the model has ended it, or a reply that has lost its end."""
    replies = m.generate(always_says(TOKENIZER.eot, 4), PROMPTS * 4, 30, seed=(1,))
    assert any(len(r) > 1 for r in replies) and any(len(r) == 1 for r in replies)
    for reply in replies:
        assert reply.index(TOKENIZER.eot) == len(reply) - 1
    stop = replies[0][0] if replies[0][0] != TOKENIZER.eot else 65
    for reply in m.generate(tiny_gpt(), PROMPTS, 30, seed=(1,), stop=[stop, 7]):
        assert not {stop, 7, TOKENIZER.eot} & set(reply[:-1])


def test_rows_that_have_ended_leave_the_batch():
    """Two answers swapped, or one that goes on with its neighbour's cache, once the batch shrinks
    to those still being written."""
    gpt, stop, cut = tiny_gpt(), range(40), []
    for reply in m.generate(gpt, PROMPTS * 4, 24, seed=(7,)):
        ends = [i + 1 for i, token in enumerate(reply) if token in stop]
        cut.append(reply[:ends[0]] if ends else reply)
    assert len(set(map(len, cut))) > 4                     # they end one after another
    assert m.generate(gpt, PROMPTS * 4, 24, seed=(7,), stop=stop) == cut


def test_a_sampled_pad_token_does_not_break_a_reply():
    """An untrained model may sample the pad token: a reply must never be empty, nor hold a pad that
    later counts as padding."""
    replies = m.generate(always_says(TOKENIZER.pad, 2), [[1, 2], [3]] * 10, 6)
    assert all(replies) and not any(TOKENIZER.pad in reply for reply in replies)


def test_a_prompt_that_does_not_fit_is_named():
    """An index error from inside the position table."""
    with pytest.raises(ValueError, match="context"):
        m.generate(tiny_gpt(), [[1] * 64], 5)
    assert len(m.generate(tiny_gpt(), [[1] * 60], 50)[0]) <= 4
    with pytest.raises(ValueError, match="context"):
        tiny_gpt()(torch.ones(1, 65, dtype=torch.long))


def test_a_bare_prompt_has_no_chat_in_it():
    """A base model that is asked in a template it has never read, and is then called stupid."""
    gpt, text = tiny_gpt(), "The wind"
    prompt = [TOKENIZER.eot, *TOKENIZER.encode(" The wind")]
    reply, = m.generate(gpt, [prompt], 8, 0.5, seed=(2,))
    assert m.answer(gpt, [text], 8, 0.5, (2,), bare=True) == [data.decode_reply(TOKENIZER, reply)]
    assert m.answer(gpt, [text], 8, 0.5, (2,)) != m.answer(gpt, [text], 8, 0.5, (2,), bare=True)
    assert TOKENIZER.eot not in reply and m.answer(gpt, [text], 8, 0.5, (2,), True, True) == [""]


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """A full disk or a closed laptop at the wrong moment, and a night's work is half a file."""
    path = tmp_path / "model.pt"
    m.save(path, number=1)

    # the last as torch says that a disk is full
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(),
                  RuntimeError("PytorchStreamWriter failed writing file")):
        def crash(contents, file, error=error):
            file.write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", crash)
            stop = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SystemExit
            says = None if stop is KeyboardInterrupt else "model.pt was not written .* is intact"
            with pytest.raises(stop, match=says):
                m.save(path, number=2)
        assert m.load(path) == {"number": 1} and os.listdir(tmp_path) == ["model.pt"]
    m.save(path, number=3)
    assert m.load(path) == {"number": 3} and os.listdir(tmp_path) == ["model.pt"]


class Trap:
    def __reduce__(self):
        return os.mkdir, (self.where,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    """Pickle runs whatever a downloaded file tells it to."""
    trap, path = Trap(), tmp_path / "evil.pt"
    trap.where = str(tmp_path / "sprung")
    torch.save({"model": trap}, path)
    with pytest.raises(SystemExit, match="evil.pt"):
        m.load(path)
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_missing_or_wrong_name_the_remedy(tmp_path):
    """A traceback for a mistake of the user's."""
    with pytest.raises(SystemExit, match=r"sft.pt not found: run `python sft.py` first"):
        m.load_gpt(tmp_path / "sft.pt", "sft.py")
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    with pytest.raises(SystemExit, match="text.pt"):
        m.load(tmp_path / "text.pt")
    m.save(tmp_path / "other.pt", something=1)
    m.save_model(tmp_path / "reward.pt", m.ScalarModel(tiny_gpt()), scale=None)
    for name in ("other.pt", "reward.pt"):                 # neither holds a language model
        with pytest.raises(SystemExit, match="sft.py"):
            m.load_gpt(tmp_path / name, "sft.py")


def assert_equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_save_and_load_give_the_model_back(tmp_path):
    """Weights that change on the way through a file, a model that is not in eval mode, one that
    has forgotten its tokenizer, its world, what it never read, or where its weights come from."""
    gpt, progress = tiny_gpt(), tmp_path / "gpt.resume.pt"
    gpt.without, gpt.published = ["critique"], True
    m.save(progress)
    m.save_model(tmp_path / "gpt.pt", gpt, epochs=2)
    assert progress.exists() and m.load(tmp_path / "gpt.pt")["epochs"] == 2
    data.write_results(tmp_path, "gpt", [{"step": 1}])     # the log, while the run goes on
    assert progress.exists()
    data.write_results(tmp_path, "gpt", [{"step": 1}], {"figure": 1.0})        # the end of it
    assert not progress.exists()
    loaded, twin = m.load_gpt(tmp_path / "gpt.pt"), m.copy_of(gpt)
    for other in (loaded, twin):
        assert not other.training and other.world_seed == 3
        assert other.tokenizer.vocab == TOKENIZER.vocab
        assert other.without == ["critique"] and other.published
        assert_equal_weights(gpt, other)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(gpt.parameters(), twin.parameters()))
    assert twin.tokenizer is gpt.tokenizer                 # else its cache of pieces is of no use


def test_resuming_with_other_flags_is_refused(tmp_path):
    """Half a run with one learning rate and half with another, and no trace of it."""
    def progress(name, **flags):
        return tmp_path / name, argparse.Namespace(fresh=False, **flags)

    gpt, other = tiny_gpt(), tiny_gpt(1)
    m.save_progress(progress("p.pt", lr=1e-3, out="here"), 3, [{"step": 3}], model=gpt)
    again = progress("p.pt", lr=1e-3, out="there", resume=True)
    assert m.resume(again, model=other) == (3, [{"step": 3}])
    assert_equal_weights(gpt, other)
    with pytest.raises(SystemExit, match="lr"):
        m.resume(progress("p.pt", lr=2e-3, resume=True), model=gpt)
    with pytest.raises(SystemExit, match="leave out --resume"):
        m.resume(progress("none.pt", resume=True), model=gpt)


def test_resuming_with_an_edited_file_is_refused(tmp_path):
    """Half a run on one text and half on another, under one name."""
    text, gpt = tmp_path / "text.jsonl", tiny_gpt()
    text.write_text("one\ntwo\n", encoding="utf-8")
    args = argparse.Namespace(data=str(text), seed=0, resume=False, fresh=False)
    m.save_progress((tmp_path / "p.pt", args), 3, [], model=gpt)
    args.resume = True
    assert m.resume((tmp_path / "p.pt", args), model=gpt) == (3, [])
    for edited in ("one\nthree\n", "one\ntoo\n", "two\none\n"):     # the last two are as long
        text.write_text(edited, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"content of --data was \d+, now \d+"):
            m.resume((tmp_path / "p.pt", args), model=gpt)


def test_resuming_with_other_models_of_earlier_stages_is_refused(tmp_path):
    """PPO half against one SFT model and half against another, which a flag never named."""
    for name in ("pretrain", "sft", "reward", "ppo"):
        (tmp_path / f"{name}.pt").write_text(name, encoding="utf-8")
    args, what = argparse.Namespace(out=str(tmp_path), resume=False, fresh=False), {}
    for file in ("pretrain.resume.pt", "sft.resume.pt", "ppo.resume.pt", "rlaif.progress"):
        found = m.settings_of(tmp_path / file, args)
        what[file.split(".")[0]] = [x[11:-3] for x in found if x.startswith("content of ")]
    assert what == {"pretrain": [], "sft": ["pretrain"], "ppo": ["pretrain", "sft", "reward"],
                    "rlaif": ["pretrain", "sft", "reward", "ppo"]}
    gpt = tiny_gpt()
    m.save_progress((tmp_path / "ppo.resume.pt", args), 3, [], model=gpt)
    args.resume = True
    (tmp_path / "ppo.pt").write_text("its own, of an older run", encoding="utf-8")
    assert m.resume((tmp_path / "ppo.resume.pt", args), model=gpt) == (3, [])
    (tmp_path / "sft.pt").write_text("another", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"--resume: content of sft.pt was \d+, now \d+"):
        m.resume((tmp_path / "ppo.resume.pt", args), model=gpt)
    m.save(tmp_path / "ppo.resume.pt", other=1)            # no progress of a run at all
    with pytest.raises(SystemExit, match="--resume: .* was None"):
        m.resume((tmp_path / "ppo.resume.pt", args), model=gpt)


def test_an_empty_argument_is_refused(monkeypatch):
    """--data "$FILE", and FILE is not set: trained on the village instead."""
    monkeypatch.setattr("sys.argv", ["sft.py", "--data", ""])
    with pytest.raises(SystemExit, match="an empty argument"):
        m.pick_device("cpu")
    with pytest.raises(SystemExit, match="--device meta cannot be used"):
        monkeypatch.setattr("sys.argv", ["sft.py"])
        m.pick_device("meta")


def test_a_gradient_that_is_no_number_stops_the_run():
    """Weights of nan, saved over good ones; found the next morning."""
    gpt = tiny_gpt()
    before = [p.clone() for p in gpt.parameters()]
    for bad in (math.nan, math.inf):
        for p in gpt.parameters():
            p.grad = torch.zeros_like(p)
        gpt.norm.weight.grad[3] = bad
        with pytest.raises(SystemExit, match="nan or infinite: lower the learning rates"):
            m.average_and_clip(gpt)
    assert all(torch.equal(p, old) for p, old in zip(gpt.parameters(), before))
    gpt.norm.weight.grad[3] = 10.0                           # and a large one is cut to norm 1
    m.average_and_clip(gpt)
    assert gpt.norm.weight.grad[3] == pytest.approx(1.0)


def test_an_interrupted_run_is_given_up_on_purpose_only(tmp_path):
    """Hours of work, erased by a command without its --resume; a later --resume that takes up a run
    from before, whose inputs were others."""
    args = argparse.Namespace(lr=1e-3, resume=False, fresh=False)
    m.save_progress((tmp_path / "p.pt", args), 3, [], model=tiny_gpt())
    with pytest.raises(SystemExit, match="--resume goes on, --fresh gives it up"):
        m.resume((tmp_path / "p.pt", args), model=tiny_gpt())
    # this one came to its end: the next may take its place without a word
    assert m.resume((tmp_path / "p.pt", args), finished=3, model=tiny_gpt()) == (0, [])
    assert (tmp_path / "p.pt").exists()
    args.fresh = True
    assert m.resume((tmp_path / "p.pt", args), model=tiny_gpt()) == (0, [])
    assert not (tmp_path / "p.pt").exists()
    assert m.resume(None, model=tiny_gpt()) == (0, []) and m.save_progress(None, 3, []) is None


def test_a_mistake_shows_its_traceback_and_an_interruption_a_sentence(capfd):
    """Thirty lines after Ctrl-C; or a mistake of ours that nobody can find, for it is one line."""
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        m.say_interrupted(type(error), error, error.__traceback__)
    printed = capfd.readouterr().err
    assert "Traceback" in printed and "1 / 0" in printed
    full = OSError(28, "No space left on device", "out/pretrain.json")
    for error in (KeyboardInterrupt(), full):
        m.say_interrupted(type(error), error, None)
    one, two = capfd.readouterr().err.split("stopped: ")[1:]
    assert "KeyboardInterrupt" in one and "No space left on device" in two
    assert all("--resume goes on" in text and "Traceback" not in text for text in (one, two))


def test_initial_sizes():
    """A reward head that starts far from 0, or an output layer that starts sure of itself: a first
    loss above ln V."""
    wide = m.GPT(m.GPTConfig(vocab_size=8, context=4, layers=1, heads=1, channels=1023))
    scalar = m.ScalarModel(wide).scalar
    assert scalar.weight.std().item() == pytest.approx(1 / 32, rel=0.1) and scalar.bias.item() == 0
    torch.manual_seed(0)
    config = m.GPTConfig(vocab_size=500, context=32, layers=2, heads=2, channels=64)
    gpt = m.GPT(config, SimpleNamespace(pad=499))
    tokens = torch.randint(0, 499, (8, 32))
    loss = F.cross_entropy(gpt(tokens)[:, :-1].mT, tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)
    assert gpt.blocks[0].down.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.1)
    with pytest.raises(ValueError, match="heads"):
        m.GPT(m.GPTConfig(channels=30, heads=4))


def test_rates_go_by_where_the_weights_come_from(tmp_path):
    """A new model with GPT-2's vocabulary trained at a tenth of its rate, or GPT-2's own weights
    fine-tuned at twenty times theirs: it was the tokenizer that decided, and in one stage only."""
    gpt = tiny_gpt()
    for published, rate in ((False, 6e-4), (True, 3e-5)):
        gpt.published = published
        m.save_model(tmp_path / "gpt.pt", m.copy_of(gpt))  # as sft.py's result, for reward.py
        loaded, args = m.load_gpt(tmp_path / "gpt.pt"), argparse.Namespace(lr=None, value_lr=0.0)
        m.gentle_rates(args, loaded, lr=(6e-4, 3e-5), value_lr=(5e-4, 1e-5))
        assert args.lr == rate and args.value_lr == 0      # what was given stays, even a 0
