"""What reaches what. The formulas have tests of their own; here each stage runs once, tiny, and
what its main passes on (which model, which prompts, which labels, which rate) is written down and
compared with a table that reads like the stage's docstring."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as m
import ppo
import pretrain
import reward
import rlaif
import sft

ROOT, WORLD = Path(__file__).parent.parent, data.World(0)
SMALL = m.GPTConfig(400, 192, 1, 2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained models of one village, each of other weights, as the five stages would leave them,
    and a few labels of helpfulness."""
    out = tmp_path_factory.mktemp("wiring")
    texts = [data.unmark(data.write_document(WORLD, "t", i)[1]) for i in range(200)]
    tokenizer = data.make_tokenizer("bpe", texts, 400)
    for seed, name in enumerate(("pretrain", "sft", "ppo")):
        torch.manual_seed(seed)
        m.save_model(out / f"{name}.pt", m.GPT(SMALL, tokenizer, world_seed=0))
    torch.manual_seed(9)
    judge = m.ScalarModel(m.GPT(SMALL, tokenizer, world_seed=0))
    scale = dict(mean=0.5, std=2.0, lowest=-1.0, margin=1.0)
    m.save_model(out / "reward.pt", judge, scale=scale, taste="polite")
    asked = data.fact_questions(WORLD, "demo")[:6]
    groups = [(question, ["old: yes", "old: no"], [(0, 1, 1.0)]) for question in asked]
    reward.write_preferences(out / "preferences.jsonl", groups)
    return out


def name_of(model, names):
    """Which of {name: weights} has these weights?"""
    found = [name for name, table in names.items() if torch.equal(table, words_of(model))]
    return found[0] if found else "?"


def words_of(model):
    return getattr(model, "gpt", model).blocks[0].up.weight.detach().clone()


def kind_of(question):
    """What a prompt is: "harmful g1 train", "benign g2r train", "fact demo"."""
    asked = WORLD.parse_question(data.turns_up_to(question)[-1][1])
    if asked is None:                                      # "And Tom?"
        return f"{kind_of(question[:1])}, and then"
    if isinstance(asked, data.Act):
        use, = [use for use, acts in WORLD.acts.items() if asked in acts]
        return f"{'harmful' if asked.verb.harmful else 'benign'} {asked.verb.cell} {use}"
    return "fact " + next(use for use, people in WORLD.people.items() if asked[0] in people)


def kinds(questions):
    return sorted(set(map(kind_of, questions)))


def spy(patch, owner, name, note, instead=None):
    """Call `note` with the arguments of each call; then do it, or what is to be done `instead`."""
    real = getattr(owner, name)

    def called(*args, **options):
        note(*args, **options)
        return (instead or real)(*args, **options)

    patch.setattr(owner, name, called)


def rates(patch, log):
    """Write down, at each step of an optimizer, its rates, and to which norm the gradients of how
    many different models were clipped before it."""
    clipped = {}

    def step(optimizer, *_):
        log.append(([group["lr"] for group in optimizer.param_groups], list(clipped.values())))
        clipped.clear()

    real = torch.nn.utils.clip_grad_norm_

    def clip_and_note(parameters, norm):
        parameters = list(parameters)
        clipped[id(parameters[0])] = norm
        return real(parameters, norm)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)

    for kind in (torch.optim.Adam, pretrain.Muon):
        spy(patch, kind, "step", step)


@pytest.mark.slow
def test_a_world_is_the_same_in_every_process():
    """Splits drawn with Python's hash(), which is another in every run: what was held out of the
    last stage is then in the training of this one."""
    program = ("import zlib, data; world = data.World(3); told = map(str, world.acts['test']); "
               "print(zlib.crc32(' '.join([*told, *map(str, world.people.items()), "
               "*map(str, world.unseen_rules), *[v.word + v.cell for v in world.verbs]])"
               ".encode()))")
    printed = {subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}, check=True).stdout
               for seed in ("1", "2")}
    assert len(printed) == 1 and printed != {b""}


# --- 1. Pre-training ------------------------------------------------------------------------------

