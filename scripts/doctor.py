"""Prints one page about this machine for a bug report: ``python scripts/doctor.py --help``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the packages lie
from jaxinfer_entrypoints.doctor import main

main()
