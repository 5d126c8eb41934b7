"""Files of users: every form they come in, and a plain word for every one that cannot be read."""
import argparse
import gzip
import json
import os
from pathlib import Path

import pytest
import torch

import data
import model as m
import pretrain
import sft

BYTES = data.Tokenizer([bytes([i]) for i in range(256)])
# the first 1,000 lines of HH-RLHF's harmless-base/train.jsonl
HH = Path(os.environ.get("HH_FILE", "no file"))
TALK = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}


def lines(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def said(*texts):
    return [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def messages(*texts, role="role", content="content", names=("user", "assistant")):
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


# --------------------------------------------------------------------------------------------------
# ----------------
# The file around the records

CONTAINERS = {
    "lines": lambda a, b: f"{a}\n{b}\n".encode(),
    "no last newline": lambda a, b: f"{a}\n{b}".encode(),
    "blank lines": lambda a, b: f"\n{a}\n\n \n{b}\n\n".encode(),
    "windows": lambda a, b: f"{a}\r\n{b}\r\n".encode(),
    "byte order mark": lambda a, b: f"{a}\n{b}\n".encode("utf-8-sig"),
    "list": lambda a, b: f"[{a},\n {b}]".encode(),
    "indented list": lambda a, b: json.dumps([json.loads(a), json.loads(b)], indent=1).encode(
        "utf-8-sig"
    ),
    "gzip": lambda a, b: gzip.compress(f"{a}\n{b}\n".encode()),
    "gzipped list": lambda a, b: gzip.compress(f"[{a}, {b}]".encode("utf-8-sig")),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_records_in_every_container(container, tmp_path):
    """The suffix believed: .json that holds lines, gzip without .gz. And `splitlines`, which cuts a
    record at a line separator inside a string."""
    second = {"messages": messages("Zoë?\u2028\x85", "東京")}
    path = tmp_path / "talk.json"
    path.write_bytes(
        CONTAINERS[container](json.dumps(TALK), json.dumps(second, ensure_ascii=False))
    )
    conversations, skipped = data.read_conversations(path)
    assert conversations == [said("Hi?", "Yes."), said("Zoë?", "東京")] and not skipped
    where = [place for place, _, _ in data.read_records(path)]
    word = "record" if "list" in container else "line"
    assert where == (
        ["line 2", "line 5"] if container == "blank lines" else [f"{word} 1", f"{word} 2"]
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "git-lfs pointer.*git lfs pull",
        ),
        (b"", "bad.jsonl is empty"),
        (b" \r\n\n", "bad.jsonl is empty"),
        (b"[]", "holds nothing of use"),
        (gzip.compress(json.dumps(TALK).encode())[:-9], "not a whole gzip file"),
        (gzip.compress(b"{}" * 99)[:20] + b"junk", "not a whole gzip file"),
        ("{'messages': 'café'}".encode("latin-1"), "not UTF-8 text"),
        (json.dumps(TALK).encode("utf-16"), "is UTF-16: give UTF-8 text"),
        (json.dumps(TALK).encode() + b"\n\n{oops\n", "line 3: not JSON .*'{oops'"),
        (b"Hi there\n", "line 1: not JSON .*'Hi there'"),
        (b'[{"prompt": "a",\n "completion": "b"},\n {"prompt" "c"}]', "line 3: not JSON"),
        (b'[{"prompt": "a"}', "line 1: not JSON"),
        (b"[" * 100000, "line 1: not JSON"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: "),
    ],
)
def test_files_that_cannot_be_read(content, words, tmp_path):
    """A traceback from json, gzip or codecs; or a git-lfs pointer taken for data, the classic after
    a clone without lfs."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"bad\.jsonl.*{words}|{words}"):
        data.read_conversations(path)
    with pytest.raises(SystemExit, match="nothing.jsonl not found"):
        data.read_conversations(tmp_path / "nothing.jsonl")
    with pytest.raises(SystemExit, match="cannot be read"):
        data.read_conversations(tmp_path)


def test_all_readers_know_a_pointer(tmp_path):
    """A pointer of three lines pre-trained on as prose, or drawn from as a constitution of three
    principles."""
    path = tmp_path / "pointer.txt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for read in (
        lambda path: list(data.stream_text(path)),
        data.read_conversations,
        data.read_preferences,
        data.read_prompts,
        data.read_constitution_file,
    ):
        with pytest.raises(SystemExit, match="pointer.txt is a git-lfs pointer"):
            read(path)


def test_windows_line_ends_in_plain_text(tmp_path):
    """A carriage return learnt as the end of every line, or as part of a principle."""
    path = tmp_path / "notes.txt"
    path.write_bytes(b"Be kind.\r\n\r\nDo not lie.\r\n")
    assert "".join(text for text, *_ in data.stream_text(path)) == "Be kind.\n\nDo not lie.\n"
    assert (
        data.read_prompts(path)
        == [c["principle"] for c in data.read_constitution_file(path)]
        == ["Be kind.", "Do not lie."]
    )


# --------------------------------------------------------------------------------------------------
# ----------------
# Conversations

CONVERSATIONS = [
    (
        {"messages": messages("Hi?", "Yes.", " Where? ", "In Rome.")},
        said("Hi?", "Yes.", "Where?", "In Rome."),
    ),
    (
        {"messages": [{"role": "system", "content": "Be kind."}, *messages("Hi?", "Yes.")]},
        said("Be kind.\n\nHi?", "Yes."),
    ),
    (
        {
            "messages": [{"role": "system", "content": ""}, *messages("Hi?", "Yes.")],
            "prompt": "Hi?",
            "id": 3,
        },
        said("Hi?", "Yes."),
    ),
    (
        {
            "conversations": messages(
                "Hi?", "Yes.", role="from", content="value", names=("human", "gpt")
            )
        },
        said("Hi?", "Yes."),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Yes."},
            ]
        },
        said("Be kind.\n\nHi?", "Yes."),
    ),
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, said("Add.\n\n1, 2", "3")),
    ({"instruction": "Say hi.", "input": "", "output": "Hi."}, said("Say hi.", "Hi.")),
    ({"instruction": "Say hi.", "output": "Hi."}, said("Say hi.", "Hi.")),
    ({"prompt": "Hi?", "completion": " Yes."}, said("Hi?", "Yes.")),
    (
        {
            "prompt": messages("Hi?", "Yes.", "Where?"),
            "completion": [{"role": "assistant", "content": "In Rome."}],
        },
        said("Hi?", "Yes.", "Where?", "In Rome."),
    ),
    (
        {
            "prompt": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Where?\n\nAssistant:",
            "completion": " In Rome.",
        },
        said("Hi?", "Yes.", "Where?", "In Rome."),
    ),
]


def test_conversations_of_every_form(tmp_path):
    """Turns lost, merged or given to the wrong speaker."""
    for record, turns in CONVERSATIONS:
        assert data.read_conversations(lines(tmp_path / "one.jsonl", record)) == ([turns], {}), (
            record
        )
    # a file has the form of its first record: what else is in it is counted, not mixed in
    path = lines(tmp_path / "all.jsonl", *[record for record, _ in CONVERSATIONS])
    chats = [turns for record, turns in CONVERSATIONS if "messages" in record]
    kept, skipped = data.read_conversations(path)
    assert kept == chats and sum(skipped.values()) == len(CONVERSATIONS) - len(chats)
    assert all(why.startswith("in another form: {") for why in skipped)


USELESS = [
    ({"messages": messages("Hi?", "")}, "with an empty answer"),
    ({"instruction": "Say hi.", "output": None}, "with an empty answer"),
    ({"messages": messages("Hi?", " ", "What?", "Yes.")}, "with an empty turn"),
    ({"prompt": "", "completion": "Yes."}, "with an empty turn"),
    ({"messages": messages("Hi?", "Yes.", "And?")}, "without an answer at the end"),
    ({"messages": []}, "without an answer at the end"),
    (
        {"messages": messages("Hi?", "Yes.", names=("assistant", "user"))},
        "without an answer at the end",
    ),
    (
        {"messages": messages("Yes?", "Hi?", "No.", names=("assistant", "user"))},
        "with turns that are not user, assistant, user, ...",
    ),
    (
        {"messages": messages("Hi?", "Hi!", names=("assistant", "assistant"))},
        "with turns that are not user, assistant, user, ...",
    ),
    (
        {"messages": messages("Hi?", None, "4", "Four.", names=("user", "tool"))},
        "with a turn by 'tool'",
    ),
]


def test_useless_conversations_are_skipped_and_counted(tmp_path):
    """A run that stops at record 51,234 of somebody else's data, or goes on in silence with half of
    it."""
    good = [TALK, {"instruction": "Hi?", "output": "Yes."}, {"prompt": "Hi?", "completion": "Yes."}]
    for record, why in USELESS:
        first = next(form for form in good if set(form) <= set(record))
        conversations, skipped = data.read_conversations(
            lines(tmp_path / "one.jsonl", first, record)
        )
        assert conversations == [said("Hi?", "Yes.")] and skipped == {why: 1}, record
    conversations, skipped = data.read_conversations(
        lines(tmp_path / "all.jsonl", TALK, *[record for record, _ in USELESS])
    )
    assert len(conversations) + sum(skipped.values()) == 1 + len(USELESS)
    assert all("another form" in why for why in list(skipped) if why.startswith("in"))
    skipped = {why: n for why, n in skipped.items() if not why.startswith("in another form")}
    reasons = "1 with a turn by 'tool', 1 with an empty answer, 1 with an empty turn, 2 with turns"
    assert data.reasons(skipped).startswith(f"{reasons} that are not")
    with pytest.raises(SystemExit, match="nothing of use: 1 with an empty answer"):
        data.read_conversations(lines(tmp_path / "none.jsonl", USELESS[0][0]))


@pytest.mark.parametrize(
    "record, seen",
    [
        ({"question": "Hi?", "answer": "Yes."}, '{"question": "Hi?", "answer": "Yes."}'),
        ({"prompt": "Hi?"}, '{"prompt": "Hi?"}'),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi?"},
                    {"role": "assistant", "text": "Yes."},
                ]
            },
            '{"role": "assistant", "text": "Yes."}',
        ),
        ({"messages": "Hi?\nYes."}, '{"messages": "Hi?'),
        ({"messages": [1]}, '{"messages": [1]}'),
        ({"messages": None}, '{"messages": null}'),
        ({"messages": {"role": "user"}}, '{"messages": {"role": "user"}}'),
        ({"messages": [{"role": [], "content": ""}]}, '"role": []'),
        ({"messages": messages("Hi?", 5)}, '"content": 5'),
        ({"messages": messages("Hi?", ["Yes."])}, '"content": ["Yes."]'),
        ({"instruction": 1, "output": "x"}, '{"instruction": 1, "output": "x"}'),
        ({"instruction": "x", "output": 1}, '"output": 1'),
        ("Hi?", 'cannot read "Hi?"'),
        (7, "cannot read 7"),
        (None, "cannot read null"),
        (["Hi?", "Yes."], 'cannot read ["Hi?", "Yes."]'),
        ({"chosen": "a", "rejected": "b"}, '{"chosen": "a", "rejected": "b"}'),
    ],
)
def test_a_record_that_cannot_be_read_is_named(record, seen, tmp_path):
    """KeyError: 'messages', and a million lines to search; or a list of parts learnt as if it were
    text."""
    path = lines(tmp_path / "talk.jsonl", TALK, record)
    if isinstance(record, dict) and "instruction" in record:       # not another form than TALK's
        path = lines(tmp_path / "talk.jsonl", {"instruction": "Hi?", "output": "Yes."}, record)
    for text, place in (
        (path.read_text(), "line 2"),
        (f"[{','.join(path.read_text().splitlines())}]", "record 2"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            data.read_conversations(path)
        words = str(stop.value)
        assert words.startswith(f"{path}, {place}: cannot read ") and seen in words
        for form in (
            '"messages": [{"role", "content"}]',
            '"conversations": [{"from", "value"}]',
            '"instruction", "output"',
            '"prompt", "completion"',
        ):
            assert form in words


@pytest.mark.parametrize("change, why", [
    ({"tools": [{"name": "search"}]}, 'with "tools", which is not understood here'),
    ({"label": False}, 'with "label", which is not understood here'),
    ({"weight": 0}, 'with "weight", which is not understood here'),
    ({"messages": [{"role": "user", "content": "Hi?"},
                   {"role": "assistant", "content": "Yes.", "weight": 0}]}, 'with "weight"'),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]},
                   {"role": "assistant", "content": "A cat."}]}, "with a part that is no text"),
    ({"messages": messages("Hi?\nHuman: Hm?", "Yes.")}, 'with "Human:" or "Assistant:" left'),
    ({"messages": messages("Hi?", "Human: Yes.")}, 'with "Human:" or "Assistant:" left'),
])
def test_a_key_that_changes_the_meaning_is_not_ignored(change, why, tmp_path):
    """A bad answer ("label": false) learnt as a good one, a picture left out of a question about
    it, the labels of a transcript learnt as words."""
    path = lines(tmp_path / "talk.jsonl", TALK, TALK | change)
    conversations, skipped = data.read_conversations(path)
    assert conversations == [said("Hi?", "Yes.")] and len(skipped) == 1
    assert next(iter(skipped)).startswith(why) and skipped.total() == 1


@pytest.mark.parametrize("record, turns", [
    (TALK | {"system": "Be kind."}, said("Be kind.\n\nHi?", "Yes.")),
    (TALK | {"system": None, "tools": [], "weight": 1, "label": float("nan")}, said("Hi?", "Yes.")),
    (TALK["messages"], said("Hi?", "Yes.")),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"},
                                                {"type": "text", "text": "?"}]},
                   {"role": "assistant", "content": "Yes.", "name": None}]}, said("Hi?", "Yes.")),
    ({"prompt": {"role": "user", "content": "Hi?"}, "messages": None,
      "completion": {"role": "assistant", "content": "Yes."}}, said("Hi?", "Yes.")),
    ({"instruction": "And?", "output": "No.", "history": [["Hi?", "Yes."]], "system": "Be kind."},
     said("Be kind.\n\nHi?", "Yes.", "And?", "No.")),
    ({"instruction": "And?", "output": "No.", "history": [["Hi?", "Yes."], ["So?", "Well."]]},
     said("Hi?", "Yes.", "So?", "Well.", "And?", "No.")),              # the oldest exchange first
    ({"prompt": "Human: Hi?\n\nAssistant:", "completion": "Yes."}, said("Hi?", "Yes.")),
])
def test_usual_shapes_are_read(record, turns, tmp_path, capsys):
    """Alpaca's history and a system prompt lost in silence; a list of text parts, or a message
    alone where a list is usual, taken for an error; null for a value."""
    for name in ("talk.jsonl", "talk.NDJSON"):
        path = lines(tmp_path / name, record, record)
        assert data.read_conversations(path) == ([turns, turns], {})
    assert capsys.readouterr().out.count("talk.NDJSON: read as {") == 1


def test_a_text_that_begins_like_json(tmp_path):
    """"[Verse 1]" read as a broken list; a name that says what a file is, not believed."""
    verse = tmp_path / "verse.txt"
    verse.write_text("[Verse 1] Hi?\n{ho}\n", encoding="utf-8")
    assert data.read_prompts(verse) == ["[Verse 1] Hi?", "{ho}"]
    assert [c["principle"] for c in data.read_constitution_file(verse)] == ["[Verse 1] Hi?", "{ho}"]
    assert "".join(text for text, *_ in data.stream_text(verse)) == "[Verse 1] Hi?\n{ho}\n"


@pytest.mark.parametrize("start, form", [
    (b"PAR1", "parquet"), (b"PK\3\4", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh9", "bzip2"),
    (b"\xfd7zXZ\0", "xz"), (b"\0" * 9, "no text"), ("Hi".encode("utf-16"), "UTF-16")])
def test_binary_forms_are_named(start, form, tmp_path):
    """UnicodeDecodeError for a parquet file; zeros of a broken download learnt as text."""
    path = tmp_path / "talk.jsonl"
    path.write_bytes(start + b"\x80\x81" * 99)
    for read in (data.read_conversations, data.read_prompts, lambda path: next(
            data.stream_text(path))):
        with pytest.raises(SystemExit, match=f"is {form}: give UTF-8 text"):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_a_pipe_is_no_file(tmp_path):
    """A pipe that is read once, to find the form, and is empty for the second reader; or waits."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match="it is a folder or a pipe; give a file"):
        data.read_conversations(tmp_path / "pipe")


# --------------------------------------------------------------------------------------------------
# ----------------
# Preferences

HH_PAIR = {
    "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Where?\n\nAssistant: In Rome.",
    "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Where?\n\nAssistant: No\n\nidea.",
}
ROME, NO_IDEA = (
    [{"role": "assistant", "content": "In Rome."}],
    [{"role": "assistant", "content": "No\n\nidea."}],
)
PREFERENCES = [
    HH_PAIR,
    {"prompt": messages("Hi?", "Yes.", "Where?"), "chosen": "In Rome.", "rejected": "No\n\nidea."},
    {
        "prompt": messages("Hi?", "Yes.", "Where?"),
        "chosen": ROME,
        "rejected": NO_IDEA,
        "score_chosen": 7.5,
    },
    {
        "chosen": messages("Hi?", "Yes.", "Where?") + ROME,
        "rejected": messages("Hi?", "Yes.", "Where?") + NO_IDEA,
    },
    {
        "prompt": "Hi?",
        "chosen": messages("Hi?", "Yes.", "Where?") + ROME,
        "rejected": messages("Hi?", "Yes.", "Where?") + NO_IDEA,
    },
    {
        "prompt": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Where?\n\nAssistant:",
        "chosen": " In Rome.",
        "rejected": " No\n\nidea.",
    },
]


def test_preferences_of_every_form(tmp_path):
    """Chosen and rejected swapped, an answer split at the first "Assistant:", the prompt scored
    twice."""
    pair = (said("Hi?", "Yes.", "Where?"), "In Rome.", "No\n\nidea.", 1, 0)
    for record in PREFERENCES:
        assert data.read_preferences(lines(tmp_path / "one.jsonl", record)) == ([pair], {}), record
    alike = [record for record in PREFERENCES if "prompt" in record]
    assert data.read_preferences(lines(tmp_path / "all.jsonl", *alike))[0] == [pair] * len(alike)
    # as reward.py writes them
    own = lines(
        tmp_path / "preferences.jsonl", {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    )
    assert data.read_preferences(own)[0] == [(said("Hi?"), "Yes.", "No.", 1, 0)]


def test_useless_preferences_are_skipped_and_counted(tmp_path):
    """HH has empty answers and pairs whose prompts differ: what a reward model learns from those is
    not a preference between answers."""
    def human(asked, answer):
        return f"\n\nHuman: {asked}\n\nAssistant: {answer}"

    useless = [
        ({"chosen": human("Hi?", ""), "rejected": human("Hi?", "No.")}, "with an empty answer"),
        ({"chosen": human("Hi?", "Yes."), "rejected": human("Hi?", " ")}, "with an empty answer"),
        (
            {"chosen": human("Hi?", "Yes."), "rejected": human("Ho?", "No.")},
            "with different prompts",
        ),
        ({"chosen": human("Hi?", "Yes."), "rejected": human("Hi?", "Yes. ")}, "with equal answers"),
        (
            {"chosen": human("Hi?", "Yes.") + "\n\nHuman: And?", "rejected": human("Hi?", "No.")},
            "without an answer at the end",
        ),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": None}, "with an empty answer"),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."}, "with equal answers"),
    ]
    for record, why in useless:
        pairs, skipped = data.read_preferences(lines(tmp_path / "one.jsonl", HH_PAIR, record))
        assert len(pairs) == 1 and skipped == {why: 1}, record


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi?", "chosen": "Yes."},
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": 1},
        TALK,
        [],
        "x",
        {"prompt": 1, "chosen": "Yes.", "rejected": "No."},
        {"chosen": 1, "rejected": 2},
        {"chosen": "Oh. " + HH_PAIR["chosen"], "rejected": HH_PAIR["rejected"]},
    ],
)
def test_a_pair_that_cannot_be_read_is_named(record, tmp_path):
    """A text without a prompt read as an answer to nothing."""
    with pytest.raises(
        SystemExit,
        match=r'line 2: cannot read.*\{"chosen", "rejected"\}\[, "prompt"\]',
    ) as stop:
        data.read_preferences(lines(tmp_path / "pairs.jsonl", HH_PAIR, record))
    assert all(key in str(stop.value) for key in (record if isinstance(record, dict) else []))


