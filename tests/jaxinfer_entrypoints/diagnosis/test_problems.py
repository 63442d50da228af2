"""Problems in the eyes of scripts/doctor.py, and the page that it prints."""

import copy
import re
from typing import Any

import pytest

from jaxinfer_entrypoints import doctor
from jaxinfer_entrypoints.diagnosis.problems import find_problems
from tests.jaxinfer_entrypoints.doctor_report import FIT, HEALTHY


def changed(**changes: Any) -> dict[str, Any]:
    """A healthy report with ``section__key=value``."""
    report = copy.deepcopy(HEALTHY)
    for name, value in changes.items():
        *path, last = name.split("__")
        part = report
        for key in path:
            part = part[key]
        part[last] = value
    return report


def test_a_healthy_machine() -> None:
    assert list(find_problems(HEALTHY)) == []
    page = doctor.page(HEALTHY | {"problems": []})
    assert page.endswith("no problems found")
    assert "jaxinfer      0.1.0, commit abc\n" in page
    assert "devices       1 x cpu (cpu), memory of the host, free 8.0 GiB\n" in page
    assert "arithmetic, not a measurement" in page
    assert re.search(r"\nm +float32 +1 +1\.0 GiB +1\.0 KiB +4096 +8192\n", page)


@pytest.mark.parametrize(
    ("changes", "what", "prevents"),
    [
        ({"versions__python": "3.13.0"}, "this is Python 3.13.0", True),
        ({"packages__flax": None}, "not installed: flax", True),
        ({"packages__jaxlib": "0.11.1"}, "jax is 0.11.2 and jaxlib 0.11.1", False),
        ({"nvidia_smi": ["NVIDIA T4, 550, 1, 2"]}, "nvidia-smi shows 1 GPU(s)", False),
        ({"environment__NPROC": "16"}, "NPROC is 16", False),
        ({"caches__programs__writable": False}, "/c cannot be written: every start", False),
        ({"caches__models__writable": False}, "/c cannot be written", False),
        (
            {"caches__models__writable": False, "models__m": False},
            "/c cannot be written, and has no m",
            True,
        ),
        ({"models__m": False}, "not in the cache: m", False),
        ({"caches__models__disk_free_bytes": 5 << 20}, "has 5 MiB free", False),
        ({"port__state": "taken", "port__detail": "why"}, "cannot be listened on (why)", True),
        (
            {"fits": [FIT | {"kv_tokens": None, "refusal": "too small"}]},
            "the default model does not fit (too small)",
            True,
        ),
    ],
)
def test_problems(changes: dict[str, Any], what: str, prevents: bool) -> None:
    report = changed(**changes)
    (problem,) = find_problems(report)
    assert what in problem["what"]
    assert problem["remedy"]
    assert problem["prevents_serving"] is prevents
    page = doctor.page(report | {"problems": [problem]})
    kind = "PREVENTS SERVING" if prevents else "note"
    assert page.splitlines()[-1].startswith(f"{kind}: ")
