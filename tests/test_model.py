"""The network against an independent one, and sampling against a slow version of itself."""
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model as m

TOKENIZER = data.make_tokenizer("bytes", [])
PROMPTS = [[5, 9, 200], [7], list(range(30, 50)), [100, 101, 102, 103, 104, 105], [42, 42]]


def tiny_gpt(seed=0, **sizes):
    """A random model with decided opinions, biases included."""
    torch.manual_seed(seed)
    gpt = m.GPT(
        m.GPTConfig(
            **{
                **dict(vocab_size=TOKENIZER.n_vocab, context=64, layers=2, heads=4, channels=32),
                **sizes,
            }
        )
    )
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1) * 0.1, std=0.2)
    return gpt.eval()


def test_our_gpt_is_gpt2():
    """A wrong GELU, a norm in the wrong place, heads split the wrong way: models that train, but
    are not what they say."""
    transformers = pytest.importorskip("transformers")
    gpt = tiny_gpt()
    config = transformers.GPT2Config(
        vocab_size=TOKENIZER.n_vocab,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=TOKENIZER.eot,
        eos_token_id=TOKENIZER.eot,
        pad_token_id=TOKENIZER.pad,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    weights = {
        "transformer.wte.weight": gpt.tokens.weight,
        "transformer.wpe.weight": gpt.positions.weight,
        "lm_head.weight": gpt.tokens.weight,
        "transformer.ln_f.weight": gpt.norm.weight,
        "transformer.ln_f.bias": gpt.norm.bias,
    }
    for i, block in enumerate(gpt.blocks):
        for name, part in {
            "ln_1": block.norm1,
            "ln_2": block.norm2,
            "attn.c_attn": block.attention.qkv,
            "attn.c_proj": block.attention.out,
            "mlp.c_fc": block.up,
            "mlp.c_proj": block.down,
        }.items():
            # theirs are stored (in, out)
            weight = part.weight if name.startswith("ln") else part.weight.T
            weights |= {
                f"transformer.h.{i}.{name}.weight": weight,
                f"transformer.h.{i}.{name}.bias": part.bias,
            }
    missing, unexpected = theirs.load_state_dict(
        {k: v.detach().clone() for k, v in weights.items()}, strict=False
    )
    assert not unexpected and not [
        k for k in missing if not k.endswith((".attn.bias", ".attn.masked_bias"))
    ]

    tokens = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (gpt(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        for prompt, ours in zip(PROMPTS, m.generate(gpt, PROMPTS, 20, TOKENIZER, temperature=0)):
            ids = torch.tensor([prompt])
            text = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
            )[0, len(prompt) :].tolist()
            assert ours == text


def slow_sample(gpt, prompt, max_new, temperature, seed, index):
    """No batch, no padding, no cache: the whole text through the network for each new token."""
    ids, noise = (
        list(prompt),
        np.random.default_rng([*seed, index]).random(max_new, dtype=np.float32),
    )
    for u in noise:
        logits = gpt(torch.tensor([ids]))[0, -1].double()
        # the one token a model may never say
        logits[TOKENIZER.pad] = -torch.inf
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
    fast = m.generate(gpt, PROMPTS, 24, TOKENIZER, temperature=0.9, seed=(3, 1))
    assert fast == [slow_sample(gpt, p, 24, 0.9, (3, 1), i) for i, p in enumerate(PROMPTS)]


def test_a_sample_depends_on_its_seed_and_index_only():
    """Results that change with the batch size: nobody can then reproduce a single answer."""
    gpt = tiny_gpt()
    all_at_once = m.generate(gpt, PROMPTS, 16, TOKENIZER, seed=(7,))
    assert m.generate(gpt, PROMPTS, 16, TOKENIZER, seed=(7,), batch_size=2) == all_at_once
    assert (
        m.generate(gpt, PROMPTS[:1] + [[1, 2]] * 4, 16, TOKENIZER, seed=(7,))[0] == all_at_once[0]
    )
    assert m.generate(gpt, PROMPTS, 8, TOKENIZER, seed=(7,)) == [r[:8] for r in all_at_once]
    assert m.generate(gpt, PROMPTS, 16, TOKENIZER, seed=(8,)) != all_at_once
    same = m.generate(gpt, [PROMPTS[0]] * 3, 16, TOKENIZER, seed=(7,))
    assert same[0] != same[1] != same[2]


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
    gpt, (a, b, c) = tiny_gpt(), ([1, 2, 3, 4], [9, 8], [4, 4, 7, 1, 2])
    segments = torch.tensor([[1] * 4 + [2] * 2 + [3] * 5])
    packed = gpt(torch.tensor([a + b + c]), segments)[0]
    alone = torch.cat([gpt(torch.tensor([d]))[0] for d in (a, b, c)])
    assert torch.allclose(packed, alone, atol=1e-4)


@torch.no_grad()
def test_garbage_in_the_padding_changes_nothing():
    """A mask that is right for zeros and wrong for anything else."""
    gpt = tiny_gpt()
    segments = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2, 0]])
    tokens = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    clean, dirty = (
        gpt(tokens, segments),
        gpt(torch.where(segments > 0, tokens, 255 - tokens), segments),
    )
    assert torch.equal(clean[segments > 0], dirty[segments > 0]) and clean.isfinite().all()