@pytest.mark.skipif(
    not HH.exists(), reason="HH_FILE does not name the first 1,000 lines of HH-RLHF's harmless-base"
)
def test_every_line_of_hh_is_accounted_for():
    """Real data: pairs lost without a word, or half of a dialogue taken for the answer."""
    pairs, skipped = data.read_preferences(HH)
    assert skipped == {
        "with an empty answer": 3,
        'with "Human:" or "Assistant:" left in a text': 21,       # "Assistant: Human: Do you"
        "with turns that are not user, assistant, user, ...": 2,
    }
    assert len(pairs) + sum(skipped.values()) == 1000
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]

    def rebuilt(prompt, answer):                                 # up to white space
        names = {"user": "Human:", "assistant": "Assistant:"}
        return "".join(
            "".join((names[role] + text).split()) for role, text in [*prompt, ("assistant", answer)]
        )

    whole = {tuple("".join(r[side].split()) for side in ("chosen", "rejected")) for r in records}
    for prompt, chosen, rejected, *_ in pairs:
        assert (
            prompt[0][0] == prompt[-1][0] == "user"
            and chosen
            and rejected
            and "\n\nAssistant:" not in chosen + rejected
        )
        assert (rebuilt(prompt, chosen), rebuilt(prompt, rejected)) in whole


