"""The house rules, held by counting, so that what was made readable stays so. A complaint names
file and line; what to do about it is nearly always to give a part of the code a name."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("pretrain", "sft", "reward", "ppo", "rlaif")
BUDGETS = dict(model=600, data=1450, pretrain=330, sft=210, reward=330, ppo=390, rlaif=480)
LAB_BUDGET, COLUMNS, FUNCTION_LINES, PARAMETERS = 100, 100, 60, 7
TOP_LEVEL = {"README.md", "LICENSE", "requirements.txt", "docs", "tests"}
GENERATED = {"out", "__pycache__"}

SOURCES, LAB = sorted(ROOT.glob("*.py")), sorted(ROOT.glob("docs/lab/*.py"))
TEXTS = {path: path.read_text(encoding="utf-8")
         for path in [*SOURCES, *ROOT.glob("docs/**/*.py"), *ROOT.glob("tests/*.py")]}
TREES = {path: ast.parse(text, str(path)) for path, text in TEXTS.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nodes(kinds, paths=TREES):
    """Every node of these kinds -> (node, "ppo.py:12")."""
    for path in paths:
        for node in ast.walk(TREES[path]):
            if isinstance(node, kinds):
                yield node, f"{path.relative_to(ROOT)}:{node.lineno}"


def none_of(complaints):
    """Fail if there are any, a line each, without a traceback: they say where it is."""
    complaints = "\n".join(complaints)
    if complaints:
        pytest.fail(complaints, pytrace=False)


def test_lines_fit_a_page():
    """Lines that a projector, a printed page or a window beside another cuts off."""
    none_of(f"{path.relative_to(ROOT)}:{n}: {len(line)} columns, at most {COLUMNS}"
            for path, text in TEXTS.items()
            for n, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS)


def test_files_keep_their_budgets():
    """A file that grows by five lines at a time, until nobody reads it to the end."""
    budgets = {ROOT / f"{name}.py": lines for name, lines in BUDGETS.items()}
    budgets |= dict.fromkeys(LAB, LAB_BUDGET)
    lengths = {path: len(TEXTS[path].splitlines()) for path in budgets}
    none_of(f"{path.relative_to(ROOT)}:{budget + 1}: {lengths[path]} lines, at most {budget}"
            for path, budget in budgets.items() if lengths[path] > budget)


def test_functions_fit_a_screen():
    """A function that has to be scrolled, and so is not read in one piece; but the one that
    declares a script's flags is a list."""
    for_screen = [(f, place) for f, place in nodes(FUNCTIONS) if f.name != "read_args"]
    lengths = [(f.end_lineno - f.lineno + 1, f.name, place) for f, place in for_screen]
    none_of(f"{place}: {name} has {length} lines, at most {FUNCTION_LINES}"
            for length, name, place in lengths if length > FUNCTION_LINES)


def parameters(function):
    """Their names, defaults, *args and **options included; a method's self is none."""
    a = function.args
    names = [p.arg for p in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if p]
    return [name for name in names if name != "self"]


def test_functions_have_few_parameters():
    """A call that nobody can read without the signature beside it."""
    counted = [(len(parameters(f)), f.name, place) for f, place in nodes(FUNCTIONS)]
    none_of(f"{place}: {name} has {n} parameters, at most {PARAMETERS}"
            for n, name, place in counted if n > PARAMETERS)


def docstring_lines(tree):
    """The numbers of all lines that belong to a docstring."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_code_says_why(path):
    """Code without reasons: a sixth of the lines, blank ones and docstrings aside, carry one."""
    tokens = tokenize.generate_tokens(io.StringIO(TEXTS[path]).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    filled = {n for n, line in enumerate(TEXTS[path].splitlines(), 1) if line.strip()}
    code = filled - docstring_lines(TREES[path])
    needed = -(-len(code) // 6)
    none_of([f"{path.name}:1: {len(commented)} lines with a comment, at least {needed} of "
             f"{len(code)}"] if len(commented) < needed else [])


def test_comprehensions_are_one_deep():
    """A loop inside a loop, read from the middle outwards."""
    complaints = []
    for outer, place in nodes(COMPREHENSIONS, [*SOURCES, *LAB]):
        inner = [n for n in ast.walk(outer) if isinstance(n, COMPREHENSIONS) and n is not outer]
        complaints += [f"{place}: a comprehension inside a comprehension"] * bool(inner)
    none_of(complaints)


def imported(path):
    """The names of the modules that a file imports."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_nothing_is_imported_from_where_it_should_not_be():
    """Experiments that lean on one another, or a stage on a later one: none can then be read, or
    thrown away, alone."""
    lab = {path.stem for path in LAB}
    allowed = {ROOT / f"{name}.py": set(STAGES[:i]) for i, name in enumerate(STAGES)}
    allowed |= {ROOT / "model.py": set(), ROOT / "data.py": set()} | dict.fromkeys(LAB, set(STAGES))
    wrong = {path: imported(path) & (lab | set(STAGES)) - names for path, names in allowed.items()}
    none_of(f"{path.relative_to(ROOT)}:1: imports {', '.join(sorted(names))}"
            for path, names in wrong.items() if names)


def test_the_house_has_no_other_rooms():
    """A file for a moment's need, beside those that a reader is meant to open."""
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - GENERATED
    expected = TOP_LEVEL | {f"{name}.py" for name in BUDGETS}
    none_of(f"{name}: {'too many' if name in there else 'missing'}"
            for name in sorted(there ^ expected))
