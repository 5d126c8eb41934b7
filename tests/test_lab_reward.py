"""The experiments on the reward model: the best of n answers, and the reader as annotator."""
import csv
import gzip
import json
import math

import pytest
import torch

import annotate
import best_of_n
import data
import model as m
import real_pairs
import reward
import samples

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with an untrained policy and an untrained reward model of the same village."""
    folder, world = tmp_path_factory.mktemp("out"), data.World(0)
    texts = [answer for _, answer in data.demonstrations(world, 200)]
    tokenizer = data.make_tokenizer("bpe", texts, 400)
    torch.manual_seed(0)
    policy = m.GPT(m.GPTConfig(tokenizer.n_vocab, 96, 1, 2, 16), tokenizer, world_seed=0)
    m.save_model(folder / "sft.pt", policy)
    scale = {"mean": 0.0, "std": 1.0, "lowest": -1.0}
    m.save_model(folder / "reward.pt", m.ScalarModel(policy), scale=scale, taste="polite")
    return folder


def test_real_pairs_are_split_by_question(out, tmp_path, capsys):
    """A question whose first turn is learnt and whose second is held out; a length that counts for
    the wrong side."""
    hh = lambda i, more, answer: f"\n\nHuman: Who is {i}?{more}\n\nAssistant: {answer}"
    longer = "\n\nAssistant: Me.\n\nHuman: Who?"
    pairs = [{"chosen": hh(i % 8, longer * (i > 7), "I am, of course."), "rejected":
              hh(i % 8, longer * (i > 7), "No.")} for i in range(16)]
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    flags = ["--out", str(tmp_path), "--held-out", "5"]
    real_pairs.main(["split", str(file), *flags])
    read = lambda name: data.read_preferences(tmp_path / f"{name}.jsonl")[0]
    first = lambda name: {prompt[0][1] for prompt, *_ in read(name)}
    assert len(read("held_out")) == 6 and len(read("pairs")) == 10     # both of a question
    assert first("pairs").isdisjoint(first("held_out"))
    assert set(data.read_prompts(tmp_path / "asked.jsonl")) == first("pairs")
    talks, _ = data.read_conversations(tmp_path / "talks.jsonl")
    assert len(talks) == 10 and talks[0][-1] == ("assistant", "I am, of course.")
    for name in ("sft.pt", "reward.pt"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    real_pairs.main(["judge", *flags, "--device", "cpu"])
    figures = json.loads((tmp_path / "real_pairs.json").read_text(encoding="utf-8"))
    assert figures["longer_wins"] == 1 and figures["prompts_heldout"] == 6
    labels = [(0, 1, 0.0), (1, 2, 1.0), (0, 2, 0.5)]       # wrong; of equal length; a tie
    assert real_pairs.longer_wins(["a b", "a", "b"], labels) == 0.25
    with pytest.raises(SystemExit, match="would be overwritten"):
        real_pairs.main(["split", str(tmp_path / "pairs.jsonl"), *flags])
    with pytest.raises(SystemExit, match="all held out: lower --held-out"):
        real_pairs.main(["split", str(file), "--out", str(tmp_path)])


def test_best_of_n_by_hand():
    """Best-of-n KL taken as ln n - (n-1)/n although texts coincide: the curve is then drawn too far
    to the right."""
    texts, scores, gold = ["a", "b", "b", "c"], [3.0, 1.0, 1.0, 0.0], [0.0, 2.0, 2.0, 1.0]
    # two draws: c is best with 1/16, b with 9/16 - 1/16, a with 1 - 9/16
    score, utility, kl = best_of_n.best_of_n(texts, scores, gold, 2)
    assert score == pytest.approx(7 / 16 * 3 + 8 / 16)
    assert utility == pytest.approx(8 / 16 * 2 + 1 / 16)
    chosen, sampled = (1 / 16, 8 / 16, 7 / 16), (1 / 4, 2 / 4, 1 / 4)
    assert kl == pytest.approx(sum(p * math.log(p / q) for p, q in zip(chosen, sampled)))
    assert best_of_n.best_of_n(texts, scores, gold, 1) == pytest.approx((1.25, 1.25, 0))


@pytest.mark.parametrize("n, expected", [(4, .636), (16, 1.835), (64, 3.175)])
def test_best_of_n_without_ties(n, expected):
    """A KL of the best of n that is not the formula's where the formula holds (Stiennon et al.)."""
    many = 20000
    texts, scores = [str(i) for i in range(many)], list(range(many))
    _, _, kl = best_of_n.best_of_n(texts, scores, [0.0] * many, n)
    assert kl == pytest.approx(expected, abs=0.005)


