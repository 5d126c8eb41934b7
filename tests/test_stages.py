"""All five scripts for real, with tiny settings: what they write, what they refuse, and that an
interrupted run loses nothing."""
import csv
import json
import shutil

import pytest
import torch

import data
import model as m
import ppo
import pretrain
import reward
import rlaif
import sft

PRETRAIN = "--steps 6 --batch-size 4 --layers 2 --heads 2 --channels 32 --context 192 --warmup 2 --eval-every 4".split()
# 55 steps: one saving on the way
SFT = "--demonstrations 220 --epochs 1 --batch-size 4".split()
REWARD = "--prompts 24 --answers 2 --batch-size 2".split()                              # 12 steps
# one saving, after 10
PPO = "--iterations 11 --batch-size 4 --max-new 8 --epochs 1 --minibatch 2".split()
RLAIF = (
    "--red-team 7 --rounds 2 --helpful 6 --sl-epochs 1 --label-prompts 4 --answers 2 --helpful-prompts 4 --iterations 2 --value-warmup 0 --batch-size 4 "
    "--max-new 8 --epochs 1 --minibatch 2 --eval-prompts 7"
).split()
STAGES = {
    "pretrain": (pretrain, PRETRAIN),
    "sft": (sft, SFT),
    "reward": (reward, REWARD),
    "ppo": (ppo, PPO),
    "rlaif": (rlaif, RLAIF),
}
HARM_JUDGES = ("is_harmless", "is_compliant", "gives_reason")


def run(stage, out, *more):
    module, flags = STAGES[stage]
    module.main([*flags, "--out", str(out), "--device", "cpu", *more])


def smaller_evaluations(patch):
    """The same evaluations on fewer prompts and shorter answers: an untrained model never stops by
    itself."""
    validation_set, fact_questions, prompts, generate = (
        pretrain.validation_set,
        data.fact_questions,
        reward.preference_prompts,
        m.generate_batch,
    )
    patch.setattr(
        pretrain,
        "validation_set",
        lambda world, tokenizer, n, *rest: validation_set(world, tokenizer, 40, *rest),
    )
    patch.setattr(data, "fact_questions", lambda world, use: fact_questions(world, use)[:20])
    patch.setattr(
        reward, "preference_prompts", lambda world, use, n: prompts(world, use, min(n, 24))
    )
    patch.setattr(
        m,
        "generate_batch",
        lambda model, batch, max_new, *rest: generate(model, batch, min(max_new, 10), *rest),
    )


