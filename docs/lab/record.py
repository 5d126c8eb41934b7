"""The figures of record: all five stages in one world, and what they wrote, as one file.

    python docs/lab/record.py --world-seed 0          writes docs/results/seed0.json, and its curves

Runs the stages by default (Stage 5 with 500 requests a cell, and once more under unseen rules) in
OUT/seedS; a stage whose figures are there already is not run again, and one that was interrupted
goes on where it was. The file holds each stage's figures under the names of out/STAGE.json, and how
they were made: commit, versions, threads, and the seconds of each stage.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch

import data
from model import natural, pick_device, writable

UNSEEN = "rlaif_unseen"                        # rlaif.py under rules that no document shows: G3
QUESTIONS = {"ppo": "1000", "rlaif": "500"}    # more than by default: narrower intervals
STAGES = ("pretrain", "sft", "reward", "ppo", "rlaif", UNSEEN)

def command_of(stage, seed, out):
    """The command of a stage -> (list of words, the file that holds its figures)."""
    script, folder = stage.removesuffix("_unseen"), out / "unseen" if stage == UNSEEN else out
    words = [sys.executable, str(ROOT / f"{script}.py"), "--out", str(folder)]
    if stage == "pretrain":
        words += ["--world-seed", str(seed)]
    if script in QUESTIONS:
        words += ["--eval-prompts", QUESTIONS[script]]
    if stage == UNSEEN:
        words += ["--constitution", "unseen", "--inputs", str(out)]
    interrupted = [folder / f"{script}.resume.pt", folder / f"{script}.progress"]
    if any(path.exists() for path in interrupted):
        words.append("--resume")
    return words, folder / f"{script}.json"

def git(*words):
    """What git answers; nothing where the project is no clone."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, encoding="utf-8")
    return done.stdout.strip()

def how_made():
    """Commit, versions, threads -> dict."""
    changed = " and changes" * bool(git("status", "--porcelain", "--", "*.py"))
    return {"commit": git("rev-parse", "--short", "HEAD") + changed, "torch": torch.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "cores": os.cpu_count()}

def main(argv=None):
    p = argparse.ArgumentParser(description="Run all stages in one world, and keep their figures.")
    p.add_argument("--world-seed", type=natural, default=0, help="which village")
    p.add_argument("--out", type=writable, default="out/record", help="of the runs, OUT/seedS")
    results = str(ROOT / "docs" / "results")
    p.add_argument("--results", type=writable, default=results, help="for the record")
    args = p.parse_args(argv)
    out, results = Path(args.out, f"seed{args.world_seed}"), Path(args.results)
    pick_device("cpu")                                     # a console that cannot show a path
    try:
        writable(out)                                      # OUT/seedS may be a file, too
    except argparse.ArgumentTypeError as error:
        p.error(str(error))
    made = out / "made.json"                               # kept from run to run, like the figures
    record = data.parse_json(made, data.read_text(made)) if made.exists() else {"seconds": {}}
    if not isinstance(record, dict) or not isinstance(record.get("seconds"), dict):
        raise SystemExit(f"{made} is not as this script writes it: remove it")
    for stage in STAGES:
        words, figures = command_of(stage, args.world_seed, out)
        if not figures.exists():
            start = time.monotonic()
            if subprocess.run(words, cwd=ROOT).returncode:
                raise SystemExit(f"{stage} failed: mend what it says, and run this again")
            record |= how_made()
            record["seconds"][stage] = round(time.monotonic() - start)
            made.write_text(json.dumps(record, indent=1), encoding="utf-8")
    whole = {"made": record}
    for stage in STAGES:
        _, figures = command_of(stage, args.world_seed, out)
        whole[stage] = data.parse_json(figures, data.read_text(figures))
        curve = figures.with_suffix(".csv")
        if curve.exists():
            shutil.copy(curve, results / f"seed{args.world_seed}_{stage}.csv")
    path = results / f"seed{args.world_seed}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")

if __name__ == "__main__":
    main()
