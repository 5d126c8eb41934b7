"""Puts the repository and its lab on the path, so that `import model` finds model.py and `import
export` docs/lab/export.py, and keeps the sums the same on every machine."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "lab")]
torch.set_num_threads(1)