def no_judge_of_harm_inside(patch, owner, name):
    """While this function runs, the gold judges of harm raise."""
    real = getattr(owner, name)

    def judged(*args, **options):
        raise AssertionError(f"{name} called a gold judge of harm")

    def blindfolded(*args, **options):
        with pytest.MonkeyPatch.context() as inner:
            for judge in HARM_JUDGES:
                inner.setattr(data, judge, judged)
            return real(*args, **options)

    patch.setattr(owner, name, blindfolded)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """All five stages, once."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        smaller_evaluations(patch)
        for owner, name in [
            (sft, "train"),
            (reward, "train"),
            (ppo, "train"),
            (reward, "annotate"),
            (reward, "sample_answers"),
            (reward, "normalise"),
            (rlaif, "supervised_phase"),
            (rlaif, "feedback_phase"),
        ]:
            no_judge_of_harm_inside(patch, owner, name)
        for stage in STAGES:
            run(stage, folder)
    return folder


def weights(path):
    return m.load(path)["model"]


def assert_equal_weights(path, other):
    a, b = weights(path), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_stage_writes_what_it_says(out):
    """A script that only works on its author's machine, or a stage that calls a gold judge of harm
    while it trains."""
    promised = {
        "pretrain": ["val_loss", "entropy_floor", "forced_accuracy_drill", "fact_cloze"],
        "sft": ["fact_accuracy_undemonstrated"],
        "reward": ["accuracy", "ceiling"],
        "ppo": ["gold_ppo", "win_rate"],
        "rlaif": [
            "harm_rlcai_g1",
            "over_refusal_rlcai_g2_high",
            "human_harm_labels",
            "verdict_g2",
            "label_good_g2",
        ],
    }
    for stage, figures in promised.items():
        written = json.loads((out / f"{stage}.json").read_text())
        assert all(name in written for name in figures) and all(
            isinstance(x, (int, float)) for x in written.values()
        )
        header, *rows = (out / f"{stage}.csv").read_text().splitlines()
        assert rows and all(row.count(",") == header.count(",") for row in rows)
    for name in ("pretrain", "sft", "reward", "ppo", "slcai", "rlaif_pm", "rlaif"):
        assert m.load(out / f"{name}.pt")["world_seed"] == 0
    # the preference model's scores stay log-odds
    assert m.load(out / "rlaif_pm.pt")["scale"]["std"] == 1
    figures = json.loads((out / "rlaif.json").read_text())
    assert (
        figures["human_harm_labels"]
        == figures["gold_harm_calls_in_training"]
        == 0
        < figures["ai_labels"]
    )
    documents = m.load(out / "pretrain.pt")["documents"]
    assert (
        figures["verdict_documents"]
        == documents["critique"] + documents["comparison"] + documents["drill"]
        < sum(documents.values())
    )
    assert not list(out.glob("*.resume.pt")) and not list(out.glob("*.tmp"))
    assert (
        len((out / "rlaif_traces.jsonl").read_text().splitlines()) == 7
        and len((out / "preferences.jsonl").read_text().splitlines()) > 10
    )


def test_the_reader_can_be_the_annotator(out, tmp_path, monkeypatch):
    """The showcase of Stage 3 that ends in a traceback, since prompts of a file are conversations
    and those of the world are text."""
    smaller_evaluations(monkeypatch)
    monkeypatch.setattr("builtins.input", lambda question: "1")
    run("reward", tmp_path, "--init", str(out / "sft.pt"), "--annotator", "me")
    labels = (tmp_path / "my_preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert (
        len(labels) >= 20
        and json.loads((tmp_path / "reward.json").read_text(encoding="utf-8"))["prompts_heldout"]
        == len(labels) // 10
    )


def test_every_stage_changes_the_model(out):
    """A loop that runs, logs and saves, and whose optimizer holds another model's weights."""
    for before, after in [
        ("pretrain", "sft"),
        ("sft", "ppo"),
        ("pretrain", "slcai"),
        ("slcai", "rlaif"),
    ]:
        a, b = weights(out / f"{before}.pt"), weights(out / f"{after}.pt")
        assert any(not torch.equal(a[k], b[k]) for k in a)
    # measured from the frozen model, not from the policy itself
    with open(out / "ppo.csv", encoding="utf-8", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["kl_nats"]) > 0
    sft_weights, rm = weights(out / "sft.pt"), weights(out / "reward.pt")
    assert rm.keys() == {f"gpt.{k}" for k in sft_weights} | {"scalar.weight", "scalar.bias"}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, out, tmp_path, monkeypatch):
    """Optimizer state, data order or random numbers lost on the way: the resumed run is then
    another run."""
    for name in ("pretrain.pt", "sft.pt", "reward.pt"):
        if name != f"{stage}.pt":
            shutil.copy(out / name, tmp_path / name)
    smaller_evaluations(monkeypatch)
    module, _ = STAGES[stage]
    save_progress = module.save_progress

    def interrupted(*args, **parts):
        save_progress(*args, **parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stage, tmp_path)
    assert (tmp_path / f"{stage}.resume.pt").exists()
    run(stage, tmp_path, "--resume")
    assert_equal_weights(out / f"{stage}.pt", tmp_path / f"{stage}.pt")
    resumed, whole = (
        [
            [v for k, v in row.items() if not k.startswith("seconds")]
            for row in csv.DictReader(path.read_text().splitlines())
        ]
        for path in (tmp_path / f"{stage}.csv", out / f"{stage}.csv")
    )
    assert resumed == whole and whole
    assert not (tmp_path / f"{stage}.resume.pt").exists()


@pytest.mark.parametrize("lost", [["rlaif.pt"], ["rlaif.pt", "rlaif_pm.pt", "slcai.pt"]])
def test_rlaif_goes_on_after_its_last_finished_phase(lost, out, tmp_path, monkeypatch):
    """A phase that depends on what an earlier one left in memory: resumed, it comes to other
    weights."""
    for path in out.iterdir():
        if path.name not in lost:
            shutil.copy(path, tmp_path / path.name)
    smaller_evaluations(monkeypatch)
    monkeypatch.setattr(rlaif, "revise_rounds", None)             # phase 1 must not run again
    monkeypatch.setattr(rlaif, "final_table", lambda *args: {})
    run("rlaif", tmp_path, "--resume")
    for name in ("slcai.pt", "rlaif_pm.pt", "rlaif.pt"):
        assert_equal_weights(out / name, tmp_path / name)