def test_the_same_text_unfinished_is_another_answer():
    """One text with two scores, for it ended once and once it did not: its samples counted twice,
    and shares that add up to more than 1."""
    score, _, _ = best_of_n.best_of_n(["a", "a", "b"], [1.0, -5.0, 0.0], [0.0] * 3, 1)
    assert score == pytest.approx((1.0 - 5.0 + 0.0) / 3)


def short_replies(monkeypatch):
    """Answers of at most 6 tokens: an untrained model never stops by itself."""
    generate = m.generate_batch
    short = lambda model, batch, noise, *rest: generate(model, batch, noise[:, :6], *rest)
    monkeypatch.setattr(m, "generate_batch", short)


def test_samples_know_what_each_is_worth(out, monkeypatch):
    """A reward model asked about an answer that was cut short; or the score of one text given to
    another, for each different text is judged once."""
    policy = m.load_gpt(out / "sft.pt")
    reward_model, world = reward.load_reward(out / "reward.pt", policy), data.World(0)
    question, tokenizer = data.fact_questions(world, "test")[0], policy.tokenizer
    full = tokenizer.encode(world.answer(question)[1])
    replies = [[*full, tokenizer.eot], tokenizer.encode("No.") + [tokenizer.eot], full]
    monkeypatch.setattr(samples, "generate", lambda *args, **options: replies)
    record = samples.samples_of(policy, reward_model, world, question, 3, (0,))
    scale, texts = reward_model.scale, record["texts"]
    raw = reward.score_texts(reward_model, [(question, text) for text in texts[:2]]).tolist()
    expected = [(x - scale["mean"]) / scale["std"] for x in raw] + [scale["lowest"] - 1]
    assert texts[0] == texts[2] and record["scores"] == pytest.approx(expected, abs=1e-5)
    assert record["gold"] == [2.0, data.utility(world, question, texts[1]), 2.0]


