"""A pytest plugin that ends a run with one line on what was left out: nobody has to find out.

Tests carry ``pytest.mark.thorough(subject)``, those of whole programs and of long searches; what
``-m`` leaves out of them is counted by subject, in the processes of pytest-xdist too. Folders of
``OTHERS``, which need another environment or machine, are named where they are not asked for.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

OTHERS = {"tests/aot": "compilers for TPU and GPU", "tests/gpu": "a GPU"}


class NotRun:
    """Counts of the tests that a run left out, by subject."""

    def __init__(self) -> None:
        self.subjects: Counter[str] = Counter()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark = item.get_closest_marker("thorough")
            if mark is not None:
                self.subjects[mark.args[0]] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Only in a process of xdist: every one of them has left out the same tests.
        output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["not_run"] = dict(self.subjects)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        found = getattr(node, "workeroutput", {}).get("not_run")
        if found:
            self.subjects = Counter(found)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and self.subjects:
            others = [folder for folder in OTHERS if (config.rootpath / folder).is_dir()]
            reporter.write_line(self.line(others))

    def line(self, others: Sequence[str]) -> str:
        """The one line."""
        count = sum(self.subjects.values())
        subjects = ", ".join(sorted(self.subjects))
        line = f"not run: {count} thorough tests ({subjects}); make test-all runs them"
        if not others:
            return line
        return f"{line}, and {', '.join(f'{folder} ({OTHERS[folder]})' for folder in others)}"
