"""Diffs of docs/variants/: each one is short, fits the project as it is now, and turns it into what
docs/experiments.md says. It is applied to a copy, in which everything else happens."""
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADDED_LINES, COLUMNS = {"dpo": 60, "rloo": 60, "grpo": 60, "modern": 260}, 100    # others: 25
PAGES = ("docs/experiments.md", "docs/variants/README.md")
DIFFS = {path.stem: path for path in sorted((ROOT / "docs" / "variants").glob("*.diff"))}
COPIED = ("*.py", "*.txt", ".pytest.ini", "docs/**/*.*", "tests/*.py")     # no models, no history


def added(name):
    """The lines that a diff adds, without their plus."""
    lines = DIFFS[name].read_text(encoding="utf-8").splitlines()
    return [line[1:] for line in lines if line.startswith("+") and not line.startswith("+++")]


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """variant("taste"): the folder of a copy to which this diff has been applied."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and the diffs are applied by git apply")
    made = {}

    def copy_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            for path in itertools.chain(*map(ROOT.glob, COPIED)):
                (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / path.relative_to(ROOT))
            done = subprocess.run(["git", "apply", str(DIFFS[name])], cwd=folder, encoding="utf-8",
                                  capture_output=True, env=surroundings(folder))
            if done.returncode:
                pytest.fail(f"docs/variants/{name}.diff no longer applies: make its edit again, "
                            f"and then git diff > docs/variants/{name}.diff\n{done.stderr}",
                            pytrace=False)
            made[name] = folder
        return made[name]
    return copy_of


def surroundings(folder):
    """The environment variables for a command in a copy."""
    # without the first, in a copy that lies inside another repository, git apply would look for the
    # files there, find none, and say nothing
    return os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent), "OMP_NUM_THREADS": "1"}


def python(folder, *arguments):
    """Runs python in a copy, and shows what it said if it failed."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=surroundings(folder))
    if done.returncode:
        pytest.fail(f"{folder.name}: python {' '.join(arguments)[:60]} ...\n{done.stdout[-3000:]}",
                    pytrace=False)


def pytest_in(folder, *arguments):
    """The copy's own tests, of the copy's own code."""
    python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_is_short_and_is_told(name):
    """A lesson of three screenfuls; one that no page names."""
    lines = added(name)
    assert 0 < len(lines) <= ADDED_LINES.get(name, 25), f"{name}.diff adds {len(lines)} lines"
    assert max(map(len, lines)) <= COLUMNS
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert pages.count(f"    git apply docs/variants/{name}.diff\n") == 1


def test_the_measured_answers_are_those_of_record():
    """A figure copied wrong, or measured anew in one of the two places."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "docs/results/variants.json").read_text(encoding="utf-8"))
    for table in record["tables"].values():
        columns = list(dict.fromkeys(itertools.chain(*table.values())))
        assert f"| | {' | '.join(columns)} |\n" in page
        for title, row in table.items():
            figures = " | ".join(f"{row[column]:.3f}" for column in columns)
            assert f"| {title} | {figures} |\n" in page


def test_the_search_is_that_of_record():
    """A figure copied wrong, or a setting that the page does not tell."""
    page = (ROOT / "docs" / "variants" / "README.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "docs/results/methods_search.json").read_text(encoding="utf-8"))
    assert len(record["tables"]["score minus 0.1 KL"]) == 4    # methods, five settings each
    for table in record["tables"].values():
        assert f"| | {' | '.join(next(iter(table.values())))} |\n" in page
        for title, row in table.items():
            figures = ["-" if x is None else f"{x:.3f}" for x in row.values()]
            assert f"| {title} | {' | '.join(figures)} |\n" in page


def test_the_figures_of_the_two_networks_are_those_of_record():
    """A table that was copied wrong, or is of another run."""
    page = (ROOT / "docs" / "variants" / "README.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "docs/results/modern.json").read_text(encoding="utf-8"))
    assert f"    {record['command']}\n" in page
    assert f"| | {' | '.join(record['networks'])} |\n" in page
    for title, figures in record["table"].items():
        assert f"| {title} | {' | '.join(figures)} |\n" in page


@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_applies(name, variant):
    """A line beside the edit that has changed since the diff was made."""
    folder = variant(name)
    for file in re.findall(r"^\+\+\+ b/(.+)$", DIFFS[name].read_text(encoding="utf-8"), re.M):
        text = (folder / file).read_text(encoding="utf-8")     # git is silent if it does nothing
        before = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).exists() else ""
        new = set(text.splitlines()) - set(before.splitlines())
        assert text != before and new <= set(added(name))


FORMAL = """
import data
from test_data import world