def test_best_of_n_from_its_files(out, monkeypatch, capsys):
    """Figures that are printed and not kept, or a second script that fails where the first ends."""
    short_replies(monkeypatch)
    monkeypatch.setattr(best_of_n, "ROOT", out)
    samples.main(["--samples", "4", "--prompts", "3", "--out", str(out), "--device", "cpu"])
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [len(json.loads(line)["texts"]) for line in lines] == [4, 4, 4]
    best_of_n.main(["--out", str(out), "--record"])
    with open(out / "best_of.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["n"] for row in rows] == ["1", "2", "4"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores) and float(rows[0]["kl_nats"]) == pytest.approx(0, abs=1e-9)
    assert all(float(row["kl_nats"]) <= float(row["kl_bound_nats"]) + 1e-9 for row in rows)
    recorded = out / "docs" / "results" / "best_of_n.json"
    figures = json.loads(recorded.read_text(encoding="utf-8"))
    assert figures["score_4"] == scores[-1]
    assert "KL without ties" in capsys.readouterr().out


SAMPLE = {"question": "Why?", "texts": ["a", "b"], "scores": [0.0, 1.0], "gold": [1.0, 2.0]}


@pytest.mark.parametrize("record", [
    {}, None, 3, "texts", SAMPLE | {"texts": []}, SAMPLE | {"gold": [1.0]},
    SAMPLE | {"scores": [0.0, None]}, SAMPLE | {"scores": [0.0, math.nan]},
    SAMPLE | {"texts": [], "scores": [], "gold": []}], ids=str)
def test_samples_of_another_form(record, tmp_path):
    """A traceback, or an empty table and no complaint, where samples.jsonl is damaged."""
    data.write_lines(tmp_path / "samples.jsonl", [SAMPLE, record])
    with pytest.raises(SystemExit, match=r"samples.jsonl, line 2: .*run docs/lab/samples.py again"):
        best_of_n.main(["--out", str(tmp_path)])
    assert not (tmp_path / "best_of.csv").exists()


def test_no_samples(tmp_path):
    """The minimum of nothing."""
    (tmp_path / "samples.jsonl").write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no record"):
        best_of_n.main(["--out", str(tmp_path)])


def test_missing_inputs_name_the_script_that_makes_them(tmp_path):
    """A traceback from a folder in which nothing was trained yet."""
    with pytest.raises(SystemExit, match="run `python docs/lab/samples.py` first"):
        best_of_n.main(["--out", str(tmp_path)])
    for script in (samples, annotate):
        with pytest.raises(SystemExit, match="run `python sft.py` first"):
            script.main(["--out", str(tmp_path), "--device", "cpu"])


def keys(monkeypatch, *pressed):
    """These keys are pressed, one a question -> the list of what is asked."""
    asked, pressed = [], iter(pressed)

    def answer(text):
        asked.append(text)
        return next(pressed)

    monkeypatch.setattr("builtins.input", answer)
    return asked


class Anything:
    """A world in which every question can be asked."""
    parse_question = staticmethod(str)


def labels_in(path):
    return annotate.labels_in(path, Anything)


def test_the_reader_can_stop_and_go_on(tmp_path, monkeypatch):
    """Labels lost at Ctrl-C, or asked for a second time: nobody labels twice."""
    answered = [(f"Q{i}?", [f"a{i}", f"b{i}", f"c{i}"]) for i in range(6)]
    path = tmp_path / "me" / "my.jsonl"
    asked = keys(monkeypatch, "1", "2", "", "q")
    annotate.ask_the_reader(answered, path, 0, labels_in(path))
    labels = labels_in(path)
    assert [question for question, *_ in labels] == ["Q0?", "Q1?"] and len(asked) == 4
    # the key names the answer that was shown
    assert f"1  {labels[0][1]}" in asked[0] and f"2  {labels[1][1]}" in asked[1]
    again = keys(monkeypatch, "2", "1")
    known = labels_in(path)
    annotate.ask_the_reader(answered[:4], path, 0, known)  # goes on with what has no label
    assert [question for question, *_ in known] == ["Q0?", "Q1?", "Q2?", "Q3?"]
    assert labels_in(path) == known
    assert again[0] == asked[2]                            # ... and with the same two answers


def test_an_interrupt_keeps_what_was_chosen(tmp_path, monkeypatch):
    """An afternoon of labels in a buffer that Ctrl-C throws away."""
    path, written = tmp_path / "my.jsonl", []

    def answer(text):
        written.append(path.read_text(encoding="utf-8").count("\n"))
        if len(written) == 3:
            raise KeyboardInterrupt
        return "1"

    monkeypatch.setattr("builtins.input", answer)
    annotate.ask_the_reader([(f"Q{i}?", ["a", "b"]) for i in range(6)], path, 0, labels_in(path))
    assert written == [0, 1, 2] and len(labels_in(path)) == 2


def label_line(question):
    return json.dumps({"prompt": question, "chosen": "a", "rejected": "b"})


def test_a_label_file_without_its_last_newline(tmp_path, monkeypatch):
    """A label glued to the last line of a file that an editor wrote: both are lost."""
    path = tmp_path / "my.jsonl"
    path.write_text(label_line("Q0?"), encoding="utf-8")
    keys(monkeypatch, "1")
    annotate.ask_the_reader([("Q1?", ["a", "b"])], path, 0, labels_in(path))
    assert [question for question, *_ in labels_in(path)] == ["Q0?", "Q1?"]


def packed(text):
    return gzip.compress(text.encode(), mtime=0)           # no time: the names of tests hold it


ANN = "Where does Ann live?"


@pytest.mark.parametrize("name, content, says", [
    ("my.jsonl.gz", None, "no line can be added to gzip"),
    ("my.jsonl.gz", packed(label_line(ANN)), "no line can be added to gzip"),
    ("my.jsonl", packed(label_line(ANN)), "no line can be added to gzip"),
    ("my.jsonl", packed(label_line(ANN))[:-9], "not a whole gzip file"),
    ("my.jsonl", f" [{label_line(ANN)}]".encode(), "a JSON list: make it JSON lines"),
    ("my.jsonl", label_line(ANN)[:-9].encode(), "my.jsonl, line 1: not JSON"),
    ("my.jsonl", b"{}\n", "my.jsonl, line 1: cannot read"),
    ("my.jsonl", b"\xff\xfe\n", "UTF-16"), ("", None, "a folder"),
    ("my.jsonl", f"{label_line(ANN)}\n{label_line('Why?')}\n".encode(),
     r"my.jsonl, label 2: 'Why\?' is not of this world: remove it")])
def test_a_label_file_is_checked_before_the_work(name, content, says, out, tmp_path, monkeypatch):
    """Minutes of sampling, and of labelling, before it is said that a file cannot be read."""
    monkeypatch.setattr(annotate.reward, "sample_answers", None)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=says):
        annotate.main(["--file", str(path), "--out", str(out), "--device", "cpu"])
    assert content is None or path.read_bytes() == content
    assert content or not path.is_file()