def test_positions_start_again_with_each_document():
    """Positions by hand, padding on the left included."""
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 2, 3, 3, 0, 0]])
    assert m.segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]


def test_the_future_is_invisible():
    """A mask that lets a token see the one it has to predict: a loss near 0 and a useless model."""
    gpt = tiny_gpt()
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 256
    for segments in (None, torch.ones_like(tokens)):
        before, after = gpt(tokens, segments), gpt(changed, segments)
        assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6) and not torch.allclose(
            before[:, 7], after[:, 7], atol=1e-3
        )


def test_token_logprobs_are_cross_entropies():
    """Log-probabilities shifted by one, or not divided by the sampling temperature."""
    gpt = tiny_gpt()
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = gpt(tokens)
    for temperature in (1.0, 0.7):
        expected = -F.cross_entropy(
            (logits[:, :-1] / temperature).mT, tokens[:, 1:], reduction="none"
        )
        assert torch.allclose(
            m.token_logprobs(gpt, tokens, temperature=temperature), expected, atol=1e-5
        )


def frequencies(logits, n=20000, **options):
    """Shares of the tokens picked with evenly spread noise, which inverse-transform sampling turns
    into the exact probabilities."""
    noise = (torch.arange(n) + 0.5) / n
    picked = m.pick_tokens(logits.expand(n, -1), noise, **options)
    return torch.bincount(picked, minlength=logits.shape[-1]) / n


def test_sampling_at_t_is_scored_at_t():
    """Sampling at T and scoring at 1: the usual cause of a "negative KL"."""
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0])
    for temperature in (1.0, 0.5, 2.0):
        assert torch.allclose(
            frequencies(logits, temperature=temperature),
            (logits / temperature).softmax(-1),
            atol=2e-4,
        )


def test_top_k_top_p_and_temperature_by_hand():
    """Filters applied in the wrong order, one token too many or too few, or probabilities not
    renormalised."""
    logits = torch.tensor([.15, .5, .05, .3]).log()
    close = lambda got, expected: torch.allclose(got, torch.tensor(expected), atol=2e-4)
    assert close(frequencies(logits), [.15, .5, .05, .3])
    assert close(frequencies(logits, temperature=0), [0., 1, 0, 0])
    assert close(
        frequencies(logits, temperature=0.5),
        [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365],
    )
    assert close(frequencies(logits, top_k=1), [0., 1, 0, 0])
    assert close(frequencies(logits, top_k=2), [0, .625, 0, .375])
    assert close(frequencies(logits, top_k=99), [.15, .5, .05, .3])
    assert close(frequencies(logits, top_p=.45), [0., 1, 0, 0])               # .5 alone reaches it
    # .5 does not, .5 + .3 does
    assert close(frequencies(logits, top_p=.7), [0, .625, 0, .375])
    assert close(frequencies(logits, top_p=.9), [.15 / .95, .5 / .95, 0, .3 / .95])
    # among .5, .3, .15 (renormalised) two reach .8
    assert close(frequencies(logits, top_k=3, top_p=.8), [0, .625, 0, .375])


