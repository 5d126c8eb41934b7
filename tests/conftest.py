"""Puts the repository on the path, so that `import model` finds model.py, and keeps the sums the
same on every machine."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
