"""What every test needs: the project's files on the path, and one thread (two busy OpenMP threads on shared cores run 10-20x slower)."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402  after OMP_NUM_THREADS, which torch reads once

torch.set_num_threads(1)
