"""Instruction bundles that the TPU compiler makes of products with integers, without a TPU.

    python -m tests.aot.matmul_schedule            prints a table
    python -m tests.aot.matmul_schedule --write    and keeps it under benchmarks/

See static_schedule.py for what a bundle is. Beside the bundles of a turn of the loop over
weights stand the cycles in which the memory's peak bandwidth brings what the turn takes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxinfer_entrypoints.machine.tpu_targets import TpuGeneration, parse_target
from tests.aot.matmul_program import FORMATS, MATRICES, ROWS, kernel_name
from tests.aot.static_schedule import count_bundles

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "benchmarks" / "tpu_matmul_bundles.json"
TARGETS = ("v5e-1", "v6e-1", "v5p-8")
# Multiplications of bfloat16 a cycle of a chip: arrays of cores times their sizes. Its clock is
# what makes the published peak of them.
PRODUCTS_PER_CYCLE = {"v5e": 4 * 128**2, "v6e": 4 * 256**2, "v5p": 2 * 4 * 128**2}
ABOUT = {
    "all": "bundles of the kernel",
    "busiest": "of the region with most products: a turn of the loop over a block of weights",
    "reading": "cycles to bring what a turn takes, at a core's part of the memory's peak bandwidth",
}


def main() -> None:
    """Measures every target."""
    table = {target: schedule(target) for target in TARGETS}
    print(json.dumps(table, indent=2))
    if "--write" in sys.argv[1:]:
        import jax

        about = {"jax": jax.__version__, **ABOUT}
        DATA.write_text(json.dumps({"about": about, "bundles": table}, indent=2) + "\n")


def bytes_per_cycle(chip: TpuGeneration) -> float:
    """Returns the bytes that a core can read from the chip's memory in a cycle."""
    cycles_per_second = chip.bf16_flops_per_second / 2 / PRODUCTS_PER_CYCLE[chip.name]
    return chip.hbm_bytes_per_second / chip.cores_per_chip / cycles_per_second


def schedule(target: str) -> dict[str, dict[str, dict[str, int]]]:
    """Bundles by format and shape, from one process: all that is written is told by its name."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"{dump} --xla_jf_dump_llo_pass_label_regex=final.*"
        }
        command = [sys.executable, "-m", "tests.aot.matmul_program", target]
        ended = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        if ended.returncode:
            raise RuntimeError(ended.stderr[-2000:])
        turns = json.loads(ended.stdout.splitlines()[-1])
        speed = bytes_per_cycle(parse_target(target).generation)

        def count(kernel: str) -> dict[str, int]:
            return count_bundles(Path(folder), kernel) | {"reading": round(turns[kernel] / speed)}

        return {
            name: {
                f"{matrix}, {rows} rows": count(kernel_name(name, rows, *shape))
                for matrix, shape in MATRICES.items()
                for rows in ROWS
            }
            for name in FORMATS
        }


if __name__ == "__main__":
    main()
