"""Block sizes that were measured: one file a device kind, looked up by operation, dtype and shape.

Written by scripts/tune.py on the device itself. Without an entry the operation takes its default.
"""

import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

FOLDER = "tuned"


def file_name(device_kind: str) -> str:
    """ "TPU v5 lite" -> "tpu_v5_lite.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def tuned_sizes(
    operation: str, device_kind: str, dtype: str, bucket: str
) -> Mapping[str, int] | None:
    """Block sizes by name, in tokens, or None where nothing was measured for this shape."""
    return _read(device_kind).get(operation, {}).get(dtype, {}).get(bucket)


def write_sizes(
    path: Path, operation: str, dtype: str, bucket: str, sizes: Mapping[str, int]
) -> None:
    """Adds one entry to a file of ``tuned``, or replaces it."""
    tables = _tables(path) if path.exists() else {}
    tables.setdefault(operation, {}).setdefault(dtype, {})[bucket] = dict(sizes)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(tables, indent=2, sort_keys=True) + "\n")
    partial.replace(path)


@functools.cache
def _read(device_kind: str) -> Mapping[str, Any]:
    if not device_kind:
        return {}
    file = files("pallas_kernels").joinpath(FOLDER, file_name(device_kind))
    return _tables(file) if file.is_file() else {}


def _tables(file: Traversable) -> dict[str, Any]:
    """Reads a file of sizes by operation, dtype and shape. ``ValueError`` if it is damaged."""
    try:
        tables = json.loads(file.read_text(encoding="utf-8"))
        for dtypes in tables.values():
            for buckets in dtypes.values():
                for sizes in buckets.values():
                    if not all(type(size) is int and size > 0 for size in sizes.values()):
                        raise TypeError(sizes)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is no file of block sizes, delete it or let tune.py write it again: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return tables
