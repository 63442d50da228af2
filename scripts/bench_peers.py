"""Measures this engine beside others: ``python scripts/bench_peers.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.benchmarks.peers.comparison import main

main()