def test_a_run_with_other_flags_is_not_resumed(out, tmp_path, monkeypatch):
    """Half a run with one learning rate and half with another."""
    smaller_evaluations(monkeypatch)
    m.save_progress(
        tmp_path / "sft.resume.pt", 3, {"lr": 0.5}, [], model=m.load_gpt(out / "sft.pt")[0]
    )
    shutil.copy(out / "pretrain.pt", tmp_path)
    with pytest.raises(SystemExit, match="use the same flags"):
        run("sft", tmp_path, "--resume")
    with pytest.raises(SystemExit, match="without --resume"):
        run("pretrain", tmp_path, "--resume")


@pytest.mark.parametrize(
    "stage, needs",
    [
        ("sft", ["pretrain"]),
        ("reward", ["sft"]),
        ("ppo", ["sft", "reward"]),
        ("rlaif", ["pretrain", "ppo", "sft"]),
    ],
)
def test_a_missing_input_names_the_script_to_run(stage, needs, out, tmp_path):
    """A traceback that ends in FileNotFoundError, for somebody who ran the second command first."""
    for missing in needs:
        folder = tmp_path / missing
        folder.mkdir()
        for name in ("pretrain", "sft", "reward", "ppo"):
            if name != missing:
                shutil.copy(out / f"{name}.pt", folder)
        with pytest.raises(
            SystemExit, match=rf"{missing}.pt not found: run `python {missing}.py` first"
        ):
            run(stage, folder)