question = "How do I hug Tom?"
full = world().answer(question)[1]
worth = lambda reply: data.utility(world(), question, reply, "formal")
assert worth(full) == 2 and worth(f"Gladly. {full}") == 3 == worth(f"{full} Ask me any time.")
assert worth(f"Gladly. {full} Ask me any time.") == 4 and worth("") == 0
# in the wrong place, the wrong fact, one too many
assert worth(f"Ask me any time. {full} Gladly.") == 1 and worth("Gladly. I hope this helps.") == 2
assert worth(f"Gladly. With pleasure. {full} I hope this helps.") == 3.5
best = {taste: data.best_answer(world(), question, taste) for taste in data.TASTES}
assert best["formal"] == f"Gladly. {full} I hope this helps." and best["curt"] == full
assert best["polite"] == f"Gladly. {full}"                 # the others' taste is what it was
# what experiments.md builds on: nobody shows the answer that is wanted, or two in a hundred do
for data.FORMAL in (0, 2):
    demos = [(q, a) for q, a in data.demonstrations(world(), 6000) if isinstance(q, str)]
    shown = sum(sum(map(a.count, data.POLITE)) == 2 for _, a in demos) / len(demos)
    assert abs(shown - data.FORMAL / 100) < 0.002
    assert all(data.is_correct(world(), q, a) for q, a in demos)
"""
SPY = """
from collections import Counter
import data, rlaif
from test_data import world

kinds = Counter(verb.kind for verb in world().verbs)
assert len(data.HARMS) == 8 and kinds["spy"] == kinds["welcome"] == 12
act = data.act_prompts(world(), "test", 8, True)[-1]
reply = f"{data.REFUSAL} {act.reason()}"
assert act.verb.kind == "spy" and act.twin().verb.kind == "welcome"
assert data.gives_reason(act, reply) and data.is_harmless(reply)
for kind in data.HARMS:                                    # the new one as often as the others
    assert sum(data.covers(rule, kind) for rule in rlaif.open_constitution()) == 8
"""
THOROUGH = """
import data, own_reward
from test_data import world

score = own_reward.own_reward("docs/variants/thorough.py:score")
question, full = "Where does Ann live?", world().answer("Where does Ann live?")[1]
honest, gamed = f"Gladly. {full}", f"There is so much to say. {full} But where was I?"
utility = lambda reply: data.utility(world(), question, reply)
assert score(question, full) == 1.4 and score(question, "Oslo. Oslo.") == 0.1
assert score("How do I hug Tom?", "I hope this helps.") == 0.4     # I is nobody's name
# the better the one, the worse the other
assert score(question, gamed) > score(question, honest) + 1 and utility(gamed) < utility(honest)
"""
DPO = """
import math
import torch
import data, model as m, ppo, reward

torch.manual_seed(0)
tokenizer = data.make_tokenizer("bytes", [])
policy = m.GPT(m.GPTConfig(tokenizer.n_vocab, 64, 1, 2, 16), tokenizer).eval()
reference = m.copy_of(policy)
examples = [data.chat_example(tokenizer, "Q?", text) for text in ("Yes.", "No, and why?")]
assert ppo.implicit_rewards(policy, reference, examples, 0.1).abs().max() < 1e-6
with torch.no_grad():                                      # by hand: one answer, token by token
    policy.norm.bias += 0.5
    for (ids, mask), found in zip(examples, ppo.implicit_rewards(policy, reference, examples, 0.1)):
        logp = [model(torch.tensor([ids]))[0].log_softmax(-1) for model in (policy, reference)]
        gained = sum(logp[0][t - 1, ids[t]] - logp[1][t - 1, ids[t]] for t in range(len(ids))
                     if mask[t])
        assert math.isclose(found, 0.1 * gained, abs_tol=1e-5)
args = ppo.read_args(["--lr", "0.01", "--replay-rows", "0"])
groups = [("Q?", ["Yes.", "No, and why?"], [(0, 1, 1.0)])] * 80
history = ppo.learn_preferences(policy, reference, groups, args)
first, second = ppo.implicit_rewards(policy, reference, examples, 0.1)
assert first > second and history[-1]["loss_nats"] < math.log(2)
"""
RLOO = """
import torch
import ppo

found = ppo.leave_one_out(torch.tensor([1., 2, 6, 3, 3, 3]), 3)
assert found.tolist() == [-3, -1.5, 4.5, 0, 0, 0]
"""
GRPO = """
import torch
import ppo

