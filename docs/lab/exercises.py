"""The answers to the exercises of chapters 1 to 4, measured, and written where they are asked.

    python docs/lab/exercises.py --inputs out        runs them in out/exercises, from out's models
    python docs/lab/exercises.py --write             writes docs/results/exercises.json to the pages

An exercise that has its figures is not run again. In a page they stand after <!-- measured NAME -->
and up to <!-- /measured -->; what one learns from them is written beside by hand.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data
from model import writable

# name -> the command, as it stands in the chapter; or a stage, whose figures are in --inputs
EXERCISES = {
    "steps-500": "pretrain.py --steps 500", "adam-alone": "pretrain.py --steps 500 --muon-lr 0",
    "no-questions": "pretrain.py --steps 500 --without questions",
    "no-decay": "pretrain.py --steps 500 --decay 0",
    "sft": "sft", "few-demonstrations": "sft.py --demonstrations 300",
    "fast-sft": "sft.py --lr 5e-3", "one-epoch": "sft.py --epochs 1",
    "reward": "reward", "few-prompts": "reward.py --prompts 1000",
    "three-epochs": "reward.py --prompts 1000 --epochs 3", "one-vote": "reward.py --votes 1",
    "ppo": "ppo", "gold": "docs/lab/own_reward.py gold", "read-once": "ppo.py --epochs 1",
    "fast-ppo": "ppo.py --lr 1e-3"}
# stage -> what is told of it
TEXTS = {
    "pretrain": "Loss {val_loss:.3f} (floor {entropy_floor:.3f}), right where forced "
                "{forced_accuracy:.3f}, facts completed {fact_cloze:.2f}, questions continued with "
                "a question {question_continuation:.2f}.",
    "sft": "Facts about people in no demonstration: {fact_accuracy_undemonstrated:.3f} greedy, "
           "{fact_accuracy_undemonstrated_t1:.3f} sampled; how-to {howto_accuracy_heldout:.3f} and "
           "{howto_accuracy_heldout_t1:.3f}; ends by itself {stops:.3f}.",
    "reward": "{pairs:,} pairs; share of the ceiling {share_of_ceiling:.3f}, calibration error "
              "{calibration_error:.3f}, correlation {correlation:.3f}.",
    "ppo": "Gold utility {gold_ppo:.2f} at KL {kl:.2f}; facts {facts_correct_ppo:.3f}, how-to "
           "{howto_correct_ppo:.3f}; win rate over SFT {win_rate:.3f}."}
# what a stage starts from, in the folder of --inputs
STARTS = {"pretrain": {}, "sft": {"--init": "pretrain.pt"}, "reward": {"--init": "sft.pt"},
          "ppo": {"--init": "sft.pt", "--reward-model": "reward.pt"}}

def stage_of(command):
    """Whose figures it writes."""
    return Path(command.split()[0]).stem.replace("own_reward", "ppo")

def measure(command, inputs, folder):
    """Runs an exercise, unless its figures are there -> the figures."""
    words, stage = command.split(), stage_of(command)
    figures = (folder if ".py" in command else inputs) / f"{stage}.json"
    if not figures.exists():
        starts = STARTS[stage] if "gold" not in words else {"--init": "sft.pt"}
        for flag, file in starts.items():
            words = [*words, flag, str(inputs / file)]
        command = [sys.executable, str(ROOT / words[0]), *words[1:], "--out", str(folder)]
        print(*command, flush=True)
        if subprocess.run(command).returncode or not figures.exists():
            raise SystemExit(f"{' '.join(command)} failed: see above")
    return data.parse_json(figures, data.read_text(figures))

def write(project):
    """Puts the sentence of each exercise into the page that asks for it."""
    path = project / "docs" / "results" / "exercises.json"
    results = data.parse_json(path, data.read_text(path))
    for page in sorted((project / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name, command in EXERCISES.items():
            told = TEXTS[stage_of(command)].format(**results[name])
            text = re.sub(rf"(?s)(<!-- measured {name} -->).*?(?=<!-- /measured -->)",
                          lambda mark, told=told: mark[1] + told, text)
        page.write_text(text, encoding="utf-8", newline="\n")

def main(argv=None):
    p = argparse.ArgumentParser(description="Measure the exercises, and write their answers.")
    p.add_argument("--inputs", default="out", help="the models that they start from")
    p.add_argument("--out", type=writable, default="out/exercises", help="folder of the runs")
    p.add_argument("--write", action="store_true", help="only write what was measured")
    args = p.parse_args(argv)
    if not args.write:
        results = {}
        for name, command in EXERCISES.items():
            found = measure(command, Path(args.inputs), Path(args.out, name))
            told = re.findall(r"{(\w+)", TEXTS[stage_of(command)])    # the figures in the sentence
            results[name] = {key: found[key] for key in told}
        data.write_results(ROOT / "docs" / "results", "exercises", figures=results)
    write(ROOT)

if __name__ == "__main__":
    main()