def test_pretraining_reads_its_documents_and_is_judged_on_others(tmp_path, monkeypatch):
    """Validation text inside the training text, or a tokenizer made from it; a rate that never
    falls, a clip that is gone."""
    written, made, steps = [], [], []
    spy(monkeypatch, data, "write_document", lambda world, *key, **more: written.append(key))
    spy(monkeypatch, data, "make_tokenizer", lambda *args: made.append(len(written)))
    rates(monkeypatch, steps)
    flags = "--layers 1 --heads 2 --channels 16 --steps 4 --batch-size 2 --warmup 2 --decay 0.5"
    pretrain.main([*flags.split(), "--out", str(tmp_path), "--device", "cpu"])
    uses = [use for use, _ in written]
    assert set(uses) == {"train", "validation"} and uses == sorted(uses)     # first all of one
    assert made == [uses.count("train")]                   # when no other text had been written
    assert len(set(written)) == len(written)               # nothing is read twice
    adam, muon = steps[::2], steps[1::2]
    assert [rate for (rate, *_), _ in adam] == pytest.approx([3e-3, 6e-3, 6e-3, 3e-3])
    assert [rate for (rate, *_), _ in muon] == pytest.approx([2.5e-3, 5e-3, 5e-3, 2.5e-3])
    assert [clips for _, clips in adam] == [[1.0]] * 4     # before the step of either


# --- 2. Supervised fine-tuning --------------------------------------------------------------------

def test_sft_goes_from_the_base_model_to_people_it_was_not_told_of(folder, tmp_path, monkeypatch):
    """Demonstrations about people of the test; another start; documents that are not replayed, or
    those of another world."""
    names = {name: words_of(m.load_gpt(folder / f"{name}.pt")) for name in ("pretrain", "ppo")}
    trained, judged, sampled, steps, replayed, orders = [], [], [], [], [], []
    spy(monkeypatch, data, "length_batches", lambda lengths, size, *key: orders.append(key))
    spy(monkeypatch, sft, "train", lambda model, conversations, args, **more: trained.append(
        (name_of(model, names), conversations)))
    spy(monkeypatch, sft, "judge_answers", lambda model, world, asked, meant, temperature:
        judged.append((temperature, kinds(meant))))
    spy(monkeypatch, sft, "generate", lambda model, prompts, max_new, temperature=1.0, **more:
        sampled.append(temperature))
    spy(monkeypatch, pretrain, "backward", lambda model, batch, *_: replayed.append(len(batch[0])))
    rates(monkeypatch, steps)
    flags = f"--demonstrations 20 --epochs 2 --batch-size 10 --lr 0.001 --out {tmp_path}"
    sft.main([*flags.split(), "--device", "cpu", "--init", str(folder / "pretrain.pt")])
    (start, conversations), = trained
    shown = [turns if isinstance(turns, str) else turns[0][1] for turns, _ in conversations]
    assert start == "pretrain"
    assert {kind.split()[-1] for kind in kinds(shown)} == {"demo", "document", "train"}
    # facts and how-to, greedy and sampled; second turns, greedy
    assert sampled == [temperature for temperature, _ in judged] == [0, 1, 0, 1, 0]
    for _, asked in judged:
        assert {kind.split()[-1] for kind in asked} <= {"train", "test"}
        assert {kind for kind in asked if "fact" not in kind} <= {
            f"{sort} {cell} test" for sort in ("harmful", "benign") for cell in rlaif.CELLS}
    assert len(replayed) == len(steps) == 4 and set(replayed) == {1}       # a row a step
    assert [rate for (rate,), _ in steps] == pytest.approx(
        [1e-3 * (i + 1) / 20 * (1 - i / 4) for i in range(4)])
    assert [clips for _, clips in steps] == [[1.0]] * 4
    assert orders == [(0, 0), (0, 1)]                      # seed, epoch: each in another order


# --- 3. The reward model --------------------------------------------------------------------------

