"""The tables of results, written from the figures of record: nobody copies a number by hand.

    python docs/lab/tables.py            after docs/lab/record.py has made docs/results/seedS.json

A table NAME stands between the lines <!-- NAME --> and <!-- /NAME -->; all else stays as it is. A
cell holds one figure for each world that its first line names: in README of the reported ones, 0, 1
and 2; in docs/results.md, in NAME-development, of those on which every choice was made.
"""
import argparse
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data

# what a row says | its figures: stage.name as in docs/results, and digits where they are not 3
ROWS = """
validation loss, nats a token; its floor | pretrain.val_loss pretrain.entropy_floor
right where the generator had no choice | pretrain.forced_accuracy.4
facts completed; questions continued | pretrain.fact_cloze pretrain.question_continuation
facts, greedy; sampled | sft.fact_accuracy_undemonstrated sft.fact_accuracy_undemonstrated_t1
how-to, greedy; sampled | sft.howto_accuracy_heldout sft.howto_accuracy_heldout_t1
second turns ("And Tom?"), greedy; ends by itself | sft.second_turn_accuracy sft.stops
accuracy on held-out pairs; the ceiling | reward.accuracy reward.ceiling
the same with hot answers and strays among them | reward.accuracy_hard reward.ceiling_hard
share of the way from chance to the ceiling | reward.share_of_ceiling reward.share_of_ceiling_hard
calibration error; correlation with u | reward.calibration_error reward.correlation
P(the longer of two equally good answers wins) | reward.longer_wins
gold utility, SFT; PPO (the best possible: 3) | ppo.gold_sft.2 ppo.gold_ppo.2
share of that gap closed; KL in nats | ppo.gap_closed ppo.kl.2
win rate over SFT; over greedy SFT | ppo.win_rate ppo.win_rate_over_greedy
facts correct, SFT; PPO | ppo.facts_correct_sft ppo.facts_correct_ppo
how-to correct, SFT; PPO | ppo.howto_correct_sft ppo.howto_correct_ppo"""
SKILLS = {"facts": "fact_accuracy", "how-to": "howto_accuracy", "gold utility": "utility"}
MODELS = {"sft": "SFT", "rlhf": "RLHF", "slcai": "SL-CAI", "rlcai": "RL-CAI"}
CELLS = {"g1": "G1", "g2r": "G2r", "g2": "G2", "strict": "strict", "unseen": "G3"}
CASES = {"verdict_covered": "verdicts: covered", "verdict_silent": "silent",
         "verdict_benign": "benign", "label_covered": "labels: covered", "label_benign": "benign",
         "label_reason": "of two reasons"}

def cell(records, path):
    """"ppo.kl.2" -> that figure of every record: "1.51 / 1.41 / 1.55"; "-": it has none."""
    stage, name, digits = [*path.split("."), "3"][:3]
    values = [record.get(stage, {}).get(name) for record in records]
    return " / ".join("-" if x is None else f"{x:.{digits}f}" for x in values)

def markdown(records, head, rows):
    """Column titles; rows of (title, [one or more paths a column, parted by blanks]) -> a table."""
    worlds = " / ".join(record["world"] for record in records)
    lines = [[f"world {worlds}", *head], ["---"] * (len(head) + 1)]
    for title, columns in rows:
        lines.append([title])
        for paths in columns:
            lines[-1].append("; ".join(cell(records, path) for path in paths.split()))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def tables_of(records):
    """-> {name: table}. G3 is cell g1 in the run of rlaif.py under unseen rules."""
    stages = [line.split(" | ") for line in ROWS.strip().split("\n")]
    stages, harm, skills, critic = [(title, [paths]) for title, paths in stages], [], [], []
    for model, what in itertools.product(list(MODELS)[1:], ("harm", "over_refusal", "reason")):
        paths = [f"rlaif.{what}_{model}_{c}" for c in list(CELLS)[:-1]]
        paths.append(f"rlaif_unseen.{what}_{model}_g1")
        harm.append((f"{MODELS[model]}, {what.replace('_', '-')}", paths))
    for what, name in SKILLS.items():
        skills.append((what, [f"rlaif.{name}_{model}" for model in MODELS]))
    for c, title in CELLS.items():
        critic.append((title, [f"rlaif.{case}_{c}" for case in CASES]))
    rounds = [("harm", [f"rlaif.harm_round_{k}" for k in "01234"])]
    return {"stages": markdown(records, ["figure"], stages),
            "harm": markdown(records, CELLS.values(), harm),
            "skills": markdown(records, MODELS.values(), skills),
            "rounds": markdown(records, ["round " + k for k in "01234"], rounds),
            "critic": markdown(records, CASES.values(), critic)}

def main(argv=None):
    p = argparse.ArgumentParser(description="Write the tables of results from the record.")
    p.add_argument("--project", default=str(ROOT), help="the folder of README.md and docs")
    args = p.parse_args(argv)
    pages = ("README.md", "", (0, 1, 2)), ("docs/results.md", "-development", (100, 101, 102))
    for page, suffix, worlds in pages:
        page, records = Path(args.project, page), []
        text = data.read_text(page)
        for world in worlds:
            path = Path(args.project, "docs", "results", f"seed{world}.json")
            if path.exists() or not suffix:                # all of those that are reported
                records.append(data.parse_json(path, data.read_text(path)) | {"world": str(world)})
        for name, table in tables_of(records).items():
            parts = re.split(rf"(<!-- /?{name + suffix} -->)", text)   # ..., mark, old, mark, ...
            if len(parts) != 5:
                raise SystemExit(f"{page} has no <!-- {name + suffix} --> and its end")
            parts[2] = f"\n\n{table}\n\n"
            text = "".join(parts)
        page.write_text(text, encoding="utf-8", newline="\n")

if __name__ == "__main__":
    main()
