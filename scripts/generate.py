"""Generates offline: prompts in, text or JSON lines out: ``python scripts/generate.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.generate import main

main()
