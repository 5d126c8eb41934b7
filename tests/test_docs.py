"""What README and the chapters say of the code holds: links, names, commands, tests. A complaint
names page and line; nearly always something was renamed, and a page still has its old name."""
import ast
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README_LINES, README_LETTERS = 250, 15_000

PAGES = {path: path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
CHAPTERS = [path for path in PAGES if re.match(r"\d-", path.name)]     # one a stage
CODE = {path: path.read_text(encoding="utf-8") for folder in ("", "docs/lab", "tests")
        for path in sorted((ROOT / folder).glob("*.py"))}
RESULTS = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/results/*.*"))

DEFINED = {node.name for text in CODE.values() for node in ast.walk(ast.parse(text))
           if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
# whatever a page may name: functions, columns of a log, parameters, names of figures
SHOWN = [text for path, text in CODE.items() if path.parent.name != "tests"]
WORDS = set(re.findall(r"\w+", "".join(SHOWN) + RESULTS))
NAME = r"[A-Za-z_]\w*"


@pytest.fixture(scope="module")
def flags():
    """{"rlaif.py" or "docs/lab/dial.py": its flags}, from the --help of each script."""
    found = {}
    for path, text in CODE.items():
        if path.parent.name == "tests" or "__main__" not in text:
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            importlib.import_module(path.stem).main(["--help"])
        listed = re.findall(r"^  (?:-h, )?(--[\w-]+)", said.getvalue(), re.M)
        if path.parent.name == "lab":    # some add a flag to those of a stage, which --help lists
            listed += re.findall(r'add_argument\("(--[\w-]+)"', text)
        found[path.relative_to(ROOT).as_posix()] = set(listed)
    return found


def of_line(text, pattern):
    """Every match of a pattern that stays within a line -> (number of the line, match)."""
    for n, line in enumerate(text.splitlines(), 1):
        for match in re.finditer(pattern, line):
            yield n, match


def anchors(text):
    """Those that GitHub makes of the headings: "## The dial: how good?" -> the-dial-how-good."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_links(path, text):
    """Links and pictures that lead to no file, or to no heading of one."""
    for n, match in of_line(text, r"\]\(([^)\s]+)\)"):
        file, _, anchor = match[1].partition("#")
        target = (path.parent / file).resolve() if file else path
        if re.match(r"\w+:", file):                        # another site
            continue
        if file and not target.exists():
            yield n, f"there is no file {file}"
        elif anchor and anchor not in anchors(text if target == path else PAGES[target]):
            yield n, f"{target.name} has no heading #{anchor}"


def wrong_names(text):
    """Names in backticks of a test, a file or anything else that the code does not have."""
    for n, match in of_line(text, r"`([^`\s]+)`"):
        name = match[1]
        if re.fullmatch(r"test_\w+", name) and name not in DEFINED:
            yield n, f"there is no test {name}"
        elif name.startswith(("docs/", "tests/")) or re.fullmatch(r"\w+\.py", name):
            if not (ROOT / name.replace("seedS", "seed0")).exists():
                yield n, f"there is no file {name}"
        elif re.fullmatch(rf"{NAME}|(?:data|GPT)\.{NAME}", name) and not name.startswith("test_"):
            if not set(name.split(".")) <= WORDS:
                yield n, f"nothing is called {name}"


def wrong_functions(text):
    """Names in backticks, where a page says what to read, that are no function and no class."""
    title = ""
    for n, line in enumerate(text.splitlines(), 1):
        title = line if line.startswith("#") else title
        for name in re.findall(rf"`({NAME})`", line):
            if title in ("## Read", "## The tour") and name not in DEFINED:
                yield n, f"there is no function {name}"


def wrong_commands(text, flags):
    """Commands of no script, or with a flag that it does not have; flags that no script has."""
    text = text.replace("\\\n", "  ")                      # one line, though written in two
    for n, match in of_line(text, r"(?:python |`|torchrun .*?)([\w/]+\.py)([^`&#|]*)"):
        if match[1] not in flags and match[0].startswith(("python", "torchrun")):
            yield n, f"there is no script {match[1]}"
        for flag in re.findall(r"(?<!\S)--[\w-]+", match[2]):
            if flag not in flags.get(match[1], ()):
                yield n, f"{match[1]} has no {flag}"
    for n, match in of_line(text, r"`(--[^`]+)`"):
        for flag in re.findall(r"--[\w-]+", match[1]):
            if not any(flag in its for its in flags.values()):
                yield n, f"no script has {flag}"


def wrong_edits(text):
    """Rows of the table of edits that name no function to edit, or no test that would fail."""
    table = text.partition("| the test that fails |")[2].partition("\n\n")[0]
    first = text.count("\n", 0, text.find(table)) + 1
    rows = table.splitlines()[2:]                          # below the rest of the head, and dashes
    if len(rows) < 3:
        yield first, "no table of edits with the tests that fail"
    for n, row in enumerate(rows, first + 2):
        named = re.match(rf"\| `(?:{NAME}\.)?({NAME})`[^|]*: [^|]+\| `(test_\w+)` \|$", row)
        if not named or not set(named.groups()) <= DEFINED:
            yield n, f"no such function, or no such test: {row}"


def none_of(complaints):
    """Fail if there are any: (page, [(line, what is wrong)])."""
    lines = []
    for page, found in complaints:
        lines += [f"{page.relative_to(ROOT)}:{n}: {what}" for n, what in found]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def test_links_lead_somewhere():
    """A chapter or a heading renamed; a picture that was never added."""
    none_of((path, wrong_links(path, text)) for path, text in PAGES.items())


def test_what_is_named_exists():
    """A function, test, column or file that has another name by now."""
    none_of((path, wrong_names(text)) for path, text in PAGES.items())
    none_of((path, wrong_functions(text)) for path, text in PAGES.items())


def test_commands_can_be_run(flags):
    """A command copied from a page that ends with "unrecognized arguments"."""
    none_of((path, wrong_commands(text, flags)) for path, text in PAGES.items())


def test_every_chapter_says_what_breaks_and_who_notices():
    """An edit that is said to break a test that is gone."""
    assert len(CHAPTERS) == 5
    none_of((path, wrong_edits(PAGES[path])) for path in CHAPTERS)


def test_every_experiment_is_listed():
    """A lab script that nobody finds."""
    page = PAGES[ROOT / "docs" / "experiments.md"]
    assert not [path.name for path in CODE if path.parent.name == "lab"
                and f"| `python docs/lab/{path.name}` |" not in page]


def test_readme_stays_a_door():
    """A page that grows by a paragraph at a time, until nobody reads it in one sitting."""
    text = PAGES[ROOT / "README.md"]
    assert len(text.splitlines()) <= README_LINES and len(text) <= README_LETTERS


def test_each_check_finds_what_it_is_for(flags):
    """Checks that pass on any page."""
    page, home = "# The end: why?\n[a](#the-end-why) [b](#end) [c](no.md) [d](README.md#no) ", ROOT
    assert [what for _, what in wrong_links(home / "x.md", page)] == [
        "x.md has no heading #end", "there is no file no.md", "README.md has no heading #no"]
    named = "`whiten` `nothing_like_it` `test_no_such` `docs/lab/no.py` `no.py` `GPT.nothing_such`"
    assert len(list(wrong_names(named))) == 5
    assert len(list(wrong_functions("## Read\n`whiten`, `kl_nats`\n## Watch\n`kl_nats`"))) == 1
    commands = ("python ppo.py --beta 1 --learn last\n`reward.py --pears 3`\n    python no.py && "
                "python docs/lab/dial.py --critics x --rounds 2 \\\n --nothing # --no\n`--no 1`")
    assert [what for _, what in wrong_commands(commands, flags)] == [
        "ppo.py has no --learn", "reward.py has no --pears", "there is no script no.py",
        "docs/lab/dial.py has no --nothing", "no script has --no"]
    row = "| `whiten`: x | `test_no_stale_gradients` |\n"
    table = f"| the edit | the test that fails |\n|---|---|\n{row * 3}"
    assert not list(wrong_edits(table)) and len(list(wrong_edits(row))) == 1
    assert len(list(wrong_edits(table + row.replace("whiten", "whitem")))) == 1
    assert len(list(wrong_edits(table + row.replace("stale", "fresh")))) == 1
