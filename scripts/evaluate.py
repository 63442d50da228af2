"""Measures the perplexity of a text under a model: ``python scripts/evaluate.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.evaluate import main

main()
