"""Serves a model over gRPC: ``python scripts/serve.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.serve import main

main()