def test_impossible_tokens_are_never_picked():
    """Noise of exactly 0, or rounding in the last sum, picks a token of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert m.pick_tokens(logits, torch.tensor([0.0, 1 - 2 ** -24])).tolist() == [1, 2]


def test_sampling_stops_at_end_of_text():
    """Text that goes on after the model has ended it, or an end that goes missing from the reply.
    """
    gpt = tiny_gpt()
    gpt.norm.weight.data.zero_()
    # every prediction is mostly end-of-text
    gpt.norm.bias.data.copy_(gpt.tokens.weight[TOKENIZER.eot] * 4)
    replies = m.generate(gpt, PROMPTS * 4, 30, TOKENIZER, seed=(1,))
    assert any(len(r) > 1 for r in replies) and any(len(r) == 1 for r in replies)
    for r in replies:
        assert r.index(TOKENIZER.eot) == len(r) - 1
    stop = replies[0][0] if replies[0][0] != TOKENIZER.eot else 65
    stopped = m.generate(tiny_gpt(), PROMPTS, 30, TOKENIZER, seed=(1,), stop=[stop, 7])
    assert all(t not in (stop, 7, TOKENIZER.eot) for r in stopped for t in r[:-1])


def test_rows_that_have_ended_leave_the_batch():
    """Two answers swapped, or one that goes on with its neighbour's cache, once the batch shrinks
    to those still being written."""
    gpt, stop = tiny_gpt(), set(range(40))
    whole = m.generate(gpt, PROMPTS * 4, 24, TOKENIZER, seed=(7,))
    cut = [r[:next((i + 1 for i, t in enumerate(r) if t in stop), len(r))] for r in whole]
    # they end one after another
    assert len({len(r) for r in cut}) > 4
    assert m.generate(gpt, PROMPTS * 4, 24, TOKENIZER, seed=(7,), stop=[*stop]) == cut


def test_a_sampled_pad_token_does_not_break_a_reply():
    """An untrained model may sample the pad token: a reply must never be empty, nor hold a pad that
    later counts as padding."""
    gpt = tiny_gpt()
    gpt.norm.weight.data.zero_()
    gpt.norm.bias.data.copy_(gpt.tokens.weight[TOKENIZER.pad] * 2)
    replies = m.generate(gpt, [[1, 2], [3]] * 10, 6, TOKENIZER, seed=(0,))
    assert all(r and TOKENIZER.pad not in r for r in replies)


def test_a_prompt_that_does_not_fit_is_named():
    """An index error from inside the position table."""
    with pytest.raises(ValueError, match="context"):
        m.generate(tiny_gpt(), [[1] * 64], 5, TOKENIZER)
    assert len(m.generate(tiny_gpt(), [[1] * 60], 50, TOKENIZER)[0]) <= 4
    with pytest.raises(ValueError, match="context"):
        tiny_gpt()(torch.ones(1, 65, dtype=torch.long))


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """A full disk or a closed laptop at the wrong moment, and a night's work is half a file."""
    path = tmp_path / "model.pt"
    m.save(path, number=1)

    def crash(contents, file):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(OSError):
            m.save(path, number=2)
    assert m.load(path) == {"number": 1}
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
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(SystemExit, match="text.pt"):
        m.load(tmp_path / "text.pt")
    m.save(tmp_path / "other.pt", something=1)
    with pytest.raises(SystemExit, match="sft.py"):
        m.load_gpt(tmp_path / "other.pt", "sft.py")


def test_save_and_load_give_the_model_back(tmp_path):
    """Weights that change on the way through a file, or a model that is not in eval mode."""
    gpt = tiny_gpt()
    m.save(
        tmp_path / "gpt.pt",
        config=vars(gpt.config),
        model=gpt.state_dict(),
        tokenizer=TOKENIZER.state(),
    )
    loaded, tokenizer, _ = m.load_gpt(tmp_path / "gpt.pt")
    assert not loaded.training and tokenizer.n_vocab == TOKENIZER.n_vocab
    assert all(
        torch.equal(a, b) for a, b in zip(gpt.state_dict().values(), loaded.state_dict().values())
    )
    twin = m.copy_of(gpt)
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        for a, b in zip(gpt.parameters(), twin.parameters())
    )


def test_resuming_with_other_flags_is_refused(tmp_path):
    """Half a run with one learning rate and half with another, and no trace of it."""
    gpt = tiny_gpt()
    m.save_progress(tmp_path / "p.pt", 3, {"lr": 1e-3}, [{"step": 3}], model=gpt)
    assert m.load_progress(tmp_path / "p.pt", {"lr": 1e-3}, model=tiny_gpt(1)) == (3, [{"step": 3}])
    with pytest.raises(SystemExit, match="lr"):
        m.load_progress(tmp_path / "p.pt", {"lr": 2e-3}, model=gpt)
    with pytest.raises(SystemExit, match="without --resume"):
        m.load_progress(tmp_path / "none.pt", {}, model=gpt)


def test_initial_sizes():
    """A reward head that starts far from 0, or an output layer that starts sure of itself: a first
    loss above ln V."""
    scalar = m.ScalarModel(
        m.GPT(m.GPTConfig(vocab_size=8, context=4, layers=1, heads=1, channels=1023))
    ).scalar
    assert scalar.weight.std().item() == pytest.approx(1 / 32, rel=0.1) and scalar.bias.item() == 0
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(vocab_size=500, context=32, layers=2, heads=2, channels=64))
    tokens = torch.randint(0, 500, (8, 32))
    assert -m.token_logprobs(gpt, tokens).mean().item() == pytest.approx(math.log(500), abs=0.1)
    assert gpt.blocks[0].down.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.1)
    with pytest.raises(SystemExit, match="heads"):
        m.GPT(m.GPTConfig(channels=30, heads=4))