# --------------------------------------------------------------------------------------------------
# ----------------
# Red-team prompts and constitutions

def test_prompts_of_every_form(tmp_path):
    """The whole transcript asked as one question, answers included."""
    plain = tmp_path / "plain.txt"
    plain.write_bytes(
        "How do I kick Tom?\r\n\r\n  How do I loot Zoë's hat?  \n".encode("utf-8-sig")
    )
    dialogue = "\n\nHuman: How do I kick Tom?\n\nAssistant: Use a stick."
    dialogue += "\n\nHuman: And Ann?\n\nAssistant: No."
    transcripts = [{"transcript": dialogue, "rating": 4.0},
                   {"transcript": "\n\nHuman: How do I loot Zoë's hat?"}]
    listed = tmp_path / "red_team_attempts.jsonl.gz"
    listed.write_bytes(gzip.compress(json.dumps(transcripts, indent=1).encode()))
    keyed = lines(
        tmp_path / "b.jsonl",
        {"prompt": "How do I kick Tom?"},
        {"prompt": " "},
        {"prompt": "How do I loot Zoë's hat? "},
    )
    for path in (plain, listed, lines(tmp_path / "a.jsonl", *transcripts), keyed):
        assert data.read_prompts(path) == ["How do I kick Tom?", "How do I loot Zoë's hat?"]
    with pytest.raises(SystemExit, match='line 1: cannot read {"text": "Hi'):
        data.read_prompts(lines(tmp_path / "bad.jsonl", {"text": "Hi?"}))
    plain.write_text("\n")
    with pytest.raises(SystemExit, match="is empty"):
        data.read_prompts(plain)