def test_the_reward_model_compares_answers_of_the_sft_model(folder, tmp_path, monkeypatch):
    """Held-out prompts taken from training; answers of one temperature; no strays; the scale from
    answers of another model; a taste judged by another; a rate that never falls."""
    names = {name: words_of(m.load_gpt(folder / f"{name}.pt")) for name in ("sft", "ppo")}
    asked, labelled, trained, scaled, judged, steps = [], [], [], [], [], []
    rates(monkeypatch, steps)
    spy(monkeypatch, reward, "answer", lambda model, questions, temperature=1.0, **more:
        asked.append((name_of(model, names), temperature, kinds(questions))),
        lambda model, questions, **more: [f"{q} {i % 3}." for i, q in enumerate(questions)])
    spy(monkeypatch, reward, "train", lambda rm, groups, *_, **more: trained.append(
        (name_of(rm, names), groups, rm.scalar.weight.clone())))
    spy(monkeypatch, reward, "annotate", lambda world, answered, seed, taste="polite", votes=1:
        labelled.append((kinds([q for q, _ in answered]), taste, votes)))
    spy(monkeypatch, reward, "normalise", lambda rm, conversations: scaled.append(
        (kinds([q for q, _ in conversations]), rm.scalar.weight.clone())))
    spy(monkeypatch, reward, "evaluate", lambda rm, world, tests, taste: judged.append(
        (tests, taste)))
    flags = f"--prompts 60 --answers 4 --batch-size 1 --annotator curt --out {tmp_path}"
    reward.main([*flags.split(), "--lr", "0.001", "--device", "cpu", "--init",
                 str(folder / "sft.pt")])
    learn = ["benign g1 train", "fact demo", "fact train"]
    held_out = ["benign g1 test", "fact test"]
    assert asked[:7] == [("sft", 1.0, learn), ("sft", 1.4, learn),         # half of them hot
                         ("sft", 1.0, held_out), ("sft", 1.0, held_out),
                         ("sft", 1.0, held_out), ("sft", 1.4, held_out), ("sft", 1.0, learn)]
    ((start, groups, untrained),), ((scaled_by, head),) = trained, scaled
    assert start == "sft" and kinds([q for q, *_ in groups]) == learn == scaled_by
    assert not torch.equal(head, untrained)                # the scale is that of the trained model
    for question, answers, _ in groups:                    # one to three answer something else
        assert 1 <= sum(not text.startswith(question) for text in answers) <= 3
    (plain, taste), (hard, also) = judged
    assert kinds([q for q, _ in plain]) == kinds([q for q, _ in hard]) == held_out
    assert taste == also == "curt" and labelled == [(learn, "curt", 9)]
    strays = [sum(not text.startswith(q) for text in answers) for q, answers in [*plain, *hard]]
    assert not any(strays[:len(plain)]) and all(strays[len(plain):])
    figures = json.loads((tmp_path / "reward.json").read_text(encoding="utf-8"))
    assert {"accuracy", "accuracy_hard", "ceiling_hard", "pairs"} <= set(figures)
    rises_and_falls = [20, 40, *range(58, 0, -1)]          # 60 groups, one a step
    assert [rate for (rate,), _ in steps] == pytest.approx([1e-3 * x / 60 for x in rises_and_falls])


# --- 4. PPO ---------------------------------------------------------------------------------------

def test_ppo_moves_the_sft_model_by_the_reward_model(folder, tmp_path, monkeypatch):
    """A reference that moves, a value model that does not start as the reward model, questions of
    the test; a rate that never falls, a clip that is gone; an unfinished answer that pays."""
    names = {name: words_of(m.load_gpt(folder / f"{name}.pt")) for name in ("pretrain", "sft")}
    names["reward"] = words_of(reward.load_reward(folder / "reward.pt",
                                                  m.load_gpt(folder / "sft.pt")))
    rolled, started, scored, steps, judged, read = [], [], [], [], [], []
    loaded = []
    load_reward = reward.load_reward
    monkeypatch.setattr(reward, "load_reward", lambda *args: loaded.append(load_reward(*args))
                        or loaded[-1])
    monkeypatch.setattr(ppo, "replayer", lambda policy, args: read.append)
    spy(monkeypatch, ppo, "rollout", lambda policy, reference, questions, *_: rolled.append(
        (name_of(reference, names), kinds(questions), questions)))
    spy(monkeypatch, ppo, "train", lambda policy, value, *_: started.append(
        (name_of(policy, names), name_of(value, names))))
    spy(monkeypatch, ppo, "evaluate", lambda policy, before, world, n, seed, taste: judged.append(
        (name_of(before, names), taste)), lambda *args: {})
    on_scale = ppo.on_scale
    monkeypatch.setattr(ppo, "on_scale", lambda raw, replies, *rest: scored.append(
        ([reply[-1] for reply in replies], on_scale(raw, replies, *rest))) or scored[-1][1])
    rates(monkeypatch, steps)
    flags = f"--iterations 4 --batch-size 8 --minibatch 8 --epochs 1 --max-new 4 --out {tmp_path}"
    ppo.main([*flags.split(), "--device", "cpu", "--init", str(folder / "sft.pt"),
              "--reward-model", str(folder / "reward.pt")])
    assert started == [("sft", "reward")] and judged == [("sft", "polite")]
    assert torch.equal(words_of(loaded[0]), names["reward"])       # no update reached it
    assert read == [0, 1, 2, 3]                            # other documents at each step
    for reference, asked, _ in rolled:
        assert reference == "sft" and set(asked) <= {"benign g1 train", "fact demo", "fact train"}
    assert len({tuple(questions) for *_, questions in rolled}) == 4        # others each time
    assert [rate for rate, _ in steps] == [pytest.approx([1.5e-4 * k, 5e-4 * k])
                                           for k in (1, 0.75, 0.5, 0.25)]
    assert [clips for _, clips in steps] == [[1.0, 1.0]] * 4               # policy, value
    for lasts, scores in scored:
        eot = m.load_gpt(folder / "sft.pt").tokenizer.eot
        cut = torch.tensor([last != eot for last in lasts])
        assert cut.any() and (scores[cut] <= -2).all()     # lowest - margin


