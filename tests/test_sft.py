"""Fine-tuning: the loss counts the assistant's tokens, all of them and only them."""
import argparse
import math

import pytest
import torch

import data
import model as m
import sft

TOKENIZER = data.make_tokenizer("bytes", [])


def tiny_gpt(seed=0):
    torch.manual_seed(seed)
    gpt = m.GPT(m.GPTConfig(TOKENIZER.n_vocab, 64, 1, 2, 32), TOKENIZER)
    for p in gpt.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return gpt.eval()


def test_masked_loss_by_hand():
    """A mask that is not shifted with the targets: the loss then counts the question's last token
    and leaves out end-of-text."""
    p = [[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]
    tokens, mask = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 0, 1, 1]])
    # tokens 2 and 3 count; they are predicted by logits 1 (p = .3) and 2 (p = .6)
    loss = sft.masked_loss(torch.tensor([p]).log(), tokens, mask)
    assert loss.item() == pytest.approx(-(math.log(0.3) + math.log(0.6)) / 2)


def test_the_mean_is_over_tokens_of_the_whole_batch():
    """A mean of means: a short answer's tokens then weigh more than a long one's."""
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    logp, total = logits.log_softmax(-1), 0.0
    for b, t in mask.nonzero().tolist():
        total += logp[b, t - 1, tokens[b, t]].item()
    assert sft.masked_loss(logits, tokens, mask).item() == pytest.approx(-total / 5, abs=1e-6)


def test_the_users_words_are_never_imitated():
    """Learning to write questions: what predicts a token outside the mask gets no gradient and
    changes no loss."""
    ids, mask = data.chat_example(TOKENIZER, "Who?", "Ann.")
    tokens, mask = torch.tensor([ids]), torch.tensor([mask])
    logits = torch.randn(1, len(ids), TOKENIZER.n_vocab, requires_grad=True)
    loss = sft.masked_loss(logits, tokens, mask)
    loss.backward()
    predicts_answer = torch.zeros(len(ids), dtype=torch.bool)
    predicts_answer[:-1] = mask[0, 1:] == 1
    size = logits.grad[0].abs().sum(-1)
    assert (size[predicts_answer] > 0).all() and (size[~predicts_answer] == 0).all()
    changed = torch.where(predicts_answer[None, :, None], logits, torch.full_like(logits, 9.0))
    assert sft.masked_loss(changed, tokens, mask).item() == loss.item()


def test_padding_costs_nothing():
    """The pad token learnt as an answer, or padding that changes what the model sees."""
    gpt = tiny_gpt()
    ids, mask = data.chat_example(TOKENIZER, "Where is it?", "In Oslo.")
    tokens, ones = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    alone = sft.masked_loss(gpt(tokens, ones), tokens, torch.tensor([mask])).item()
    segments, mask = torch.tensor([[1] * len(ids) + [0] * 9]), torch.tensor([mask + [0] * 9])
    for garbage in (TOKENIZER.pad, 66):
        tokens = torch.tensor([ids + [garbage] * 9])
        padded = sft.masked_loss(gpt(tokens, segments), tokens, mask).item()
        assert padded == pytest.approx(alone, abs=1e-5)


def settings(**flags):
    """What `train` reads of the flags."""
    return argparse.Namespace(lr=1e-2, seed=0, replay=None, replay_rows=0, **flags)


def test_a_conversation_can_be_memorised():
    """A model that never learns to stop: end-of-text has to be among the assistant's tokens, and
    pad must not be end-of-text."""
    gpt, talk = tiny_gpt(), [("Who?", "Ann."), ("Where?", "In Rome.")]
    history = sft.train(gpt, talk * 16, settings(epochs=50, batch_size=8))
    assert history[-1]["train_loss_nats"] < 0.1
    prompts = [data.chat_prompt(TOKENIZER, question) for question, _ in talk]
    replies = m.generate(gpt, prompts, 20, temperature=0)
    assert [data.decode_reply(TOKENIZER, ids) for ids in replies] == ["Ann.", "In Rome."]
    assert all(ids[-1] == TOKENIZER.eot for ids in replies)


def test_what_is_read_again_reaches_the_step(monkeypatch):
    """Documents whose gradient is wiped before the step: replay then costs time and saves nothing.
    """
    gpt, norms, clip = tiny_gpt(), [], torch.nn.utils.clip_grad_norm_

    def read_again(step):
        for p in gpt.parameters():
            p.grad = torch.full_like(p, 1000.0) + (0 if p.grad is None else p.grad)

    monkeypatch.setattr(sft, "replayer", lambda model, args: read_again)
    def clip_and_note(*args):
        norms.append(clip(*args))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)
    sft.train(gpt, [("Who?", "Ann.")] * 4, settings(epochs=1, batch_size=2))
    assert len(norms) == 2 and min(norms) > 1000


def test_conversations_that_do_not_fit_are_left_out():
    """An index error in the position table in the middle of a run, for one long conversation."""
    talk = [("Who?", "Ann."), ("Who?", "Ann. " * 40)]
    history = sft.train(tiny_gpt(), talk, settings(epochs=1, batch_size=2))
    assert math.isfinite(history[-1]["train_loss_nats"])


def test_the_coloured_mask_shows_what_the_loss_counts():
    """A picture of the mask that is drawn from something else than the mask."""
    shown = sft.colour_mask(TOKENIZER, "Who?", "Ann")
    green = [piece[3:] for piece in shown.split("\033[") if piece.startswith("32m")]
    assert "".join(green) == " Ann<|endoftext|>"


def test_words_keep_their_embeddings():
    """Names of a fine-tuning set that move while all others stay: the set is learnt by heart. The
    chat roles, new to the model, do move."""
    gpt = tiny_gpt()
    before, norms = gpt.tokens.weight.detach().clone(), gpt.norm.weight.detach().clone()
    talk = [("Who?", "Ann."), ("What?", "Tea.")]
    sft.train(gpt, talk, settings(epochs=3, batch_size=2))
    moved = (gpt.tokens.weight != before).any(1)
    assert not moved[:TOKENIZER.eot].any() and (gpt.norm.weight != norms).any()
    assert moved[[TOKENIZER.eot, TOKENIZER.user, TOKENIZER.assistant]].all()