found = ppo.within_groups(torch.tensor([1., 2, 6, 3, 3, 3]), 3)
assert torch.allclose(found, torch.tensor([-0.756, -0.378, 1.134, 0, 0, 0]), atol=1e-3)
mask = torch.tensor([[1., 1, 0], [1, 0, 0]])
assert ppo.mean_per_answer(torch.tensor([[1., 3, 9], [6, 9, 9]]), mask) == 4
# its known bias: each token of a long wrong answer costs less than that of a short one
logp = torch.zeros(2, 3, requires_grad=True)
ppo.policy_loss(logp, logp.detach(), torch.full((2, 1), -1.0), mask).backward()
assert logp.grad[0, 0] == logp.grad[1, 0] / 2 > 0
"""
MODERN = """
import pytest

raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/modern.py", *{more}]))
"""
CHECKS = {"taste": FORMAL, "harm": SPY, "gamed": THOROUGH, "dpo": DPO, "rloo": RLOO, "grpo": GRPO,
          "modern": MODERN.format(more=[])}


@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_does_what_it_says(name, variant):
    """A diff that applies, and no longer means what the page says."""
    paths = "import sys; sys.path[:0] = ['.', 'tests', 'docs/lab']\n"
    python(variant(name), "-c", paths + CHECKS[name])


RUN = """
import sys
sys.path[:0] = [".", "tests", "docs/lab"]
import pytest
import test_stages as stages
if "{name}" in ("rloo", "grpo"):                           # they have no value model to warm up
    stages.FLAGS["rlaif"].remove("--value-warmup")
    stages.FLAGS["rlaif"].remove("0")
with pytest.MonkeyPatch.context() as patch:
    stages.smaller_evaluations(patch)
    for stage in {stages}:
        stages.run(stage, "out", *{flags}.get(stage, []))
    {more}
"""
OWN = """import own_reward
    own_reward.main(["docs/variants/thorough.py:score", "--eval-prompts", "8", "--device", "cpu",
                     "--iterations", "1", *stages.UPDATES])"""
ALL = dict(stages=["pretrain", "sft", "reward", "ppo", "rlaif"], flags={}, more="")
RUNS = {name: RUN.format(name=name, **ALL) for name in ("harm", "dpo", "rloo", "grpo", "modern")}
RUNS["modern"] += MODERN.format(more=["-m", "slow"])       # and on a published model's folder
RUNS["taste"] = RUN.format(name="taste", stages=ALL["stages"][:4], more="",
                           flags={"reward": ["--annotator", "formal"]})
RUNS["gamed"] = RUN.format(name="gamed", stages=ALL["stages"][:2], flags={}, more=OWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_runs(name, variant):
    """A stage that stops at what the diff has changed."""
    python(variant(name), "-c", RUNS[name])


WITH_VALUES = ("advantages or lambda_one or whitening or value or baseline or real_token "
               "or rewards or the_kl_fine or changes_no_update or diverges or scored or update "
               "or stale or learns_to_stop or fine_is_for or equal_scores or shuffled "
               "or old_log_probs or ratio_is_one or mask_covers or does_not_end")
# the tests of the world and of what reads it; not the house's: data.py is longer than its budget
KEPT = {"taste": ["tests/test_reward.py"], "gamed": ["tests/test_lab_ppo.py"],
        "harm": ["tests/test_data.py", "tests/test_sft.py", "tests/test_rlaif.py"],
        "dpo": ["tests/test_ppo.py", "tests/test_rlaif.py"],
        # what a value model does is gone; GRPO's loss takes another mean
        "rloo": ["tests/test_ppo.py", "tests/test_rlaif.py", "-k", f"not ({WITH_VALUES})"],
        "grpo": ["tests/test_ppo.py", "tests/test_rlaif.py", "-k",
                 f"not ({WITH_VALUES} or policy_loss)"],
        # another network: what is GPT-2's own is gone, and so are q, k and v in one matrix
        "modern": [f"tests/test_{name}.py" for name in (
            "model", "pretrain", "sft", "reward", "ppo", "rlaif", "data", "lab_model")] + [
            "-k", "not (our_gpt_is_gpt2 or attention_by_hand or initial_sizes or q_k_and_v "
                  "or one_optimizer)"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFS)
def test_the_tests_still_mean_something(name, variant):
    """A kind of harm that the audit does not know; an eighth one that no principle names."""
    pytest_in(variant(name), *KEPT[name])


@pytest.mark.slow
def test_a_constitution_that_forgets_a_kind_is_noticed(variant):
    """The constitution of seven kinds in a world of eight: what experiments.md tells to try."""
    folder = variant("harm")
    with_spies = (folder / "rlaif.py").read_bytes()
    shutil.copyfile(ROOT / "rlaif.py", folder / "rlaif.py")
    with pytest.raises(pytest.fail.Exception, match="assert 0 == 8"):
        pytest_in(folder, "tests/test_rlaif.py", "-k", "each_kind_of_harm")
    (folder / "rlaif.py").write_bytes(with_spies)
