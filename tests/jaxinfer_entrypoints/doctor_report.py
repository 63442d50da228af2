"""The doctor's report of a machine with nothing wrong."""

from typing import Any

GIB = 1 << 30
FIT = {
    "model": "m",
    "dtype": "float32",
    "num_devices": 1,
    "parameter_bytes": GIB,
    "kv_token_bytes": 1024,
    "kv_tokens": 4096,
    "most_kv_tokens": 8192,
    "refusal": None,
}
CPU = {"platform": "cpu", "kind": "cpu", "memory_bytes": None, "free_bytes": 8 * GIB}
CACHE = {
    "path": "/c",
    "exists": True,
    "files": 2,
    "bytes": 3 << 20,
    "unreadable": 0,
    "writable": True,
    "disk_free_bytes": 9 * GIB,
}
HEALTHY: dict[str, Any] = {
    "versions": {
        "jaxinfer": "0.1.0",
        "commit": "abc",
        "system": "Linux",
        "python": "3.12.1",
        "executable": "python",
    },
    "packages": {"jax": "0.11.2", "jaxlib": "0.11.2"},
    "environment": {},
    "cores": {"total": 4, "usable": 2},
    "memory": {
        "total_bytes": 9 * GIB,
        "free_bytes": 8 * GIB,
        "cgroup_limit_bytes": None,
        "cgroup_free_bytes": None,
    },
    "nvidia_smi": [],
    "caches": {"programs": CACHE, "models": dict(CACHE)},
    "models": {"m": True},
    "port": {"address": "127.0.0.1:50051", "state": "free", "detail": ""},
    "devices": {"devices": [CPU]},
    "fits": [FIT],
}
