"""Measures the engine, or a running server: ``python scripts/bench.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.bench import main

main()
