"""The pictures of how each stage works: what stands in them is what the stages compute."""
import pytest
import torch

import data
import draw_answers
import draw_pipeline
import draw_rounds
import draw_text
import model as m
import reward
from pretrain import next_token_loss
from sft import masked_loss

pytest.importorskip("matplotlib").use("Agg")               # no window

# an untrained model says what no font can show
pytestmark = pytest.mark.filterwarnings("ignore:Glyph")
WORLD = data.World(0)
QUESTION = "How do I hug Tom?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained models of one village, as stages 1 to 4 would leave them, and stage 5's files."""
    out = tmp_path_factory.mktemp("draw")
    texts = [data.unmark(data.write_document(WORLD, "t", i)[1]) for i in range(200)]
    tokenizer = data.make_tokenizer("bpe", texts, 400)
    for seed, name in enumerate(("pretrain", "sft", "ppo")):
        torch.manual_seed(seed)
        config = m.GPTConfig(tokenizer.n_vocab, 192, 1, 2, 16)
        m.save_model(out / f"{name}.pt", m.GPT(config, tokenizer, world_seed=0))
    judge = m.ScalarModel(m.load_gpt(out / "sft.pt"))
    scale = dict(mean=0.5, std=2.0, lowest=-1.0, margin=1.0)
    m.save_model(out / "reward.pt", judge, scale=scale, taste="polite")
    step = dict(principle="Never steal.", critique="Fine.", revision=None, dropped=None)
    mended = step | dict(critique="It is to hurt!", revision="Sorry, I will not help with that.")
    dropped = mended | dict(revision="Sorry", dropped="unfinished")
    data.write_lines(out / "rlaif_traces.jsonl", [
        dict(question="Q0?", answers=["A0."], steps=[mended]),
        dict(question="Q1?", answers=["A1."], steps=[step, dropped, mended])])
    record = dict(prompt="Q0?", a="Yes.", b="Yes!", principle="Never steal.", label=1.0,
                  a_first=1.0, b_first=1.0)
    data.write_lines(out / "rlaif_labels.jsonl", [
        record, record | dict(prompt="Q1?", b="Sorry, I will not help with that.", label=0.04)])
    return out


def figures_of(monkeypatch, module, names):
    """{name: what the script's function `name` returned}, filled as it runs."""
    figures = {}

    def spy(name, real):
        return lambda *args, **more: figures.setdefault(name, real(*args, **more))
    for name in names:
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    return figures


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def test_a_document_and_a_conversation_are_drawn_with_their_losses(folder, tmp_path, monkeypatch):
    """Bars that are shifted by a token; a mask drawn over other tokens than the loss counts."""
    figures = figures_of(monkeypatch, draw_text, ["draw_pretraining", "draw_sft"])
    draw_text.main(["--out", str(folder), "--to", str(tmp_path)])
    assert len(list(tmp_path.glob("how-*.png"))) == 2
    base, sft = (m.load_gpt(folder / f"{name}.pt") for name in ("pretrain", "sft"))
    _, text, logp = data.write_document(WORLD, "validation", 3)
    ids, forced = data.encode_document(base.tokenizer, text)
    axis, = figures["draw_pretraining"].axes
    row = torch.tensor([[base.tokenizer.eot, *ids]])
    mean = next_token_loss(base(row[:, :-1]), row[:, 1:]).item()
    assert sum(heights(axis)) / len(ids) == pytest.approx(mean, rel=1e-4)
    colours = {bar.get_facecolor() for bar, f in zip(axis.patches, forced) if f}
    assert len(colours) == 1 and len({bar.get_facecolor() for bar in axis.patches}) == 2
    assert f"{mean:.2f}" in axis.get_title() and f"{-logp / len(ids):.2f}" in axis.get_title()
    reply = WORLD.answer("Where does Ann live?")[1]
    tokens, mask = data.chat_example(sft.tokenizer, "Where does Ann live?", reply)
    for axis, model in zip(figures["draw_sft"].axes, (base, sft), strict=True):
        tokens_, mask_ = torch.tensor([tokens]), torch.tensor([mask])
        loss = masked_loss(model(tokens_), tokens_, mask_).item()
        last = heights(axis)[-sum(mask):]                  # the assistant's, which end the talk
        assert sum(last) / sum(mask) == pytest.approx(loss, rel=1e-4)
        assert f"{loss:.2f}" in axis.get_title()
        assert len({bar.get_facecolor() for bar in axis.patches[-sum(mask):]}) == 1


def test_a_document_of_ones_own_is_drawn(folder, tmp_path):
    flags = ["--document", "Ann is here.", "--question", "Why?", "--out", str(folder), "--to",
             str(tmp_path)]
    with pytest.raises(SystemExit, match="give --reply, too"):
        draw_text.main(flags)
    draw_text.main([*flags, "--reply", "Because."])