# --- 5. Constitutional AI -------------------------------------------------------------------------

class Stage5:
    """rlaif.main with functions that write down who does what; a model's answers begin with its
    name, so that one sees whose they are."""
    def __init__(self, patch):
        self.log, self.drawn, self.compared = [], [], set()
        load_gpt, copy_of = rlaif.load_gpt, rlaif.copy_of

        def named(model, name):
            model.name = {"pretrain": "base", "ppo": "helpful"}.get(name, name)
            return model

        patch.setattr(rlaif, "load_gpt", lambda path, *more, **options: named(
            load_gpt(path, *more, **options), Path(path).stem))
        patch.setattr(rlaif, "copy_of",
                      lambda model: named(copy_of(model), f"copy of {model.name}"))
        patch.setattr(rlaif, "answer", self.answer)
        patch.setattr(reward, "answer", self.answer)
        patch.setattr(rlaif, "critique_and_revise", self.revise)
        patch.setattr(rlaif, "with_forced_refusal", self.refuse)
        patch.setattr(rlaif, "prefer_first", self.prefer)
        patch.setattr(sft, "train", self.fine_tune)
        patch.setattr(reward, "train", self.learn_labels)
        patch.setattr(reward, "normalise", self.scale)
        patch.setattr(ppo, "train", self.reinforce)
        patch.setattr(ppo, "value_from", lambda pm: f"value from {pm.gpt.name}")
        patch.setattr(rlaif, "final_table", self.evaluate)
        patch.setattr(rlaif, "measure_critic", lambda critic, *_: self.note(
            f"{critic.name} is measured as a critic") or {})
        patch.setattr(reward, "load_reward", self.load_pm)

    def note(self, line):
        if line not in self.log:
            self.log.append(line)

    def answer(self, model, questions, *_, temperature=1.0, seed=(0,), **more):
        name = model if isinstance(model, str) else model.name
        hot = "" if temperature == 1 else f" (temperature {temperature})"
        # SL-CAI has one answer only to some prompts, those of an odd length
        same = [len(data.turns_up_to(q)[-1][1]) % 2 and name == "slcai" for q in questions]
        return [f"{name}: same." if s else f"{name}{hot}: {i % 2}." for i, s in enumerate(same)]

    def revise(self, critic, questions, answers, principles, stream):
        self.drawn.append(principles)
        whose = sorted({text.split(":")[0] for text in answers})
        self.note(f"{critic.name} critiques answers of {whose} to {kinds(questions)}")
        return [(f"by {critic.name}", f"revised by {critic.name}: {k % 2} {stream[-1]}.")
                for k in range(len(questions))]

    def refuse(self, model, answered, stream):
        self.note(f"{model.name} is made to refuse {kinds([q for q, _ in answered])}")
        return answered

    def prefer(self, judge, questions, firsts, seconds, rules, stream, think=True):
        self.compared |= set(questions)
        whose = sorted({text.split(":")[0] for text in [*firsts, *seconds]})
        self.note(f"{judge.name} compares {whose} on {kinds(questions)}")
        return torch.full((len(questions),), 0.7 if stream[-1] == 61 else 0.3)

    def fine_tune(self, model, conversations, args):
        for whose in sorted({text.split(":")[0] for _, text in conversations}):
            asked = [q for q, text in conversations if text.startswith(whose)]
            self.note(f"{model.name} learns {whose} to {kinds(asked)}, lr {args.lr}, replay "
                      f"{args.replay_rows}")

    def learn_labels(self, pm, groups, **more):
        labels = {}
        for question, answers, pairs in groups:
            by = "an AI's" if {round(target, 2) for *_, target in pairs} == {0.7} else "people's"
            labels.setdefault((answers[0].split(":")[0], by), []).append(question)
        for (whose, by), asked in sorted(labels.items()):
            n = f"{len(asked)} " if whose == "old" else ""
            self.note(f"{pm.gpt.name} learns {by} labels of {n}answers of {whose} to "
                      f"{kinds(asked)}, lr {more['lr']}")

    def scale(self, pm, conversations, std):
        whose = sorted({text.split(":")[0] for _, text in conversations})
        self.note(f"its scale: answers of {whose} to {kinds([q for q, _ in conversations])}")
        return dict(mean=0.0, std=std, lowest=-1.0, margin=1.0)

    def load_pm(self, path, policy):
        pm = m.ScalarModel(policy)
        pm.scale = dict(mean=0.0, std=1.0, lowest=-1.0, margin=1.0)
        return pm

    def reinforce(self, policy, value, questions_at, score, args):
        asked = [questions_at(step) for step in range(40)]
        harmful = [float(np.mean(["harmful" in kind_of(q) for q in batch])) for batch in asked]
        self.note(f"PPO moves {policy.name} with a {value}, beta {args.beta}, lr {args.lr}")
        self.note(f"PPO asks {kinds(sum(asked, []))}, harmful {set(harmful)}")
        return []

    def evaluate(self, models, world, n, seed):
        self.note("evaluated: " + ", ".join(f"{k} is {model.name}" for k, model in models.items()))
        return {}