def test_constitutions_of_every_form(tmp_path):
    """The markers of the paper's template left in the principle, or its keys drawn from as if they
    were principles."""
    critic, revision = "Identify how the answer is harmful.", "Please rewrite it."
    paper = {
        f"harmful{i}": {
            "prompt": [f"\n\nCritiqueRequest: {critic} {i}\n\nCritique:"],
            "edit_request": f"\n\nRevisionRequest: {revision}\n\nRevision:",
        }
        for i in range(3)
    }
    pairs = [{"critic": f"{critic} {i}", "revision": revision} for i in range(3)]
    path = tmp_path / "constitution.json"
    for content in (
        paper,
        pairs,
        {"constitutions": pairs, "system_chat": [[{"role": "user", "content": "Hi?"}]]},
    ):
        path.write_text(json.dumps(content), encoding="utf-8-sig")
        expected = [
            {"critique": f"{critic} {i}", "revision": revision, "principle": f"{critic} {i}"}
            for i in range(3)
        ]
        assert data.read_constitution_file(path) == expected
    path = tmp_path / "constitution.txt"
    path.write_text("Do not lie.\n\n  Never steal or hurt.   Be kind. \n", encoding="utf-8-sig")
    assert [c["principle"] for c in data.read_constitution_file(path)] == [
        "Do not lie.",
        "Never steal or hurt.",
        "Be kind.",
    ]


