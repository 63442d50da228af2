"""Block sizes that were measured: one file a device kind, looked up by operation, dtype and shape.

Written by scripts/tune.py on the device itself. Without an entry the operation takes its default.
"""

import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files
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
    tables = json.loads(path.read_text()) if path.exists() else {}
    tables.setdefault(operation, {}).setdefault(dtype, {})[bucket] = dict(sizes)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(tables, indent=2, sort_keys=True) + "\n")
    partial.replace(path)


@functools.cache
def _read(device_kind: str) -> Mapping[str, Any]:
    if not device_kind:
        return {}
    file = files("pallas_kernels").joinpath(FOLDER, file_name(device_kind))
    return json.loads(file.read_text()) if file.is_file() else {}