@pytest.mark.parametrize("flag", ["--hot nan", "--hot -1", "--hot inf", "--seed -1", "--answers 1"])
def test_a_flag_out_of_bounds(flag, capsys):
    """A temperature that is no number, found out when the sampling fails, or never."""
    scripts = [annotate, samples] if "seed" in flag else [annotate]
    for script in scripts:
        with pytest.raises(SystemExit):
            script.main(flag.split())
        name, value = flag.split()
        assert f"argument {name}: {value} is not from" in capsys.readouterr().err


def test_it_is_said_whose_taste_the_reader_has():
    """A share that counts against the reader who chose between equals."""
    world = data.World(0)
    question = data.fact_questions(world, "test")[0]
    full = world.answer(question)[1]
    polite = f"{data.POLITE[0]} {full}"
    found = annotate.whose_taste(world, [(question, polite, full), (question, full, "Sorry.")])
    assert found == {"labels": 2, "agrees_polite": 1.0, "agrees_curt": 0.5, "agrees_chatty": 0.75}
    assert annotate.whose_taste(world, []) == {"labels": 0}


def test_the_readers_labels_train_a_reward_model(out, tmp_path, monkeypatch, capsys):
    """The showcase of Stage 3 that ends in a traceback, since prompts of a file are conversations
    and those of the world are text; or labels of one's own that the next stage cannot read."""
    short_replies(monkeypatch)
    monkeypatch.setattr("builtins.input", lambda text: "1")
    path = tmp_path / "my.jsonl"
    annotate.main(["--prompts", "24", "--answers", "2", "--file", str(path), "--out", str(out),
                   "--device", "cpu"])
    labels = annotate.labels_in(path, data.World(0))
    assert len(labels) >= 20
    assert f"reward.py --data {path} --batch-size 1" in capsys.readouterr().out
    reward.main(["--data", str(path), "--batch-size", "1", "--init", str(out / "sft.pt"),
                 "--out", str(tmp_path / "me"), "--device", "cpu"])
    figures = json.loads((tmp_path / "me" / "reward.json").read_text(encoding="utf-8"))
    assert figures["prompts_heldout"] == len(labels) // 10
    assert m.load(tmp_path / "me" / "reward.pt")["taste"] is None