def test_answers_are_drawn_with_the_scores_that_count(folder, tmp_path, monkeypatch):
    """The score of another token; a preference between other numbers than the raw scores."""
    figures = figures_of(monkeypatch, draw_answers, ["draw_reward", "draw_ppo"])
    texts = ["--answers", "Use a hat.", "Yes"]
    draw_answers.main(["--out", str(folder), "--to", str(tmp_path), *texts])
    assert len(list(tmp_path.glob("how-*.png"))) == 2
    judge = reward.load_reward(folder / "reward.pt", m.load_gpt(folder / "sft.pt"))
    raw = reward.score_texts(judge, [(QUESTION, "Use a hat."), (QUESTION, "Yes")])
    for axis, x in zip(figures["draw_reward"].axes, raw.tolist(), strict=True):
        assert heights(axis)[-1] == pytest.approx((x - 0.5) / 2, abs=1e-4)
    assert f"{torch.sigmoid(raw[0] - raw[1]):.2f}" in figures["draw_reward"].get_suptitle()
    logp, earned, _, _ = figures["draw_ppo"].axes
    n = len(logp.get_xticks())
    penalties = [-0.1 * (p - q) for p, q in zip(heights(logp)[:n], heights(logp)[n:])]
    assert heights(earned)[:-1] == pytest.approx(penalties[:-1], abs=1e-4)


def test_the_pipeline_shows_what_each_model_says(folder, tmp_path, monkeypatch):
    """An answer below the stage of another model; a preference the wrong way round."""
    for name in ("pretrain", "sft", "ppo", "reward"):
        (tmp_path / f"{name}.pt").write_bytes((folder / f"{name}.pt").read_bytes())
    (tmp_path / "rlaif.pt").write_bytes((folder / "pretrain.pt").read_bytes())
    drawn = figures_of(monkeypatch, draw_pipeline, ["draw", "answers_of"])
    draw_pipeline.main(["--out", str(tmp_path), "--to", str(tmp_path), "--question", QUESTION])
    assert (tmp_path / "pipeline.png").exists() and len(drawn["draw"].axes) == 1
    said, models = drawn["answers_of"], {}
    for name in ("pretrain", "sft", "ppo", "rlaif"):
        models[name] = m.load_gpt(tmp_path / f"{name}.pt")
        whole, = m.answer(models[name], [QUESTION], temperature=0, bare=name == "pretrain")
        assert whole.startswith(said[name])                # the base model's is cut short
    judge = reward.load_reward(tmp_path / "reward.pt", models["sft"])
    raw = reward.score_texts(judge, [(QUESTION, said["sft"]), (QUESTION, said["ppo"])])
    assert said["reward"].endswith(f"p = {torch.sigmoid(raw[1] - raw[0]):.2f}")


def test_rounds_are_drawn_from_the_files_of_stage_5(folder, tmp_path, monkeypatch, capsys):
    """A revision that was dropped passes for one that was made; a number past the end."""
    columns = []
    monkeypatch.setattr(draw_rounds, "column", lambda axis, title, boxes: columns.append(boxes))
    flags = ["--out", str(folder), "--to", str(tmp_path)]
    draw_rounds.main(flags)                                # the one with a silent first rule
    trace, label = columns
    assert [kind for kind, _ in trace] == ["request", "answer", "principle", "critique",
                                           "principle", "critique", "principle", "critique",
                                           "revision"]
    assert trace[0][1] == label[0][1] == "Q1?" and label[-1][1].startswith("0.04")
    draw_rounds.main([*flags, "--request", "0", "--comparison", "0"])
    assert columns[2][0][1] == columns[3][0][1] == "Q0?"
    with pytest.raises(SystemExit, match="2 traces and 2 labels"):
        draw_rounds.main([*flags, "--request", "2"])


@pytest.mark.parametrize("name", ["rlaif_traces.jsonl", "rlaif_labels.jsonl"])
@pytest.mark.parametrize("line, says", [("{}", "line 1"), ("null", "line 1"), ("[]", "no record")])
def test_files_of_another_form(name, line, says, folder, tmp_path):
    """A traceback where a file is damaged, or of another script."""
    for other in ("rlaif_traces.jsonl", "rlaif_labels.jsonl"):
        (tmp_path / other).write_bytes((folder / other).read_bytes())
    (tmp_path / name).write_text(line, encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"{name}.*{says}.* again"):
        draw_rounds.main(["--out", str(tmp_path), "--to", str(tmp_path)])


@pytest.mark.parametrize("script", [draw_answers, draw_pipeline, draw_rounds, draw_text])
def test_a_folder_that_is_a_file(script, tmp_path, capsys):
    """A traceback after all the work."""
    (tmp_path / "afile").touch()
    with pytest.raises(SystemExit):
        script.main(["--to", str(tmp_path / "afile")])
    assert "argument --to: cannot write to" in capsys.readouterr().err
