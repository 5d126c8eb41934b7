# %% [markdown]
# # All five stages on one page
#
# How is a chat model made? This page runs every stage of the project once, small enough for two
# CPU cores and a few minutes: pre-training, supervised fine-tuning, a reward model, PPO, and
# Constitutional AI. It calls the project's own scripts; to read how they work, open them beside it.
# (Made by `python docs/lab/notebook.py` from docs/tour.py; do not edit the notebook itself.)

# %%
import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"                           # no bars: they would fill the page
places = [Path.cwd(), *Path.cwd().parents]
root = next(place for place in places if (place / "pretrain.py").exists())
sys.path[:0] = [str(root), str(root / "docs" / "lab")]
os.chdir(root)                                             # so that names of files are short
import matplotlib.pyplot as plt

import data
import draw_answers
import draw_rounds
import draw_text
import ppo
import pretrain
import reward
import rlaif
import sft
from model import answer, load_gpt

OUT = Path("out/tour")
SIZES = {"pretrain": "--steps 1500", "sft": "--demonstrations 3000 --epochs 2",
         "reward": "--prompts 2000", "ppo": "--iterations 12 --eval-prompts 200",
         "rlaif": "--red-team 400 --helpful 800 --label-prompts 250 --iterations 10 "
                  "--eval-prompts 60"}


def run(stage, module):
    """Runs a stage's script with the sizes above."""
    module.main([*SIZES[stage].split(), "--fresh", "--out", str(OUT)])


# %% [markdown]
# ## A village
#
# There is nothing to download: `data.py` draws a village and writes documents about it. What stands
# in square brackets was the generator's choice; the rest follows from what stands before it.

# %%
world = data.World(0)
for number in range(4):
    kind, text, logp = data.write_document(world, "validation", number)
    print(f"{kind}: {text}\n")

# %% [markdown]
# ## 1. Pre-training: an autocomplete
#
# The model predicts every next token of such documents. The loss cannot fall below the *floor*, the
# entropy of the generator. Asked a question, the model goes on with more questions.

# %%
run("pretrain", pretrain)

# %%
base = load_gpt(OUT / "pretrain.pt")
draw_text.draw_pretraining(plt, base, None, 3)
plt.show()

# %% [markdown]
# ## 2. Supervised fine-tuning: the shape of an assistant
#
# The same loss on conversations, counted on the assistant's words alone (green).

# %%
run("sft", sft)

# %%
assistant, question = load_gpt(OUT / "sft.pt"), "Where does Ann live?"
models = {"before SFT": base, "after SFT": assistant}
draw_text.draw_sft(plt, models, question, world.answer(question)[1])
plt.show()

# %% [markdown]
# ## 3. A reward model: what people prefer
#
# Simulated annotators, who like correct and polite answers without needless sentences, compare
# answers two at a time. A network learns to score answers the way they rank them.

# %%
run("reward", reward)

# %%
judge, question = reward.load_reward(OUT / "reward.pt", assistant), "How do I hug Tom?"
draw_answers.draw_reward(plt, judge, question, [world.answer(question)[1], "Tom lives in Oslo."])
plt.show()

# %% [markdown]
# ## 4. PPO: better by trial and error
#
# The model answers, the reward model scores, and what went better than expected becomes more
# likely; each nat of distance from the assistant of stage 2 costs a little.

# %%
run("ppo", ppo)

# %%
helpful = load_gpt(OUT / "ppo.pt")
draw_answers.draw_ppo(plt, helpful, assistant, judge, question, 0.1, 0)
plt.show()

# %% [markdown]
# ## 5. Constitutional AI: harmless without a human harm label
#
# The helpful model does whatever it is asked. Now it criticises its own answers to harmful requests
# by written principles, revises them, and learns the revisions; then it labels pairs of answers,
# and PPO learns from these labels.

# %%
run("rlaif", rlaif)

# %%
draw_rounds.main(["--out", str(OUT), "--to", str(OUT)])
plt.show()

# %% [markdown]
# ## One question, five models

# %%
for asked in ("Where does Ann live?", "How do I nab Ann's hat?", "How do I hang Ann's hat?"):
    print(asked)
    for name in ("pretrain", "sft", "ppo", "slcai", "rlaif"):
        model = load_gpt(OUT / f"{name}.pt")
        said, = answer(model, [asked], 24 if name == "pretrain" else 56, 0.7,
                       bare=name == "pretrain")
        print(f"  {name:9} {said}")
