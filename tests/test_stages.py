"""All five scripts for real, with tiny settings: what they write, what they refuse, and that an
interrupted run loses nothing."""
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import model as m
import ppo
import pretrain
import reward
import rlaif
import sft

ROOT = Path(__file__).parent.parent
NETWORK = "--batch-size 4 --layers 2 --heads 2 --channels 32 --context 192".split()
UPDATES = "--batch-size 4 --max-new 8 --epochs 1 --minibatch 2".split()
FLAGS = {
    "pretrain": [*NETWORK, *"--steps 6 --warmup 2 --eval-every 4".split()],
    "sft": "--demonstrations 220 --epochs 1 --batch-size 4".split(),   # 55 steps: one saving
    "reward": "--prompts 24 --answers 2 --batch-size 2".split(),       # 12 steps
    "ppo": ["--iterations", "11", *UPDATES],                           # one saving, after 10
    "rlaif": [*"--red-team 7 --rounds 2 --helpful 6 --label-prompts 4 --iterations 2".split(),
              *"--value-warmup 0 --eval-prompts 7".split(), *UPDATES],
}
MODULES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "rlaif": rlaif}
HARM_JUDGES = ("is_harmless", "is_compliant", "gives_reason")
TRAINING = [(sft, "train"), (reward, "train"), (ppo, "train"), (reward, "annotate"),
            (reward, "sample_answers"), (reward, "normalise"), (rlaif, "revise_rounds"),
            (rlaif, "to_learn"), (rlaif, "train_slcai"), (rlaif, "answers_to_compare"),
            (rlaif, "ai_labels"), (rlaif, "train_preference_model"), (rlaif, "reinforce")]


def run(stage, out, *more):
    MODULES[stage].main([*FLAGS[stage], "--out", str(out), "--device", "cpu", *more])


def smaller_evaluations(patch):
    """The same evaluations on fewer prompts and shorter answers: an untrained model never stops by
    itself."""
    validation_set, fact_questions = pretrain.validation_set, data.fact_questions
    prompts, generate = reward.preference_prompts, m.generate_batch

    def few_documents(world, tokenizer, n, *rest):
        return validation_set(world, tokenizer, 40, *rest)

    def short_replies(model, batch, noise, *rest):
        return generate(model, batch, noise[:, :10], *rest)

    patch.setattr(pretrain, "validation_set", few_documents)
    patch.setattr(data, "fact_questions", lambda world, use: fact_questions(world, use)[:20])
    patch.setattr(reward, "preference_prompts", lambda w, use, n: prompts(w, use, min(n, 24)))
    patch.setattr(m, "generate_batch", short_replies)
    # an untrained judge reaches no verdict, and the preference model needs some: let a coin decide
    prefer_first = rlaif.prefer_first
    patch.setattr(rlaif, "prefer_first", lambda *args: prefer_first(*args).nan_to_num(0.5))
    for name, value in (("SL_EPOCHS", 1), ("ANSWERS", 2)):
        patch.setattr(rlaif, name, value)


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
        for owner, name in TRAINING:
            no_judge_of_harm_inside(patch, owner, name)
        for stage in MODULES:
            run(stage, folder)
    return folder


def weights(path):
    return m.load(path)["model"]


def assert_equal_weights(path, other):
    a, b = weights(path), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def figures_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


PROMISED = {
    "pretrain": ["val_loss", "entropy_floor", "forced_accuracy", "fact_cloze"],
    "sft": ["fact_accuracy_undemonstrated"],
    "reward": ["accuracy", "ceiling"],
    "ppo": ["gold_ppo", "win_rate"],
    "rlaif": ["harm_rlcai_g1", "over_refusal_rlcai_g2", "ai_labels", "verdict_covered_g2",
              "label_reason_strict", "harm_round_2"],
}


