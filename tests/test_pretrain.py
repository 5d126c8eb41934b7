"""Pre-training: the loss, the optimizer, and a floor that means what it says."""
import argparse
import math

import numpy as np
import pytest
import torch

import data
import model as m
import pretrain

TOKENIZER = data.make_tokenizer("bytes", [])


def tiny_gpt(seed=0, context=64):
    torch.manual_seed(seed)
    return m.GPT(m.GPTConfig(TOKENIZER.n_vocab, context, 2, 2, 32), TOKENIZER)


def replay_args(**more):
    flags = dict(replay=None, replay_rows=2, seed=0, out="")
    return argparse.Namespace(**flags | more)


def test_replay_adds_the_gradient_of_documents(tmp_path):
    """Replay that reads nothing, the same rows at every step, or documents that the model was never
    to see; or one that takes a step of its own."""
    gpt = tiny_gpt()
    gpt.world_seed = 0
    for key in ("without", "world_seed"):
        assert hasattr(m.copy_of(gpt), key)
    before = [p.clone() for p in gpt.parameters()]
    read_again, norms = pretrain.replayer(gpt, replay_args()), []
    for step in (0, 1, 0):
        gpt.zero_grad()
        read_again(step)
        once = torch.cat([p.grad.flatten() for p in gpt.parameters()])
        norms.append(once.norm().item())
    read_again(0)                                          # adds to what is there
    twice = torch.cat([p.grad.flatten() for p in gpt.parameters()])
    assert torch.allclose(twice, 2 * once) and norms[0] == norms[2] != norms[1]
    assert all(torch.equal(p, old) for p, old in zip(gpt.parameters(), before))
    # by hand: the mean over the targets of two rows of documents
    seen = []
    backward = pretrain.backward
    try:
        pretrain.backward = lambda model, batch: seen.append(batch)
        gpt.without = [kind for kind in data.DOCUMENTS if kind != "drill"]
        pretrain.replayer(gpt, replay_args())(0)
    finally:
        pretrain.backward = backward
    inputs, targets, segments = seen[0]
    assert inputs.shape == targets.shape == segments.shape == (2, gpt.config.context)
    assert "rule" in TOKENIZER.decode(inputs.flatten().tolist())
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 50, encoding="utf-8")
    for nothing in (replay_args(replay_rows=0), replay_args(replay_rows=-1, replay=str(text))):
        gpt.zero_grad()
        pretrain.replayer(gpt, nothing)(0)
        assert all(p.grad is None for p in gpt.parameters())
    pretrain.replayer(gpt, replay_args(replay=str(text), out=str(tmp_path)))(0)
    assert gpt.tokens.weight.grad[ord("c")].abs().sum() > 0
    gpt.world_seed = None                                  # neither a world nor a text
    gpt.zero_grad()
    pretrain.replayer(gpt, replay_args())(0)
    assert gpt.tokens.weight.grad is None


def logprobs(model, tokens):
    """A second version of what the losses rest on: log p of tokens[:, 1:], (B, T) -> (B, T-1)."""
    logp = model(tokens[:, :-1]).log_softmax(-1)
    return logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def training_args(**others):
    flags = dict(steps=80, lr=1e-2, muon_lr=0.02, muon_momentum=0.95, warmup=5, decay=0.5,
                 eval_every=1000, grad_accum=1, compile=False, resume=False, fresh=True)
    return argparse.Namespace(**flags | others)


def test_next_token_loss_by_hand():
    """Padding counted as something to predict, or a sum where a mean is meant."""
    logits = torch.log(torch.tensor([[[.5, .5], [.9, .1], [.2, .8]]]))
    loss = pretrain.next_token_loss(logits, torch.tensor([[0, 1, 1]])).item()
    assert loss == pytest.approx(-math.log(0.5 * 0.1 * 0.8) / 3)
    loss = pretrain.next_token_loss(logits, torch.tensor([[0, pretrain.IGNORE, 1]])).item()
    assert loss == pytest.approx(-math.log(0.5 * 0.8) / 2)


