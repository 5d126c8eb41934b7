"""The tables of results, written from the figures of record: nobody copies a number by hand.

    python docs/lab/tables.py            after docs/lab/record.py has made docs/results/seedS.json

A table stands between <!-- NAME --> and <!-- /NAME --> in README or on a page of docs; all else
there stays as it is. NAME-development is that of the worlds on which every choice was made."""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data

# all stages: what a row says | its figures: stage.name, and digits where they are not 3
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
three = lambda what: " ".join(f"rlaif.{what}_rlcai_{c}" for c in ("g1", "g2r", "g2"))  # cells
DOOR = {"loss, nats a token; its floor": "pretrain.val_loss pretrain.entropy_floor",    # README
        "facts right: SFT; PPO": "ppo.facts_correct_sft ppo.facts_correct_ppo",
        "reward model's accuracy; the ceiling": "reward.accuracy reward.ceiling",
        "gold utility: SFT; PPO (best possible: 3)": "ppo.gold_sft.2 ppo.gold_ppo.2",
        "harm after Stage 5: G1; G2r; G2": three("harm"), "over-refusal": three("over_refusal"),
        "refused for the right reason": three("reason")}
MODELS = {"sft": "SFT", "rlhf": "RLHF", "slcai": "SL-CAI", "rlcai": "RL-CAI"}
CELLS = {"g1": "G1", "g2r": "G2r", "g2": "G2", "strict": "strict", "unseen": "G3"}
CASES = {"verdict_covered": "verdicts: covered", "verdict_silent": "silent",
         "verdict_benign": "benign", "label_covered": "labels: covered", "label_benign": "benign",
         "label_reason": "of two reasons"}
TABLES = {    # name -> columns {what stands for {} in a figure's name: title}, rows {title: name}
    "door": ({}, DOOR), "stages": ({"": "figure"}, dict(re.findall(r"(.+) \| (.+)", ROWS))),
    "harm": (CELLS, {f"{MODELS[m]}, {what.replace('_', '-')}": f"rlaif.{what}_{m}_{{}}"
                     for m in list(MODELS)[1:] for what in ("harm", "over_refusal", "reason")}),
    "skills": (MODELS, {"facts": "rlaif.fact_accuracy_{}", "how-to": "rlaif.howto_accuracy_{}",
                        "gold utility": "rlaif.utility_{}"}),
    "rounds": ({k: f"round {k}" for k in "01234"}, {"harm": "rlaif.harm_round_{}"}),
    "critic": (CASES, {title: f"rlaif.{{}}_{c}" for c, title in CELLS.items()})}

def figures(records, paths):
    """"ppo.kl.2 ..." -> these of every record: "1.51 / 1.41; ..."; "-": a record has none."""
    texts = []
    for path in paths.split():                             # figures that share a place in the table
        stage, name, digits = [*path.split("."), "3"][:3]  # "ppo.kl" -> ppo, kl, 3
        values = [record.get(stage, {}).get(name) for record in records]
        texts.append(" / ".join("-" if x is None else f"{x:.{digits}f}" for x in values))
    return "; ".join(texts)

def markdown(records, columns, rows):
    """The table, its titles first. Without columns each world has one; else they share them."""
    worlds = [record["world"] for record in records]
    titles = [f"world {' / '.join(worlds)}", *columns.values()] if columns else ["world", *worlds]
    lines = [titles, ["---"] * len(titles)]                # dashes: Markdown's line below a head
    for title, name in rows.items():                       # name: "rlaif.harm_slcai_{}"
        shared = [figures(records, name.format(key)) for key in columns]
        lines.append([title, *(shared or [figures([record], name) for record in records])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def main(argv=None):
    p = argparse.ArgumentParser(description="Write the tables of results from the record.")
    p.add_argument("--project", default=str(ROOT), help="the folder of README.md and docs")
    project, tables = Path(p.parse_args(argv).project), {} # name -> its text
    for suffix, worlds in (("", (0, 1, 2)), ("-development", (100, 101, 102))):
        records = []
        for world in worlds:
            path = project / "docs" / "results" / f"seed{world}.json"
            if path.exists() or not suffix:                # all of those that are reported
                records.append(data.parse_json(path, data.read_text(path)) | {"world": str(world)})
                # G3 is G1 in the run of rlaif.py under unseen rules
                for name, x in records[-1].get("rlaif_unseen", {}).items():
                    records[-1]["rlaif"].setdefault(name.replace("_g1", "_unseen"), x)
        tables |= {name + suffix: markdown(records, *TABLES[name]) for name in TABLES}
    del tables["door-development"]                         # README stays small
    pages = {p: data.read_text(p) for p in (project / "README.md", *project.glob("docs/*.md"))}
    for name, table in tables.items():
        place = f"(?s)(<!-- {name} -->).*?(<!-- /{name} -->)"          # s: a dot is any letter
        found = [path for path, text in pages.items() if re.search(place, text)]
        if len(found) != 1:
            raise SystemExit(f"<!-- {name} --> and its end stand on {len(found)} pages, not on one")
        pages[found[0]] = re.sub(place, rf"\1\n\n{table}\n\n\2", pages[found[0]])
    for path, text in pages.items():                       # nothing is written before all is right
        path.write_text(text, encoding="utf-8", newline="\n")

if __name__ == "__main__":
    main()