@pytest.mark.parametrize("stage", PROMISED)
def test_every_stage_writes_its_figures(stage, out):
    """A script that only works on its author's machine."""
    figures = figures_of(out / f"{stage}.json")
    assert all(name in figures for name in PROMISED[stage])
    assert all(isinstance(x, (int, float)) for x in figures.values())
    header, *rows = lines_of(out / f"{stage}.csv")
    assert rows and all(row.count(",") == header.count(",") for row in rows)


def test_every_stage_writes_what_it_says(out):
    """A stage that calls a gold judge of harm while it trains, or leaves half a file."""
    for name in ("pretrain", "sft", "reward", "ppo", "slcai", "rlaif_pm", "rlaif"):
        assert m.load(out / f"{name}.pt")["world_seed"] == 0
    # the preference model's scores stay log-odds
    assert m.load(out / "rlaif_pm.pt")["scale"]["std"] == 1
    figures = figures_of(out / "rlaif.json")
    assert figures["gold_harm_calls_in_training"] == 0 < figures["ai_labels"]
    for kind, n in m.load(out / "pretrain.pt")["documents"].items():   # that judge a deed
        assert figures[f"judging_{kind}"] == n > 0
    assert not {"judging_biography", "judging_questions"} & set(figures)
    assert not list(out.glob("*.resume.pt")) and not list(out.glob("*.tmp"))
    assert len(lines_of(out / "rlaif_traces.jsonl")) == 7
    assert len(lines_of(out / "preferences.jsonl")) > 10


def test_every_stage_changes_the_model(out):
    """A loop that runs, logs and saves, and whose optimizer holds another model's weights."""
    pairs = [("pretrain", "sft"), ("sft", "ppo"), ("pretrain", "slcai"), ("slcai", "rlaif")]
    for before, after in pairs:
        a, b = weights(out / f"{before}.pt"), weights(out / f"{after}.pt")
        assert any(not torch.equal(a[k], b[k]) for k in a)
    # measured from the frozen model, not from the policy itself
    with open(out / "ppo.csv", encoding="utf-8", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["kl_nats"]) > 0
    sft_weights, rm = weights(out / "sft.pt"), weights(out / "reward.pt")
    assert rm.keys() == {f"gpt.{k}" for k in sft_weights} | {"scalar.weight", "scalar.bias"}


def untimed_rows(path):
    """The rows of a csv file without the seconds, which differ from run to run."""
    rows = csv.DictReader(lines_of(path))
    return [[v for k, v in row.items() if not k.startswith("seconds")] for row in rows]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, out, tmp_path, monkeypatch):
    """Optimizer state, data order or random numbers lost on the way: the resumed run is then
    another run."""
    for name in ("pretrain.pt", "sft.pt", "reward.pt"):
        if name != f"{stage}.pt":
            shutil.copy(out / name, tmp_path / name)
    smaller_evaluations(monkeypatch)
    save_progress = MODULES[stage].save_progress

    def interrupted(progress, *args, **parts):
        save_progress(progress, *args, **parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MODULES[stage], "save_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stage, tmp_path)
    assert (tmp_path / f"{stage}.resume.pt").exists()
    run(stage, tmp_path, "--resume")
    assert_equal_weights(out / f"{stage}.pt", tmp_path / f"{stage}.pt")
    resumed = untimed_rows(tmp_path / f"{stage}.csv")
    assert resumed and resumed == untimed_rows(out / f"{stage}.csv")
    assert not (tmp_path / f"{stage}.resume.pt").exists()


STEPS = ["revise_rounds", "train_slcai", "train_preference_model", "reinforce"]
SLOW_STEPS = [pytest.param(step, marks=pytest.mark.slow) for step in STEPS[:-1]]


@pytest.mark.parametrize("step", [*SLOW_STEPS, "reinforce"])
def test_rlaif_goes_on_after_its_last_finished_step(step, out, tmp_path, monkeypatch):
    """A step that depends on what an earlier one left in memory: resumed, it comes to other
    weights; or a step that is done again."""
    smaller_evaluations(monkeypatch)
    monkeypatch.setattr(rlaif, "final_table", lambda *args: {})

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rlaif, step, interrupted)
        run("rlaif", tmp_path, "--inputs", str(out))
    if step == "revise_rounds":                            # nothing is finished
        with pytest.raises(SystemExit, match="there is no interrupted run"):
            run("rlaif", tmp_path, "--inputs", str(out), "--resume")
        return
    for done in STEPS[:STEPS.index(step)]:
        monkeypatch.setattr(rlaif, done, interrupted)      # it must not run again
    run("rlaif", tmp_path, "--inputs", str(out), "--resume")
    for name in ("slcai.pt", "rlaif_pm.pt", "rlaif.pt"):
        assert_equal_weights(out / name, tmp_path / name)


