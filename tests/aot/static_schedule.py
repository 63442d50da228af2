"""Instruction bundles that the TPU compiler makes of the attention kernel, without a TPU.

    python -m tests.aot.static_schedule            prints a table
    python -m tests.aot.static_schedule --write    and keeps it under benchmarks/

A bundle is at least one cycle of the core; waits for memory come on top. So it is no time, but a
change of the kernel that makes it slower to compute shows here, on any machine.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_attention_bundles.json"
TARGETS = ("v5e-1", "v6e-1", "v5p-8")
# Query heads, kv heads, head dim, dtype of the pages; 128 rows a chunk tile, pages of 128 tokens.
SHAPES = {
    "llama-3-8b": (32, 8, 128, "bfloat16"),
    "llama-3-8b, a chip of 8": (4, 1, 128, "bfloat16"),
    "llama-3-8b, int8 pages": (32, 8, 128, "int8"),
    "smollm2-135m": (9, 3, 64, "bfloat16"),
}
ONE_PASS = "the loop that has most products: once a block for decodes, a head for chunks"


def main() -> None:
    """Measures every target and shape."""
    table = {
        target: {name: schedule(target, *shape) for name, shape in SHAPES.items()}
        for target in TARGETS
    }
    print(json.dumps(table, indent=2))
    if "--write" in sys.argv[1:]:
        import jax

        about = {"jax": jax.__version__, "busiest": ONE_PASS}
        DATA.write_text(json.dumps({"about": about, "bundles": table}, indent=2) + "\n")


def schedule(
    target: str, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str
) -> dict[str, dict[str, int]]:
    """Bundles of the decode and the chunk kernel: of all, and of the busiest region.

    In a process of its own: the compiler reads what to write down when it is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"{dump} --xla_jf_dump_llo_pass_label_regex=final.*"
        }
        shape = json.dumps([target, num_heads, num_kv_heads, head_dim, dtype])
        command = [sys.executable, "-m", "tests.aot.attention_program", shape]
        root = Path(__file__).resolve().parents[2]
        ended = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=300
        )
        if ended.returncode:
            raise RuntimeError(ended.stderr[-2000:])
        kernels = {"decode": "ragged_paged_attention_1", "chunk": "ragged_paged_attention_128"}
        return {kind: count_bundles(Path(folder), name) for kind, name in kernels.items()}


def count_bundles(folder: Path, kernel: str) -> dict[str, int]:
    """Counts the bundles of a kernel, given by name, in what the compiler wrote down."""
    (slots,) = folder.glob(f"*-{kernel}.*final_hlo-static-per-bundle-utilization.txt")
    prefix = slots.name.split(f"{kernel}.")[0]
    (bundles,) = (
        path
        for path in folder.glob(f"{prefix}{kernel}.*final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    lines = slots.read_text().splitlines()
    products = [name.strip() for name in lines[1].split(",")].index("MXU")
    used = [[int(number) for number in line.split()] for line in lines[4:] if line.strip()]
    regions = _regions(bundles.read_text().splitlines())
    busiest = max(regions, key=lambda region: sum(row[products] for row in used[slice(*region)]))
    return {"all": len(used), "busiest": busiest[1] - busiest[0]}


def _regions(lines: list[str]) -> list[tuple[int, int]]:
    """First bundle and the one behind the last, of stretches without a label or region between."""
    starts, count = [0], 0
    for line in lines:
        bundle: Any = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2}[: ]*)*)\s*:?\s*[> ]*\{", line)
        if bundle is None:
            continue
        if count and (bundle[1].strip() or "Start region" in line):
            starts.append(count)
        count += 1
    return list(zip(starts, [*starts[1:], count], strict=True))


if __name__ == "__main__":
    main()