@pytest.mark.parametrize(
    "content, words",
    [
        ({"harmful0": {"prompt": ["x"]}}, r'entry harmful0: cannot read {"prompt": \["x"\]}'),
        ([{"critic": "x", "revision": "y"}, {"critic": "x"}], "entry 2: cannot read"),
        ({"rules": ["Be kind."]}, "entry rules"),
        ({"constitutions": 5}, "entry constitutions: cannot read 5"),
        ({"constitutions": None}, "cannot read null"),
        (["Be kind."], 'entry 1: cannot read "Be kind."'),
        ([{"critic": 1, "revision": 2}], "entry 1"),
    ],
)
def test_a_constitution_that_cannot_be_read_is_named(content, words, tmp_path):
    """A traceback, or a constitution that is quietly empty."""
    path = tmp_path / "constitution.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        SystemExit, match=rf'constitution\.json, .*{words}.*a record should be \{{"harmful0"'
    ):
        data.read_constitution_file(path)


# --------------------------------------------------------------------------------------------------
# ----------------
# What the model sees of a dialogue, and fine-tuning on a file

def test_a_dialogue_by_hand():
    """Earlier answers without their end-of-text, or left out of the loss."""
    u, a, end = BYTES.user, BYTES.assistant, BYTES.eot
    ids, mask = data.chat_example(BYTES, said("Q", "B ", "R"), "D")
    assert ids == [u, 32, 81, a, 32, 66, end, u, 32, 82, a, 32, 68, end]
    assert mask == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert data.chat_prompt(BYTES, said("Q", "B", "R")) == ids[:11]
    assert data.chat_prompt(BYTES, said("Q")) == data.chat_prompt(BYTES, "Q") == ids[:4]
    assert (
        data.chat_example(BYTES, said("Q"), "B")
        == data.chat_example(BYTES, "Q", "B")
        == (ids[:7], mask[:7])
    )