TABLE = """
helpful critiques answers of ['helpful'] to ['harmful g1 train']
helpful critiques answers of ['revised by helpful'] to ['harmful g1 train']
copy of base learns helpful (temperature 0.7) to TALKS, lr 0.0006, replay 2
copy of base learns revised by helpful to ['harmful g1 train'], lr 0.0006, replay 2
slcai is made to refuse RED
helpful compares ['helpful', 'slcai', 'slcai (temperature 1.4)'] on WIDE
slcai is made to refuse HARMLESS
copy of slcai learns people's labels of 3 answers of old to ['fact demo'], lr 0.0004
copy of slcai learns an AI's labels of answers of slcai to WIDE, lr 0.0004
copy of slcai learns people's labels of answers of slcai to HARMLESS, lr 0.0004
its scale: answers of ['slcai'] to ASKED
PPO moves copy of slcai with a value from slcai, beta 0.1, lr 0.00015
PPO asks ALL, harmful {0.5}
helpful is measured as a critic
evaluated: sft is sft, rlhf is helpful, slcai is slcai, rlcai is rlaif
"""
KINDS = {"WIDE": ["benign g1 train", "benign g2r train", "harmful g1 train", "harmful g2r train"],
         "RED": ["harmful g1 train", "harmful g2r train"],
         "HARMLESS": ["benign g1 train", "benign g2r train", "fact demo", "fact train"],
         "TALKS": ["benign g1 train", "benign g1 train, and then", "fact demo",
                   "fact demo, and then", "fact train", "fact train, and then"],
         "ASKED": ["benign g1 train", "fact demo", "fact train", "harmful g1 train"],
         "ALL": ["benign g1 train", "benign g2r train", "fact demo", "fact train",
                 "harmful g1 train", "harmful g2r train"]}


@pytest.mark.parametrize("critic", ["helpful", "base"])
def test_stage_5_passes_on_what_its_docstring_says(critic, folder, tmp_path, monkeypatch):
    """SL-CAI from the helpful model, another critic or judge than asked for, the wrong model's
    answers on the scale, red-team prompts alone in the rollouts, labels of helpfulness left out."""
    stage, expected = Stage5(monkeypatch), TABLE
    prompts = []
    monkeypatch.setattr(rlaif, "OLD_LABELS", 0.01)         # for a hundred pairs of an AI one of old
    spy(monkeypatch, rlaif, "answers_to_compare", lambda start, helpful, red_team, benign,
        seed: prompts.extend([*red_team, *benign]))
    flags = ("--red-team 14 --rounds 2 --helpful 16 --label-prompts 56 --iterations 8 "
             "--batch-size 8 --eval-prompts 7 --device cpu").split()
    flags += ["--critic", "base"] if critic == "base" else []
    rlaif.main([*flags, "--inputs", str(folder), "--out", str(tmp_path)])
    for name, questions in KINDS.items():
        expected = expected.replace(name, str(questions))
    for does in ("critiques", "compares", "is measured"):
        expected = expected.replace(f"helpful {does}", f"{critic} {does}")
    expected = expected.replace("revised by helpful", f"revised by {critic}")
    assert stage.log == expected.strip().splitlines()
    assert stage.drawn[0] != stage.drawn[1]                # principles, anew in each round
    assert stage.compared == set(prompts)                  # SL-CAI's lone answers are compared, too