def test_rows_are_split_by_hand():
    """Targets not shifted, the padding learnt, or a document that starts one token late."""
    e, p, ignored = TOKENIZER.eot, TOKENIZER.pad, pretrain.IGNORE
    rows = torch.tensor([[e, 1, 2, e, 3, e, p, p]])
    inputs, targets, segments = pretrain.split_rows(rows, TOKENIZER)
    assert inputs.tolist() == [[e, 1, 2, e, 3, e, p]]
    assert targets.tolist() == [[1, 2, e, 3, e, ignored, ignored]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 3, 0]]


def test_orthogonalize_equalises_the_singular_values():
    """A Newton-Schulz iteration with a wrong coefficient diverges, or shrinks the update of every
    matrix."""
    torch.manual_seed(0)
    for rows, cols in ((32, 64), (64, 32), (24, 24)):
        G = torch.randn(2, rows, cols)
        if rows == cols:
            G = G + 6 * torch.eye(rows)
        X = pretrain.orthogonalize(7 * G)
        values = torch.linalg.svdvals(X)
        assert X.shape == G.shape and 0.6 < values.min() and values.max() < 1.3
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        cosine = (X * (U @ V)).sum((1, 2)) / X.norm(dim=(1, 2)) / (U @ V).norm(dim=(1, 2))
        assert (cosine > 0.97).all()                       # the same directions, signs included


def test_muon_treats_q_k_and_v_as_three_matrices():
    """One orthogonalization over the stacked q, k, v: whichever has the largest gradient then takes
    all of the step."""
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(48, 16))
    parts = [torch.nn.Parameter(p.detach().clone()) for p in stacked.chunk(3)]
    other = torch.nn.Parameter(torch.randn(16, 16))        # of the shape of a part
    scale = torch.tensor([100.0, 1.0, 0.01]).repeat_interleave(16)[:, None]
    groups = [{"params": [stacked], "parts": 3}, {"params": [other]}]
    together, apart = pretrain.Muon(groups, lr=0.1), pretrain.Muon(parts, lr=0.1)
    for step in range(3):
        g = torch.randn(48, 16, generator=torch.Generator().manual_seed(step)) * scale
        stacked.grad, other.grad = g.clone(), torch.ones(16, 16)
        for p, part in zip(parts, g.chunk(3)):
            p.grad = part.clone()
        together.step()
        apart.step()
    assert torch.allclose(stacked, torch.cat(parts), atol=1e-5)


def test_every_parameter_has_one_optimizer():
    """A parameter in no optimizer never learns, one in two learns twice; the tied head is easily
    either."""
    model = tiny_gpt()
    for muon_lr, count in ((0.02, 2), (0, 1)):
        optimizers, held = pretrain.make_optimizers(model, 1e-3, muon_lr), []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                held += group["params"]
        assert len(optimizers) == count
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    single, stacked = pretrain.make_optimizers(model, 1e-3, 0.02, 0.8)[1].param_groups
    assert single["momentum"] == stacked["momentum"] == 0.8
    for p in single["params"] + stacked["params"]:
        assert p.dim() == 2 and p is not model.tokens.weight and p is not model.positions.weight
    # by name and not by shape: an MLP may also be three times as tall as it is wide
    attention = [block.attention.qkv.weight for block in model.blocks]
    assert list(map(id, stacked["params"])) == list(map(id, attention)) and stacked["parts"] == 3
    assert single["parts"] == 1


def test_the_learning_rate_schedule():
    """A rate of 0 at the first step, a warm-up that jumps, a decay that ends too early or below 0.
    """
    factors = [pretrain.lr_factor(s, 100, 10, 0.5) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:51] == [1.0] * 42
    assert factors[75] == pytest.approx(0.5) and factors[99] == pytest.approx(0.02)
    assert all(0 < f <= 1 for f in factors) and pretrain.lr_factor(0, 1, 0, 0) == 1


