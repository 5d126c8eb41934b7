"""docs/lab/blank.py: the tests that judge a fill-in accept the original, and reject the blank and
wrong answers. They are called here, one after the other: a pytest for each would take minutes."""
import importlib
import inspect
import subprocess
import sys
import types
from collections import Counter
from functools import reduce
from pathlib import Path

import pytest
from wrong_answers import WRONG

import blank

ROOT = Path(__file__).parent.parent


def code_of(source, path, function):
    """The compiled body of "function" or "Class.method" in the text of a file, which is not run."""
    code = compile(source, path, "exec")
    for name in function.split("."):
        parts = [part for part in code.co_consts if isinstance(part, types.CodeType)]
        code = next(part for part in parts if part.co_name == name)
    return code


def run(test):
    """Call a test as pytest would: once for each of its parameters, and with `monkeypatch`."""
    cases, wanted = [{}], inspect.signature(test).parameters
    for mark in getattr(test, "pytestmark", []):           # all of them are parametrize
        names, values = mark.args
        cases = [dict(zip(names.split(", "), row)) for row in values]
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            test(**case, **{"monkeypatch": patch} if "monkeypatch" in wanted else {})


def complaint(function, code, tests):
    """What the first test to fail says against a function with this body, or None."""
    right, function.__code__ = function.__code__, code     # wherever it was imported to
    try:
        for test in tests:
            run(test)
    except (Exception, SystemExit, pytest.fail.Exception) as error:
        return error
    finally:
        function.__code__ = right
    return None


@pytest.mark.parametrize("name", blank.FILL_INS)
def test_a_fill_in_is_judged(name):
    """A student's mistake that no test sees, or a right answer that one rejects."""
    file, function, tests = blank.FILL_INS[name]
    module, judges = importlib.import_module(file), importlib.import_module(f"test_{file}")
    tests = [getattr(judges, f"test_{test}") for test in tests]
    target = inspect.unwrap(reduce(getattr, function.split("."), module))
    source, right = Path(module.__file__).read_text(encoding="utf-8"), inspect.getsource(target)
    judge = lambda text: complaint(target, code_of(text, module.__file__, function), tests)
    assert judge(source) is None
    assert isinstance(judge(blank.leave_out(source, function)[0]), NotImplementedError)
    for what, old, new in [answer[1:] for answer in WRONG if answer[0] == name]:
        if right.count(old) != 1:
            pytest.fail(f'{name}, "{what}": mend the edit in wrong_answers.py: {file}.{function} '
                        f"has {right.count(old)} times {old!r}, not once", pytrace=False)
        error = judge(source.replace(right, right.replace(old, new)))
        if error is None or isinstance(error, NameError):  # a slip in the edit is no wrong answer
            pytest.fail(f'{name}, "{what}": {error or "accepted"}', pytrace=False)


def test_every_fill_in_has_two_wrong_answers_and_two_hints():
    """A fill-in that is added, or taken out, in one of the three places alone."""
    count = Counter(name for name, *_ in WRONG)
    assert set(count) == set(blank.FILL_INS) and min(count.values()) >= 2
    pages = "\n".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/*.md")))
    for name in blank.FILL_INS:
        assert pages.count(f"\n### {name}\n") == 1, f"one heading of docs/*.md has to be {name}"
        hints = pages.split(f"\n### {name}\n")[1].split("\n#")[0]
        assert hints.count("<details><summary>Hint ") == hints.count("</details>") == 2, name


@pytest.mark.slow
def test_the_printed_command_judges_the_copy(tmp_path, capsys):
    """A copy without a file that the tests need, or in which they judge the project's function."""
    copy = tmp_path / "a copy"
    blank.main(["attention", "--out", str(copy)])
    told = capsys.readouterr().out
    assert "def forward(self, x, mask, cache=None):" in told
    assert "softmax(q k' / sqrt(D) + mask) v" in told
    assert "y.transpose" not in told
    command, = [line.split() for line in told.splitlines() if line.startswith("    python ")]
    judge = lambda: subprocess.run([sys.executable, *command[1:]], cwd=copy, capture_output=True,
                                   encoding="utf-8")
    done = judge()
    assert done.returncode == 1 and "NotImplementedError" in done.stdout, done.stdout
    (copy / "model.py").write_bytes((ROOT / "model.py").read_bytes())
    done = judge()
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_a_copy_overwrites_nothing(tmp_path, capsys):
    """An answer lost because its folder was named again; a name that the list does not have."""
    blank.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*blank.FILL_INS]
    (tmp_path / "ppo.py").write_text("my answer", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not empty: name a new folder"):
        blank.main(["gae", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="cannot be made"):
        blank.main(["gae", "--out", str(tmp_path / "ppo.py")])
    assert [p.name for p in tmp_path.iterdir()] == ["ppo.py"]
