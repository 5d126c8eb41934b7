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
    return m.GPT(m.GPTConfig(TOKENIZER.n_vocab, context, 2, 2, 32))


def test_next_token_loss_by_hand():
    """Padding counted as something to predict, or a sum where a mean is meant."""
    logits = torch.log(torch.tensor([[[.5, .5], [.9, .1], [.2, .8]]]))
    assert pretrain.next_token_loss(logits, torch.tensor([[0, 1, 1]])).item() == pytest.approx(
        -math.log(0.5 * 0.1 * 0.8) / 3
    )
    assert pretrain.next_token_loss(
        logits, torch.tensor([[0, pretrain.IGNORE, 1]])
    ).item() == pytest.approx(-math.log(0.5 * 0.8) / 2)


def test_rows_are_split_by_hand():
    """Targets not shifted, the padding learnt, or a document that starts one token late."""
    e, p = TOKENIZER.eot, TOKENIZER.pad
    inputs, targets, segments = pretrain.split_rows(
        torch.tensor([[e, 1, 2, e, 3, e, p, p]]), TOKENIZER
    )
    assert inputs.tolist() == [[e, 1, 2, e, 3, e, p]]
    assert targets.tolist() == [[1, 2, e, 3, e, pretrain.IGNORE, pretrain.IGNORE]]
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
        # the same directions, signs included
        assert (cosine > 0.97).all()


def test_muon_treats_q_k_and_v_as_three_matrices():
    """One orthogonalization over the stacked q, k, v: whichever has the largest gradient then takes
    all of the step."""
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(48, 16))
    parts = [torch.nn.Parameter(p.detach().clone()) for p in stacked.chunk(3)]
    # of the same shape as a part: shares the stack
    other = torch.nn.Parameter(torch.randn(16, 16))
    for optimizer, params in (
        (pretrain.Muon([stacked, other], lr=0.1), [stacked, other]),
        (pretrain.Muon(parts, lr=0.1), parts),
    ):
        gradients = torch.Generator().manual_seed(1)
        for _ in range(3):
            g = (
                torch.randn(48, 16, generator=gradients)
                * torch.tensor([100.0, 1.0, 0.01]).repeat_interleave(16)[:, None]
            )
            for p, grad in zip(
                params, [g, torch.ones(16, 16)] if params[0] is stacked else g.chunk(3)
            ):
                p.grad = grad.clone()
            optimizer.step()
    assert torch.allclose(stacked, torch.cat(parts), atol=1e-5)


def test_every_parameter_has_one_optimizer():
    """A parameter in no optimizer never learns, one in two learns twice; the tied head is easily
    either."""
    model = tiny_gpt()
    for muon_lr, count in ((0.02, 2), (0, 1)):
        optimizers = pretrain.make_optimizers(model, 1e-3, muon_lr)
        held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len(optimizers) == count and sorted(held) == sorted(
            id(p) for p in model.parameters()
        )
    matrices = pretrain.make_optimizers(model, 1e-3, 0.02)[1].param_groups[0]["params"]
    assert pretrain.make_optimizers(model, 1e-3, 0.02, 0.8)[1].param_groups[0]["momentum"] == 0.8
    assert not any(
        p is model.tokens.weight or p is model.positions.weight or p.dim() != 2 for p in matrices
    )


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
        args = argparse.Namespace(
            lr=1e-2,
            muon_lr=muon_lr,
            muon_momentum=0.95,
            warmup=5,
            decay=0.5,
            resume=False,
            eval_every=1000,
            grad_accum=1,
            compile=False,
        )
        batch_at = lambda step: pretrain.split_rows(rows, TOKENIZER)
        history, _ = pretrain.train(tiny_gpt(), batch_at, 80, args, lambda: {}, tmp_path / "p.pt")
        assert history[-1]["train_loss_nats"] < 0.1


def test_the_loss_of_packed_rows_is_that_of_each_document_alone():
    """A loss that is compared with the floor must be the log-probability of the documents, no more
    and no less."""
    model, texts = (
        tiny_gpt().eval(),
        [
            "Ann lives in Oslo.",
            "Hi.",
            "How?",
            "A bat.",
            "Who lives here, and why is that so?",
            "Yes.",
        ],
    )
    documents = [[*TOKENIZER.encode(" " + t), TOKENIZER.eot] for t in texts]
    rows = torch.from_numpy(data.pack(documents, 48, TOKENIZER.eot, TOKENIZER.pad))
    assert len(rows) < len(documents)
    losses, hits = pretrain.token_losses(model, rows, TOKENIZER, batch_size=1)
    alone = [m.token_logprobs(model, torch.tensor([[TOKENIZER.eot] + d])) for d in documents]
    assert losses.sum().item() == pytest.approx(-sum(x.sum().item() for x in alone), rel=1e-4)
    assert pretrain.mean_loss(losses, rows, TOKENIZER) == pytest.approx(
        losses.sum().item() / sum(map(len, documents)), rel=1e-5
    )
    assert (losses[rows[:, 1:] == TOKENIZER.pad] == 0).all() and not hits[
        rows[:, 1:] == TOKENIZER.pad
    ].any()