def test_one_batch_can_be_memorised(tmp_path):
    """The oldest test of all: a network, a loss and an optimizer that fit together learn four rows
    by heart."""
    rows = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = TOKENIZER.eot
    for muon_lr in (0.02, 0):
        args = training_args(muon_lr=muon_lr)
        batch_at = lambda step: pretrain.split_rows(rows, TOKENIZER)
        progress = tmp_path / "p.pt", args
        history = pretrain.train(tiny_gpt(), batch_at, args, lambda: {}, progress)
        assert history[-1]["train_loss_nats"] < 0.1


def test_the_loss_of_packed_rows_is_that_of_each_document_alone():
    """A loss that is compared with the floor must be the log-probability of the documents, no more
    and no less."""
    model = tiny_gpt()
    texts = ["Ann lives in Oslo.", "Hi.", "How?", "A bat.", "Who lives here, and why?", "Yes."]
    documents = [[*TOKENIZER.encode(" " + text), TOKENIZER.eot] for text in texts]
    rows = torch.from_numpy(data.pack(documents, 48, TOKENIZER.eot, TOKENIZER.pad))
    assert len(rows) < len(documents) and (rows == TOKENIZER.pad).any()
    losses, hits = pretrain.token_losses(model, pretrain.split_rows(rows, TOKENIZER))
    alone = [-logprobs(model, torch.tensor([[TOKENIZER.eot, *ids]])).sum() for ids in documents]
    assert losses.sum().item() == pytest.approx(sum(alone).item(), rel=1e-4)
    # the padding is left out, from the number as from the sum
    assert len(losses) == len(hits) == sum(map(len, documents))


def test_forced_flags_line_up_with_the_tokens(monkeypatch):
    """A share of forced tokens that are right, measured on their neighbours: by a shift, or by
    another order of packing."""
    world = data.World(0)
    valid, forced, floor = pretrain.validation_set(world, TOKENIZER, 60, 1000)
    documents = [data.write_document(world, "validation", i) for i in range(60)]
    encoded = [data.encode_document(TOKENIZER, text) for _, text, _ in documents]
    expected = {tuple(ids): flags for ids, flags in encoded}
    targets = valid[1][valid[1] != pretrain.IGNORE].tolist()       # document after document
    assert len(targets) == len(forced)
    start = seen = 0
    while start < len(targets):
        end = targets.index(TOKENIZER.eot, start) + 1
        assert forced[start:end].tolist() == expected[tuple(targets[start:end])]
        start, seen = end, seen + 1
    assert seen == 60
    nats = -sum(logp for _, _, logp in documents)
    assert floor == pytest.approx(nats / len(targets))


def validation_of_file(tmp_path, monkeypatch, text, context, bytes_per_token=1):
    """The validation batch of `from_file`, and its figures for a tiny model -> (batch, figures,
    model)."""
    path, model = tmp_path / "text.txt", tiny_gpt(context=context)
    path.write_text(text, encoding="utf-8")
    sizes = np.full(TOKENIZER.n_vocab, bytes_per_token)
    monkeypatch.setattr(TOKENIZER, "bytes_per_token", lambda: sizes)
    batches, token_losses = [], pretrain.token_losses
    monkeypatch.setattr(pretrain, "token_losses",
                        lambda *arguments: batches.append(arguments[1]) or token_losses(*arguments))
    args = argparse.Namespace(data=path, tokenizer="bytes", vocab_size=0, context=context,
                              out=tmp_path)
    _, _, evaluate, _, _ = pretrain.from_file(args, TOKENIZER)
    figures = evaluate(model)
    return batches[0], figures, model


def test_loss_of_a_text_in_nats_a_byte(tmp_path, monkeypatch):
    """Losses of different tokenizers compared in nats a token: the one with longer tokens always
    loses."""
    text = "".join(chr(33 + i % 90) for i in range(2000))  # 200 tokens are held out
    batch, figures, model = validation_of_file(tmp_path, monkeypatch, text, 40, bytes_per_token=2)
    held_out = [ord(letter) for letter in text[1800:]]
    assert batch[0].tolist() == [held_out[i:i + 40] for i in range(0, 160, 40)]
    assert batch[1].tolist() == [held_out[i + 1:i + 41] for i in range(0, 160, 40)]
    windows = torch.cat([batch[0], batch[1][:, -1:]], 1)
    per_token = -logprobs(model, windows).mean().item()
    assert figures["val_loss_nats_per_token"] == pytest.approx(per_token, rel=1e-4)
    assert figures["val_loss_nats_per_byte"] == pytest.approx(per_token / 2, rel=1e-4)


