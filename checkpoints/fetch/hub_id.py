"""Names of the Hugging Face hub's models on a command line."""

import re
from dataclasses import dataclass
from pathlib import Path

from checkpoints.shard_name import file_stem

_ID = re.compile(
    r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>[\w./-]{1,128}))?"
    r"(:(?P<file>[\w./-]{1,256}\.gguf))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubModel:
    """``org/name``, ``@revision`` (a branch, a tag or a commit) and ``:file.gguf``."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        """Returns what the model is called."""
        return file_stem(Path(self.file)) if self.file else self.repo.partition("/")[2]


def parse_hub_id(text: str) -> HubModel | None:
    """``text`` as ``org/name[@revision][:file.gguf]``; None where it cannot be one."""
    match = _ID.fullmatch(text)
    return HubModel(**match.groupdict()) if match else None
