"""What all tests share."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the CPU, block by block
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