def test_validation_of_a_big_text_is_bounded_and_spread(tmp_path, monkeypatch):
    """An evaluation that takes longer than the training, or one that reads the first chapter only.
    """
    starts = []
    stack = np.stack
    monkeypatch.setattr(pretrain.np, "stack", lambda rows: starts.append(rows) or stack(rows))
    batch, _, _ = validation_of_file(tmp_path, monkeypatch, "x" * 150_000, 8)
    assert 400 < len(batch[0]) <= 500
    begin = [row.__array_interface__["data"][0] // row.itemsize for row in starts[0]]
    assert len(set(np.diff(begin))) == 1 and begin[-1] - begin[0] > 14_000


def test_the_end_of_a_text_is_never_trained_on(tmp_path):
    """Windows drawn from the whole text: a held-out loss that is a training loss."""
    (tmp_path / "a.txt").write_text("a" * 900 + "b" * 100, encoding="utf-8")
    args = argparse.Namespace(data=str(tmp_path / "a.txt"), out=str(tmp_path), context=16, seed=0,
                              batch_size=16)
    _, batch_at, *_ = pretrain.from_file(args, TOKENIZER)
    read = [part for step in range(40) for part in batch_at(step)[:2]]
    assert {int(i) for part in read for i in part.unique()} == {ord("a")}


def padded_rows():
    """Eight rows whose padding differs: a mean of means is then another number than the mean. Most
    hold two documents, which do not see one another."""
    rows = torch.randint(0, 256, (8, 33), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = rows[:, 9] = TOKENIZER.eot
    for i, row in enumerate(rows):
        row[33 - 4 * i:] = TOKENIZER.pad
    return pretrain.split_rows(rows, TOKENIZER)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Micro-batches whose means are averaged: rows with much padding then count as much as full
    ones (the gradient accumulation bug of 2024). Or training in which documents see one another, or
    a loss that keeps its graph in memory."""
    whole, (inputs, targets, segments) = tiny_gpt(), padded_rows()
    loss = pretrain.next_token_loss(whole(inputs, segments), targets)
    loss.backward()
    assert gradient(whole).abs().max() > 0.01
    for grad_accum in (1, 2, 4, 8):
        model = tiny_gpt()
        accumulated = pretrain.backward(model, padded_rows(), grad_accum)
        assert accumulated.item() == pytest.approx(loss.item(), rel=1e-6)
        assert not accumulated.requires_grad
        assert torch.allclose(gradient(model), gradient(whole), atol=1e-7)
        assert grad_accum > 1 or torch.equal(gradient(model), gradient(whole))


@pytest.mark.slow
def test_bfloat16_trains_float32_weights(tmp_path, monkeypatch):
    """Half precision that reaches the loss, the weights or the optimizer, where small steps are
    rounded away."""
    half = lambda device: torch.autocast(device.type, torch.bfloat16)
    monkeypatch.setattr(pretrain, "autocast", half)
    model, logits = tiny_gpt(), []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.dtype))
    args = training_args(grad_accum=2)
    progress = tmp_path / "p.pt", args
    history = pretrain.train(model, lambda step: padded_rows(), args, lambda: {}, progress)
    assert history[-1]["train_loss_nats"] < 0.4 and set(logits) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("flags, says", [
    (["--context", "8"], "8 is not from 32"), (["--muon-momentum", "1"], "not from 0 to 0.999"),
    (["--without", *data.DOCUMENTS], "has to leave a kind"), (["--lr", "nan"], "nan is not from")])
def test_flags_without_a_run_behind_them(flags, says, tmp_path, capsys):
    """A traceback after the work instead of a sentence before it; an optimizer that never moves."""
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*flags, "--out", str(tmp_path), "--device", "cpu"])
    assert says in f"{stop.value} {capsys.readouterr().err}"