LOSSES = {"pretrain": (pretrain, "next_token_loss"), "sft": (sft, "masked_loss"),
          "reward": (reward, "preference_loss"), "ppo": (ppo, "value_loss")}


@pytest.mark.parametrize("stage", LOSSES)
def test_a_loss_that_is_no_number_stops_a_stage(stage, out, tmp_path, monkeypatch):
    """A model of nan in the place of a good one, and null after null in the figures."""
    owner, name = LOSSES[stage]
    smaller_evaluations(monkeypatch)
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / f"{stage}.pt").read_bytes()
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: real(*args, **options) * torch.nan)
    with pytest.raises(SystemExit, match="nan or infinite"):
        run(stage, tmp_path)
    assert (tmp_path / f"{stage}.pt").read_bytes() == before


EVALUATIONS = {"pretrain": (pretrain, "evaluate_world"), "sft": (sft, "evaluate_world"),
               "reward": (reward, "evaluate"), "ppo": (ppo, "evaluate")}


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("sft", marks=pytest.mark.slow),
                                   pytest.param("reward", marks=pytest.mark.slow), "ppo"])
def test_figures_survive_a_ctrl_c_in_the_evaluation(stage, out, tmp_path, monkeypatch):
    """A night's model without its log and its figures, and nothing to go on from."""
    owner, name = EVALUATIONS[stage]
    smaller_evaluations(monkeypatch)
    for path in out.glob("*.pt"):
        if path.stem in list(MODULES)[:list(MODULES).index(stage)]:
            shutil.copy(path, tmp_path)

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupted)
        run(stage, tmp_path)
    assert (tmp_path / f"{stage}.pt").exists() and not (tmp_path / f"{stage}.json").exists()
    run(stage, tmp_path, "--resume")
    assert figures_of(tmp_path / f"{stage}.json") == figures_of(out / f"{stage}.json")
    assert (tmp_path / f"{stage}.csv").read_text() == (out / f"{stage}.csv").read_text()
    assert not (tmp_path / f"{stage}.resume.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_ctrl_c_is_answered_by_a_sentence(tmp_path):
    """Thirty lines of traceback, among which nobody finds what was saved; and a mistake of ours has
    to show its own all the same."""
    text = tmp_path / "text.txt"
    text.write_text("The wind is up. " * 4000, encoding="utf-8")
    command = [sys.executable, str(ROOT / "pretrain.py"), "--out", str(tmp_path), "--data",
               str(text), *"--tokenizer bytes --steps 9999 --eval-every 1".split(), *NETWORK]
    # a shell gives a process in the background the order to ignore Ctrl-C, and it is inherited
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (tmp_path / "pretrain.resume.pt").exists() and child.poll() is None:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, printed = child.communicate(timeout=60)
    assert "stopped: KeyboardInterrupt" in printed and "--resume goes on" in printed, printed
    assert "Traceback" not in printed and child.returncode != 0, printed
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_run_with_other_flags_is_not_resumed(out, tmp_path, monkeypatch):
    """Half a run with one learning rate and half with another."""
    smaller_evaluations(monkeypatch)
    shutil.copy(out / "pretrain.pt", tmp_path)
    args = sft.read_args([*FLAGS["sft"], "--lr", "0.5"])
    base = m.load_gpt(out / "pretrain.pt")
    m.save_progress((tmp_path / "sft.resume.pt", args), 3, [], model=base)
    with pytest.raises(SystemExit, match="lr was 0.5, now 0.0006: use what it began with"):
        run("sft", tmp_path, "--resume")
    with pytest.raises(SystemExit, match="no interrupted run"):
        run("pretrain", tmp_path, "--resume")


@pytest.mark.parametrize("stage", MODULES)
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(stage, tmp_path, capsys):
    """An hour of training, and then no place to put it."""
    (tmp_path / "file").write_text("a file, and no folder", encoding="utf-8")
    with pytest.raises(SystemExit):
        MODULES[stage].main(["--out", str(tmp_path / "file" / "out")])
    assert "--out: cannot write to" in capsys.readouterr().err


NEEDS = [("sft", "pretrain"), ("reward", "sft"), ("ppo", "sft"), ("ppo", "reward"),
         ("rlaif", "pretrain"), ("rlaif", "ppo"), ("rlaif", "sft")]


@pytest.mark.parametrize("stage, missing", NEEDS)
def test_a_missing_input_names_the_script_to_run(stage, missing, out, tmp_path):
    """A traceback that ends in FileNotFoundError, for somebody who ran the second command first."""
    for name in ("pretrain", "sft", "reward", "ppo"):
        if name != missing:
            shutil.copy(out / f"{name}.pt", tmp_path)
    with pytest.raises(SystemExit, match=f"{missing}.pt not found: run `python {missing}.py`"):
        run(stage, tmp_path)


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
    flags = "--steps 4 --batch-size 2 --layers 1 --heads 2 --channels 16 --context 32".split()
    flags += "--eval-every 2 --vocab-size 300 --device cpu --out".split()
    flags += [str(tmp_path), "--data", str(text), "--tokenizer", tokenizer]
    pretrain.main(flags)
    assert figures_of(tmp_path / "pretrain.json")["val_loss_nats_per_byte"] > 0
    assert len(lines_of(tmp_path / "pretrain.csv")) == 3
    chat = "--base --prompt Zoë --max-new 4 --device cpu".split()
    m.main([str(tmp_path / "pretrain.pt"), *chat])
    with pytest.raises(SystemExit, match="your own text"):
        sft.main(["--out", str(tmp_path), "--device", "cpu"])
    text.write_text("short", encoding="utf-8")
    with pytest.raises(SystemExit, match="too short"):
        pretrain.main(flags)


def test_pretraining_goes_on_from_a_checkpoint(out, tmp_path, monkeypatch):
    """--init that loads the weights and then builds another tokenizer."""
    smaller_evaluations(monkeypatch)
    run("pretrain", tmp_path, "--init", str(out / "pretrain.pt"), "--lr", "0", "--muon-lr", "0")
    assert_equal_weights(out / "pretrain.pt", tmp_path / "pretrain.pt")
    old, new = m.load(out / "pretrain.pt"), m.load(tmp_path / "pretrain.pt")
    assert old["tokenizer"] == new["tokenizer"]


def test_answers_that_are_all_equally_good(out, tmp_path, monkeypatch):
    """A division by the distance between ceiling and chance, which is 0 where a weak model's
    answers are all alike."""
    smaller_evaluations(monkeypatch)
    shutil.copy(out / "sft.pt", tmp_path)
    monkeypatch.setattr(data, "utility", lambda *args: 0.0)
    run("reward", tmp_path)
    assert figures_of(tmp_path / "reward.json")["ceiling"] == 0.5


def test_chat_prints_an_answer(out, capsys):
    """A chat that prints nothing, or the answers of two models without their names. (At temperature
    3 the tiny model does not end at once.)"""
    base, tuned = str(out / "pretrain.pt"), str(out / "sft.pt")
    chat = "--max-new 8 --temperature 3 --device cpu --prompt".split() + ["Where does Ann live?"]
    m.main([tuned, *chat])
    one = capsys.readouterr().out.strip()
    m.main([base, tuned, *chat])
    two = capsys.readouterr().out.splitlines()
    assert one and one.splitlines()[0] in "\n".join(two)
    assert any(line.startswith(base) for line in two)
    with pytest.raises(SystemExit, match="nothing.pt not found"):
        m.main(["nothing.pt", "--prompt", "Hi"])


def test_chat_remembers(out, monkeypatch, capsys):
    """"And Tom?" answered as if nothing had been asked before; a long talk that ends in a traceback
    instead of forgetting its oldest turns; an empty question, or one that is too long."""
    typed = ["Where does Ann live?", "And Tom?", "", "/new", "And Tom?", "Why? " * 200, "And?"]
    asked, keys = [], iter([*typed, EOFError])
    def type_next(prompt):
        key = next(keys)
        if key is EOFError:
            raise EOFError
        return key
    real = m.data.chat_prompt
    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(m.data, "chat_prompt", lambda t, talk: asked.append(list(talk))
                        or real(t, talk))
    m.main([str(out / "sft.pt"), "--max-new", "8", "--device", "cpu"])
    printed = capsys.readouterr().out
    users = [[text for role, text in talk if role == "user"] for talk in asked]
    assert ["Where does Ann live?", "And Tom?"] in users and ["And Tom?"] in users
    assert users[-1] == ["And?"]                           # the long one went, answer and all
    assert "/new" in printed and "Where does Ann live?" in printed     # what it can talk about
    assert printed.count("Ask something.") == 2 and "leaves no room" in printed
    for prompt in ("", "  "):
        m.main([str(out / "sft.pt"), "--prompt", prompt, "--device", "cpu"])
        assert "Ask something." in capsys.readouterr().out


@pytest.mark.slow
def test_controls_of_rlaif(out, tmp_path, monkeypatch):
    """A control that writes over the default run, or reports an unseen constitution's figures as
    G1."""
    smaller_evaluations(monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    unseen = "--constitution unseen --critic base --clamp 0.1 --learn last --inputs".split()
    run("rlaif", tmp_path, *unseen, str(out))
    figures = figures_of(tmp_path / "rlaif.json")
    assert {"harm_rlcai_g1", "harm_rlcai_strict"} <= set(figures)
    labels = [json.loads(line)["label"] for line in lines_of(tmp_path / "rlaif_labels.jsonl")]
    assert all(0.4 <= label <= 0.6 for label in labels)
    for line in lines_of(tmp_path / "rlaif_traces.jsonl"):
        for step in json.loads(line)["steps"]:
            assert step["principle"].startswith("To ") and step["principle"].endswith(" is bad.")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_rlaif_with_files_of_ones_own(out, tmp_path, monkeypatch, capsys):
    """A principle of the paper's length that fills the context of a small model: a ValueError from
    inside the sampler, an hour into the run."""
    smaller_evaluations(monkeypatch)
    for path in out.iterdir():
        shutil.copy(path, tmp_path)
    prompts, rules = tmp_path / "prompts.jsonl", tmp_path / "rules.json"
    asked = ("How do I kick Tom?", "How do I hit Ann?", "Why? " * 90)
    records = [{"prompt": question} for question in asked]
    prompts.write_text(json.dumps(records), encoding="utf-8")
    rules.write_text('[{"critic": "Say no to harm.", "revision": "Rewrite it."}]', encoding="utf-8")
    files = ["--red-team-file", str(prompts), "--constitution", str(rules)]
    run("rlaif", tmp_path, *files)
    printed = capsys.readouterr().out
    assert "1 principles, 2 red-team prompts" in printed
    assert "1 prompts left out: longer than" in printed
    assert printed.count("principle: Say no to harm.") == 2 and "How do I kick Tom?" in printed
    asked = [json.loads(line)["prompt"] for line in lines_of(tmp_path / "rlaif_labels.jsonl")]
    assert "How do I hit Ann?" in asked or "How do I kick Tom?" in asked
    long = "Identify ways in which the answer is harmful. " * 9
    rules.write_text(json.dumps([{"critic": long, "revision": "Rewrite it."}]), encoding="utf-8")
    with pytest.raises(SystemExit, match="no prompt fits: the context leaves room for -"):
        run("rlaif", tmp_path, *files)
    rules = tmp_path / "rules.txt"
    rules.write_text("\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="one short principle a line"):
        run("rlaif", tmp_path, "--constitution", str(rules))


def files_of_ones_own(folder):
    """A text, prompts, rules, conversations and preferences without a world -> {name: path}."""
    talks = [{"prompt": f"Who sat {i}?", "completion": f"Zoë's 猫 {i} 🐈."} for i in range(40)]
    pairs = [{"prompt": f"Who sat {i}?", "chosen": f"The cat {i}.", "rejected": f"A dog {i}."}
             for i in range(40)]
    files = {"text.txt": "The cat sat on the mat. The dog ate Zoë's bone 🦴.\n" * 300,
             "prompts.txt": "Who sat, Zoë?\nWho ate 🦴?\nWhere is it?\n",
             "red.txt": "How do I rob a cat?\nHow do I kick it?\n",
             "rules.txt": "Do not harm the cat.\n",
             "talks.jsonl": "".join(json.dumps(talk) + "\n" for talk in talks),
             "pairs.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name.split(".")[0]: str(folder / name) for name in files}


def test_all_five_stages_without_a_world(tmp_path, monkeypatch):
    """A stage that quietly needs the small world: the road from one's own text to one's own
    constitution then ends half way. Or one that finishes its work and dies of printing an answer,
    in a terminal that knows no letters but English ones."""
    smaller_evaluations(monkeypatch)
    file = files_of_ones_own(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run("pretrain", tmp_path, "--data", file["text"], "--vocab-size", "300", "--context", "256")
    run("sft", tmp_path, "--data", file["talks"])
    run("reward", tmp_path, "--data", file["pairs"])
    run("ppo", tmp_path, "--prompts", file["prompts"])
    run("rlaif", tmp_path, "--prompts", file["prompts"], "--red-team-file", file["red"],
        "--preferences", file["pairs"], "--constitution", file["rules"])
    m.main([str(tmp_path / "sft.pt"), "--prompt", "Zoë 🐈?", "--temperature", "9"])
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode("ascii")
    assert "36 labelled pairs" in printed and "Zo?" in printed
    assert "gold_ppo" not in figures_of(tmp_path / "ppo.json")
    for name in ("pretrain", "sft", "reward", "ppo", "slcai", "rlaif"):
        assert m.load(tmp_path / f"{name}.pt")["world_seed"] is None


@pytest.mark.slow
def test_documents_can_be_left_out(tmp_path, monkeypatch):
    """The control of Stage 5 that is none: the documents said to be left out are still among them,
    or the shares no longer add up to 1."""
    smaller_evaluations(monkeypatch)
    run("pretrain", tmp_path, "--without", "critique", "drill", "comparison")
    saved = m.load(tmp_path / "pretrain.pt")               # what judges, and what replay leaves out
    assert set(saved["documents"]) == {"story", "sayings", "overheard"}
    assert saved["without"] == ["critique", "drill", "comparison"]


COUNTS = [("pretrain", "--steps"), ("sft", "--epochs"), ("reward", "--answers"),
          ("ppo", "--iterations"), ("rlaif", "--batch-size")]


@pytest.mark.parametrize("stage, flag", COUNTS)
def test_nothing_is_counted_from_zero(stage, flag, capsys):
    """A traceback minutes later, from the mean of an empty list."""
    with pytest.raises(SystemExit):
        MODULES[stage].main([flag, "0"])
    assert f"{flag}: 0 is not from 1 to" in capsys.readouterr().err
