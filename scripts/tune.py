"""Measures the attention kernel's block sizes on a TPU: ``python scripts/tune.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.tune import main

main()