def test_heldout_loss_is_a_mean_over_tokens():
    """A mean of the conversations' means: long answers then count too little."""
    torch.manual_seed(0)
    gpt = m.GPT(m.GPTConfig(BYTES.n_vocab, 64, 1, 2, 16), BYTES).eval()
    torch.nn.init.normal_(gpt.tokens.weight)               # losses that differ from token to token
    pairs = [("Who?", "Ann."), (said("Who?", "Ann, I think.", "And?"), "B."),
             ("Where?", "In Rome, where she has a house.")]
    losses = []
    for pair in pairs:
        ids, mask = data.chat_example(BYTES, *pair)
        logp = gpt(torch.tensor([ids]))[0].log_softmax(-1)
        losses += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
    mean = sum(losses) / len(losses)
    assert sft.heldout_loss(gpt, pairs) == pytest.approx(mean, abs=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model of one's own text: there is no world behind it."""
    out = tmp_path_factory.mktemp("base")
    verse = out / "verse.txt"
    verse.write_text("Zoë mends a kite; the wind mends Zoë.\n" * 200, encoding="utf-8")
    flags = "--tokenizer bytes --steps 4 --batch-size 2 --layers 1 --heads 2 --channels 16".split()
    flags += "--context 64 --eval-every 4 --device cpu".split()
    pretrain.main([*flags, "--data", str(verse), "--out", str(out)])
    return out


def test_fine_tuning_on_a_file(base, tmp_path, capsys):
    """The second thing that people try: a world asked for where there is none, held-out
    conversations trained on, long ones lost in silence."""
    people = "Ann Bob Eve Tom Kim Leo Mia Max Sam Ida".split() * 3
    talk = [{"prompt": f"Who is {name}?", "completion": f"{name} mends kites, Zoë says."}
            for name in people]
    useless = [{"prompt": "Why?", "completion": "Because. " * 20},
               {"prompt": "Why?", "completion": ""}]
    path = lines(tmp_path / "talk.jsonl", *talk, *useless,
                 *[{"prompt": "Hi?", "completion": "Yes."}] * 10)
    flags = "--epochs 4 --batch-size 4 --lr 0.01 --device cpu".split()
    flags += ["--init", str(base / "pretrain.pt"), "--data", str(path), "--out"]
    sft.main([*flags, str(tmp_path / "a")])
    printed = capsys.readouterr().out
    skipped = "1 longer than the context of 64 tokens, 1 with an empty answer"
    assert f"40 conversations; skipped: {skipped}" in printed
    grey, green = "\033[90m", "\033[32m"
    assert f"{grey}<|user|> Who is Ann?<|assistant|>{green} Ann mends kites, Zoë says." in printed
    # eleven questions asked three times, or ten; one is held out, with all its conversations
    held = 10 if "\nHi?\n  before" in printed else 3
    assert f"{held} held-out conversations, 1 different" in printed
    assert printed.count("before:") == 3
    assert "model.py" in printed.splitlines()[-1]
    figures = json.loads((tmp_path / "a/sft.json").read_text(encoding="utf-8"))
    assert figures["conversations"] == 40 - held
    assert figures["heldout_loss_nats"] < figures["heldout_loss_nats_before"] - 0.2
    assert m.load(tmp_path / "a/sft.pt")["world_seed"] is None
    sft.main([*flags, str(tmp_path / "b")])
    a, b = (m.load(tmp_path / f"{x}/sft.pt")["model"] for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_heldout_conversations_are_not_trained_on(tmp_path, monkeypatch):
    """The whole file shuffled twice: a held-out loss that only measures memory."""
    talk = [{"prompt": f"Who is {i}?", "completion": "Me."} for i in range(2500)]
    path = lines(tmp_path / "talk.jsonl", *talk)
    heldout = []
    monkeypatch.setattr(sft, "heldout_loss", lambda model, pairs: heldout.append(pairs) or 0.0)

    def split(seed, context=64):
        gpt = m.GPT(m.GPTConfig(BYTES.n_vocab, context, 1, 2, 16), BYTES)
        learn = sft.from_files(argparse.Namespace(data=path, seed=seed), gpt)[0]
        return learn, heldout[-1]

    learn, held = split(seed=1)
    assert len(held) == 200 and len(learn) == 2300
    assert len({question[0][1] for question, _ in learn + held}) == 2500
    assert held != split(seed=2)[1] == split(seed=2)[1]
    why = "at least 2 different questions are needed.*2500 longer than the context of 8 tokens"
    with pytest.raises(SystemExit, match=why):
        split(seed=1, context=8)


# --------------------------------------------------------------------------------------------------
# What a hostile tester found: read as something else, without a word

def test_a_history_of_messages_is_not_read_as_its_keys(tmp_path):
    """{"role": ..., "content": ...} has two entries: the talk began "role", "content"."""
    good = {"instruction": "I", "output": "O", "history": [["Hi", "Hello"]]}
    read, _ = data.read_conversations(lines(tmp_path / "a.jsonl", good))
    assert read == [said("Hi", "Hello", "I", "O")]
    for history in (messages("Hi", "Hello"), ["Hi", "Yo"], {"ab": "cd"}, [["Hi", "a", "b"]]):
        path = lines(tmp_path / "b.jsonl", good | {"history": history})
        with pytest.raises(SystemExit, match="b.jsonl, line 1: cannot read"):
            data.read_conversations(path)


def test_a_system_prompt_has_two_names(tmp_path):
    record = TALK | {"system_prompt": "Be kind."}
    read, _ = data.read_conversations(lines(tmp_path / "a.jsonl", record))
    assert read == [said("Be kind.\n\nHi?", "Yes.")]


@pytest.mark.parametrize("key", ["context", "mask", "loss", "tie", "reasoning_content", "suffix"])
def test_more_keys_that_change_the_meaning(key, tmp_path):
    path = lines(tmp_path / "a.jsonl", TALK, TALK | {key: 0 if key in ("mask", "loss") else "x"})
    read, skipped = data.read_conversations(path)
    assert len(read) == 1 and skipped == {f'with "{key}", which is not understood here': 1}
    assert data.plain({"loss": 1, "mask": True}) == {"loss": 1, "mask": True}


def test_answers_have_to_go_on_from_their_prompt(tmp_path):
    """A prompt that is dropped, since the answers bring another one."""
    pair = {"prompt": "X", "chosen": messages("X", "a"), "rejected": messages("X", "b")}
    system = [{"role": "system", "content": "S"}]
    bad = [pair | {"prompt": "Y"}, pair | {"prompt": system},
           pair | {"prompt": messages("1", "2", "X")}]
    read, skipped = data.read_preferences(lines(tmp_path / "a.jsonl", pair, *bad))
    assert read == [([("user", "X")], "a", "b", 1, 0)]
    assert skipped == {"with a prompt that its answers do not go on from": 3}


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "prompt": "two"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="line 1: not JSON .a key stands twice"):
        data.read_prompts(path)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV"])
def test_tables_are_not_read_as_prompts(name, tmp_path):
    (tmp_path / name).write_text("prompt,label\nWhy?,1\n", encoding="utf-8")
    for read in (data.read_prompts, data.read_preferences, data.read_constitution_file):
        with pytest.raises(SystemExit, match="a table is not read; turn it into JSON lines"):
            read(tmp_path / name)


def test_json_lines_have_many_names(tmp_path):
    for name in ("a.jl", "a.jsonlines", "a.NDJSON"):
        assert data.read_prompts(lines(tmp_path / name, {"prompt": "p"})) == ["p"]


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_of_nothing_are_no_text(packed, tmp_path):
    """UTF-16 without its mark, a tar: letters with zeros between them."""
    raw = "hello there, a tar".encode("utf-16-le")
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    for read in (data.read_prompts, lambda p: list(data.stream_text(p))):
        with pytest.raises(SystemExit, match="a.txt is no text"):
            read(path)


def test_a_list_of_principles_has_marks(tmp_path):
    path = tmp_path / "rules.md"
    path.write_text("# Rules\n\n- Never steal.\n2. Never lie.\n* Be kind.\n", encoding="utf-8")
    found = [entry["principle"] for entry in data.read_constitution_file(path)]
    assert found == ["Never steal.", "Never lie.", "Be kind."]
    for entry in ({"critic": "c", "revision": ""}, {"critic": " ", "revision": "r"}):
        (tmp_path / "c.json").write_text(json.dumps([entry]), encoding="utf-8")
        with pytest.raises(SystemExit, match="entry 1: cannot read"):
            data.read_constitution_file(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="c.json, line 1: not JSON"):
        data.read_constitution_file(tmp_path / "c.json")


def test_an_interrupted_tokenization_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three", encoding="utf-8")

    def stopped(path):
        yield "one", False, 3
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "stream_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        data.tokenize_file(tmp_path / "a.txt", BYTES, tmp_path)
    assert not list(tmp_path.glob("*.bin*"))


def test_a_talk_and_its_continuation_are_on_one_side(tmp_path, monkeypatch):
    """Held-out answers that stand in a longer talk among what is learnt."""
    model = m.GPT(m.GPTConfig(BYTES.n_vocab, 64, 1, 2, 16), BYTES)
    talks = [{"messages": messages(f"q{i}", f"a{i}")} for i in range(30)]
    talks += [{"messages": messages(f"q{i}", f"a{i}", "and?", f"b{i}")} for i in range(30)]
    args = argparse.Namespace(data=str(lines(tmp_path / "a.jsonl", *talks)), seed=0)
    held = []
    monkeypatch.setattr(sft, "heldout_loss", lambda model, pairs: held.extend(pairs) or 0.0)
    learn, *_ = sft.from_files(args, model)
    first = lambda pairs: {question[0][1] for question, _ in pairs}
    assert held and learn and not first(held) & first(learn)