def test_missing_labels_name_the_script_to_run(out, tmp_path, monkeypatch):
    """The preference file forgotten while the models were copied: an hour of critiques, then a
    traceback."""
    smaller_evaluations(monkeypatch)
    for path in out.glob("*.*"):
        if path.name not in ("rlaif.pt", "rlaif_pm.pt", "preferences.jsonl"):
            shutil.copy(path, tmp_path)
    with pytest.raises(SystemExit, match="run `python reward.py` first"):
        run("rlaif", tmp_path, "--resume")


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_pretraining_on_your_own_text(tokenizer, tmp_path, capsys):
    """The first thing that people try: their own file, in any language."""
    text = tmp_path / "verse.txt"
    text.write_text("Zoë mends a kite; the wind mends Zoë.\n" * 200, encoding="utf-8")
    flags = "--steps 4 --batch-size 2 --layers 1 --heads 2 --channels 16 --context 32 --eval-every 2 --vocab-size 300 --device cpu".split()
    pretrain.main([*flags, "--data", str(text), "--tokenizer", tokenizer, "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "pretrain.json").read_text())
    assert (
        figures["val_loss_nats_per_byte"] > 0
        and len((tmp_path / "pretrain.csv").read_text().splitlines()) == 3
    )
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
    with pytest.raises(SystemExit, match="your own text"):
        sft.main(["--out", str(tmp_path), "--device", "cpu"])
    text.write_text("short")
    with pytest.raises(SystemExit, match="too short"):
        pretrain.main([*flags, "--data", str(text), "--tokenizer", "bytes", "--out", str(tmp_path)])


def test_pretraining_goes_on_from_a_checkpoint(out, tmp_path, monkeypatch):
    """--init that loads the weights and then builds another tokenizer."""
    smaller_evaluations(monkeypatch)
    run("pretrain", tmp_path, "--init", str(out / "pretrain.pt"), "--lr", "0", "--muon-lr", "0")
    assert_equal_weights(out / "pretrain.pt", tmp_path / "pretrain.pt")
    assert m.load(tmp_path / "pretrain.pt")["tokenizer"] == m.load(out / "pretrain.pt")["tokenizer"]


def test_answers_that_are_all_equally_good(out, tmp_path, monkeypatch):
    """A division by the distance between ceiling and chance, which is 0 where a weak model's
    answers are all alike."""
    smaller_evaluations(monkeypatch)
    shutil.copy(out / "sft.pt", tmp_path)
    monkeypatch.setattr(data, "utility", lambda *args: 0.0)
    run("reward", tmp_path)
    assert json.loads((tmp_path / "reward.json").read_text())["ceiling"] == 0.5


def test_chat_prints_an_answer(out, capsys):
    """A chat that prints nothing, or the answers of two models without their names. (At temperature
    3 the tiny model does not end at once.)"""
    m.main(
        [
            str(out / "sft.pt"),
            "--prompt",
            "Where does Ann live?",
            "--max-new",
            "8",
            "--temperature",
            "3",
            "--device",
            "cpu",
        ]
    )
    one = capsys.readouterr().out
    m.main(
        [
            str(out / "pretrain.pt"),
            str(out / "sft.pt"),
            "--prompt",
            "Where does Ann live?",
            "--max-new",
            "8",
            "--temperature",
            "3",
            "--device",
            "cpu",
        ]
    )
    two = capsys.readouterr().out.splitlines()
    assert (
        one.strip()
        and one.strip().splitlines()[0] in "\n".join(two)
        and any(line.startswith(str(out / "pretrain.pt")) for line in two)
    )
    with pytest.raises(SystemExit, match="nothing.pt not found"):
        m.main(["nothing.pt", "--prompt", "Hi"])


def test_show_prints_and_trains_nothing(out, tmp_path, monkeypatch, capsys):
    """--show that overwrites the checkpoints it was to explain."""
    smaller_evaluations(monkeypatch)
    for path in out.glob("*.pt"):
        shutil.copy(path, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run("ppo", tmp_path, "--show")
    assert "advantage" in capsys.readouterr().out
    run("rlaif", tmp_path, "--show")
    assert "P(A is better)" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_ppo_against_the_gold_judge(out, tmp_path, monkeypatch):
    """The teaching mode of exercise and README, which no other test runs."""
    smaller_evaluations(monkeypatch)
    for name in ("sft.pt", "reward.pt"):
        shutil.copy(out / name, tmp_path)
    run("ppo", tmp_path, "--reward", "gold", "--iterations", "1")
    assert (tmp_path / "ppo.pt").exists()


def test_controls_of_rlaif(out, tmp_path, monkeypatch, capsys):
    """A control that trains like the default, writes over it, or reports an unseen constitution's
    figures as G1."""
    smaller_evaluations(monkeypatch)
    revisions = data.direct_revisions
    monkeypatch.setattr(data, "direct_revisions", lambda world, n: revisions(world, 20))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    run(
        "rlaif",
        tmp_path,
        "--inputs",
        str(out),
        "--constitution",
        "unseen",
        "--no-critique",
        "--hard",
        "--learn",
        "all",
    )
    figures = json.loads((tmp_path / "rlaif.json").read_text())
    assert (
        "harm_rlcai_g3" in figures
        and "harm_rlcai_g2g3" in figures
        and "harm_rlcai_g1" not in figures
    )
    assert {
        json.loads(line)["label"]
        for line in (tmp_path / "rlaif_labels.jsonl").read_text().splitlines()
    } <= {0.0, 0.5, 1.0}
    principles = {
        step["principle"]
        for line in (tmp_path / "rlaif_traces.jsonl").read_text().splitlines()
        for step in json.loads(line)["steps"]
    }
    assert all(p.startswith("To ") and p.endswith(" is bad.") for p in principles)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run("rlaif", tmp_path, "--inputs", str(out), "--no-critique", "--show")
    assert "P(A is better)" in capsys.readouterr().out


def test_human_harm_labels_beside_rlcai(out, tmp_path, monkeypatch, capsys):
    """The comparison of the paper that leaves out its rival, clears the rival's files or calls
    people's labels an AI's."""
    smaller_evaluations(monkeypatch)
    for name in ("rlaif.pt", "slcai.pt", "rlaif_traces.jsonl"):
        shutil.copy(out / name, tmp_path)
    for resume in ([], ["--resume"]):
        run("rlaif", tmp_path, "--inputs", str(out), "--human-harm", *resume)
        figures = json.loads((tmp_path / "human_harm.json").read_text())
        assert (
            figures["human_harm_labels"] > 0 == figures["ai_labels"]
            and "harm_rlcai_g1" in figures
            and "generic_humanharm_g2" in figures
        )
    assert (
        m.load(tmp_path / "human_harm.pt")["stage"] == "human_harm"
        and not (tmp_path / "rlaif_labels.jsonl").exists()
    )
    assert_equal_weights(out / "rlaif.pt", tmp_path / "rlaif.pt")


def test_rlaif_with_files_of_ones_own(out, tmp_path, monkeypatch, capsys):
    """A principle of the paper's length that fills the context of a small model: a ValueError from
    inside the sampler, an hour into the run."""
    smaller_evaluations(monkeypatch)
    for path in out.iterdir():
        shutil.copy(path, tmp_path)
    prompts, rules = tmp_path / "prompts.jsonl", tmp_path / "rules.json"
    records = [
        {"prompt": "How do I kick Tom?"},
        {"transcript": "\n\nHuman: How do I hit Ann?\n\nAssistant: No."},
        {"prompt": "Why? " * 90},
    ]
    prompts.write_text(json.dumps(records))
    rules.write_text('[{"critic": "Say no to harm.", "revision": "Rewrite it."}]')
    files = ["--red-team-file", str(prompts), "--constitution", str(rules)]
    run("rlaif", tmp_path, *files, "--show")
    printed = capsys.readouterr().out
    assert (
        "1 principles, 2 red-team prompts" in printed
        and "1 prompts skipped: longer than the" in printed
    )
    assert printed.count("principle: Say no to harm.") == 3 and "How do I kick Tom?" in printed
    run("rlaif", tmp_path, *files)
    asked = [
        json.loads(line)["prompt"]
        for line in (tmp_path / "rlaif_labels.jsonl").read_text().splitlines()
    ]
    assert "How do I hit Ann?" in asked or "How do I kick Tom?" in asked
    rules.write_text(
        '[{"critic": "'
        + "Identify ways in which the answer is harmful. " * 9
        + '", "revision": "Rewrite it."}]'
    )
    with pytest.raises(
        SystemExit,
        match="no request fits the context of 192 tokens .* the principle 'Identify ways",
    ):
        run("rlaif", tmp_path, *files, "--show")
    rules.write_text("\n")
    with pytest.raises(SystemExit, match="one short principle a line"):
        run("rlaif", tmp_path, "--constitution", str(rules), "--show")


def test_all_five_stages_without_a_world(tmp_path, monkeypatch, capsys):
    """A stage that quietly needs the small world: the road from one's own text to one's own
    constitution then ends half way."""
    smaller_evaluations(monkeypatch)
    files = {
        "text.txt": "The cat sat on the mat. The dog ate the bone.\n" * 300,
        "prompts.txt": "Who sat?\nWho ate?\nWhere is it?\n",
        "red.txt": "How do I rob a cat?\nHow do I kick it?\n",
        "rules.txt": "Do not harm the cat.\n",
        "talks.jsonl": "".join(
            json.dumps({"prompt": f"Who sat {i}?", "completion": f"The cat {i}."}) + "\n"
            for i in range(40)
        ),
        "pairs.jsonl": "".join(
            json.dumps(
                {"prompt": f"Who sat {i}?", "chosen": f"The cat {i}.", "rejected": f"A dog {i}."}
            )
            + "\n"
            for i in range(40)
        ),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    file = {name.split(".")[0]: str(tmp_path / name) for name in files}
    run("pretrain", tmp_path, "--data", file["text"], "--vocab-size", "300", "--context", "256")
    run("sft", tmp_path, "--data", file["talks"])
    run("reward", tmp_path, "--data", file["pairs"])
    run("ppo", tmp_path, "--prompts", file["prompts"])
    run(
        "rlaif",
        tmp_path,
        "--prompts",
        file["prompts"],
        "--red-team-file",
        file["red"],
        "--preferences",
        file["pairs"],
        "--constitution",
        file["rules"],
    )
    assert "36 labelled pairs" in capsys.readouterr().out and not json.loads(
        (tmp_path / "ppo.json").read_text()
    ).get("gold_ppo")
    for name in ("pretrain", "sft", "reward", "ppo", "slcai", "rlaif"):
        assert m.load(tmp_path / f"{name}.pt")["world_seed"] is None


def test_documents_can_be_left_out(tmp_path, monkeypatch, capsys):
    """The control of Stage 5 that is none: the documents said to be left out are still among them,
    or the shares no longer add up to 1."""
    smaller_evaluations(monkeypatch)
    run("pretrain", tmp_path, "--without", "critique", "drill", "comparison")
    documents = m.load(tmp_path / "pretrain.pt")["documents"]
    assert (
        not {"critique", "drill", "comparison"} & set(documents)
        and len(documents) == len(data.DOCUMENTS) - 3
    )
    assert "critique" not in capsys.readouterr().out and "entropy_floor_drill" not in json.loads(
        (tmp_path / "pretrain.json").read_text()
    )


@pytest.mark.parametrize(
    "stage, flag",
    [
        (pretrain, "--steps"),
        (sft, "--epochs"),
        (reward, "--answers"),
        (ppo, "--iterations"),
        (rlaif, "--batch-size"),
    ],
)
def test_nothing_is_counted_from_zero(stage, flag, capsys):
    """A traceback minutes later, from the mean of an empty list."""
    with pytest.raises(SystemExit):
        stage.main([flag, "0"])
    assert f"{flag}: 0 is too few: at least 1" in capsys.readouterr().err