def test_kinds_and_forced_flags_line_up_with_the_tokens():
    """A table of losses by kind of document in which every kind is the next one's, by a shift or
    another order of packing."""
    world = data.World(0)
    valid = pretrain.validation_set(world, TOKENIZER, 60, 1000)
    texts = [data.write_document(world, "validation", i) for i in range(60)]
    expected = {}
    for kind, text, _ in texts:
        ids, forced = data.encode_document(TOKENIZER, text)
        expected[tuple(ids)] = (list(data.DOCUMENTS).index(kind), forced)
    seen = 0
    for row, kinds, forced in zip(
        valid["rows"][:, 1:].tolist(), valid["kinds"].tolist(), valid["forced"].tolist()
    ):
        start = 0
        while start < len(row) and row[start] != TOKENIZER.pad:
            end = row.index(TOKENIZER.eot, start) + 1
            kind, flags = expected[tuple(row[start:end])]
            assert kinds[start:end] == [kind] * (end - start) and forced[start:end] == flags
            start, seen = end, seen + 1
        assert set(kinds[start:]) <= {-1} and not any(forced[start:])
    assert seen == 60
    for name in ("all", "story"):
        chosen = [
            (len(data.encode_document(TOKENIZER, text)[0]), logp)
            for kind, text, logp in texts
            if name in (kind, "all")
        ]
        assert valid["floors"][name] == pytest.approx(
            -sum(logp for _, logp in chosen) / sum(length for length, _ in chosen)
        )


def test_loss_of_a_text_in_nats_a_byte():
    """Losses of different tokenizers compared in nats a token: the one with longer tokens always
    loses."""
    model, ids = tiny_gpt().eval(), np.arange(200, dtype=np.uint16) % 256
    windows = pretrain.validation_windows(ids, 40)
    assert windows.tolist() == [list(range(i, i + 41)) for i in range(0, 160, 40)]
    losses = pretrain.text_loss(model, windows, np.full(TOKENIZER.n_vocab, 2))
    per_token = -m.token_logprobs(model, windows).mean().item()
    assert losses["val_loss_nats_per_token"] == pytest.approx(per_token, rel=1e-4)
    assert losses["val_loss_nats_per_byte"] == pytest.approx(per_token / 2, rel=1e-4)


def test_validation_of_a_big_text_is_bounded_and_spread():
    """An evaluation that takes longer than the training, or one that reads the first chapter only.
    """
    windows = pretrain.validation_windows(np.arange(100_000), 10, at_most=30)
    assert windows.shape == (30, 11) and (windows.diff() == 1).all()
    assert (windows[1:, 0] - windows[:-1, 0]).unique().tolist() == [3340] and windows[
        -1, 0
    ] > 96_000


def padded_rows():
    """Eight rows whose padding differs: a mean of means is then another number than the mean."""
    rows = torch.randint(0, 256, (8, 33), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = TOKENIZER.eot
    for i, row in enumerate(rows):
        row[33 - 4 * i:] = TOKENIZER.pad
    return pretrain.split_rows(rows, TOKENIZER)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Micro-batches whose means are averaged: rows with much padding then count as much as full
    ones (the gradient accumulation bug of 2024)."""
    gradients, losses = [], []
    for grad_accum in (1, 2, 4, 8):
        model = tiny_gpt()
        losses.append(
            pretrain.backward(model, padded_rows(), torch.device("cpu"), grad_accum).item()
        )
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    whole = tiny_gpt()
    loss = pretrain.next_token_loss(whole(padded_rows()[0], padded_rows()[2]), padded_rows()[1])
    loss.backward()
    assert losses == pytest.approx([loss.item()] * 4, rel=1e-6)
    assert torch.equal(gradients[0], torch.cat([p.grad.flatten() for p in whole.parameters()]))
    assert (
        all(torch.allclose(g, gradients[0], atol=1e-7) for g in gradients)
        and gradients[0].abs().max() > 0.01
    )


def test_bfloat16_trains_float32_weights(tmp_path, monkeypatch):
    """Half precision that reaches the loss, the weights or the optimizer, where small steps are
    rounded away."""
    monkeypatch.setattr(
        pretrain, "autocast", lambda device: torch.autocast(device.type, torch.bfloat16)
    )
    model, logits = tiny_gpt(), []
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.dtype))
    args = argparse.Namespace(
        lr=1e-2,
        muon_lr=0.02,
        muon_momentum=0.95,
        warmup=5,
        decay=0.5,
        resume=False,
        eval_every=1000,
        grad_accum=2,
        compile=False,
    )
    history, _ = pretrain.train(
        model, lambda step: padded_rows(), 80, args, lambda: {}, tmp_path / "p.pt"
    )
    assert history[-1]["train_loss_nats"] < 0.2 and set(logits) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
