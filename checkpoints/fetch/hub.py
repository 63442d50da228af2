"""Models by their id on the Hugging Face hub: only the files that are needed, of one commit.

``huggingface_hub`` fetches them, goes on where it was interrupted, and keeps them in its own cache,
which other programs share. What is in the cache needs no network.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the client that it is built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from checkpoints.fetch.hub_id import HubModel
from checkpoints.shard_name import MAX_SHARDS, parse_shard_name, without_later_shards

Progress = Callable[[int, int], None]

# Files that checkpoints/hugging_face reads; weights in other formats are left where they are.
_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|chat_template\.(jinja|json)"
    r"|additional_chat_templates/tool_use\.jinja|model\.safetensors(\.index\.json)?"
    r"|model-\d+-of-\d+\.safetensors"
)
_WEIGHTS = re.compile(r"model.*\.safetensors")


def fetch(model: HubModel, progress: Progress | None = None) -> Path:
    """The folder of a model's files, or its GGUF file, in the cache of the hub's library.

    Of a split GGUF all shards are fetched, and the first is returned. ``progress(done, total)``
    counts bytes. Raises ``ValueError`` in one line: no such model, revision or file, no access, no
    network and not in the cache.
    """
    tried = [f"the cache ({constants.HF_HUB_CACHE})"]
    try:
        if not constants.HF_HUB_OFFLINE:
            tried.append(constants.ENDPOINT)
            try:
                return _fetch(model, progress)
            except (HTTPError, OSError) as error:
                if isinstance(error, HfHubHTTPError):
                    raise
                # No connection: what is in the cache is as good as on any day.
        return _cached(model)
    except GatedRepoError as error:
        raise ValueError(
            f"{model.repo} is given only to those who have agreed to its terms: do so at "
            f"{constants.ENDPOINT}/{model.repo}, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no model {model.repo} at {constants.ENDPOINT}, or it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{model.repo} has no revision {model.revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"cannot fetch {model.repo}: tried {' and '.join(tried)}. Check the network, name a "
            "mirror by HF_ENDPOINT, or give the path of a folder or a GGUF file"
        ) from error
    except (HTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot fetch {model.repo} from {constants.ENDPOINT}: {reason}"
        ) from error


def _fetch(model: HubModel, progress: Progress | None) -> Path:
    info = hub.HfApi().model_info(model.repo, revision=model.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = _wanted(model, sizes)
    total, done = sum(sizes[name] for name in names), 0
    disable_progress_bars()  # one a file; ours is of all
    paths = {}
    for name in names:
        paths[name] = Path(hub.hf_hub_download(model.repo, name, revision=info.sha))
        done += sizes[name]
        if progress:
            progress(done, total)
    first = paths[names[0] if model.file else "config.json"]
    _remember(first, model.revision or "main", info.sha or "")
    # All lie in one folder, whose name is the commit.
    return first if model.file else first.parent


def _remember(file: Path, revision: str, commit: str) -> None:
    """Notes in the cache what a branch or a tag stood for, where it is looked up without a network.

    The library does so for what it resolves itself (``refs`` of its cache's layout); here it was
    given the commit.
    """
    snapshots = next(parent for parent in file.parents if parent.name == "snapshots")
    if revision == commit or ".." in revision.split("/"):
        return
    path = snapshots.parent / "refs" / revision.strip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


def _wanted(model: HubModel, names: Iterable[str]) -> list[str]:
    if model.file:
        wanted = _with_later_shards(model, model.file)
        for file in wanted:
            if file not in names:
                raise ValueError(f"{model.repo} has no file {file!r}{_files_there(model, names)}")
        return wanted
    wanted = sorted(name for name in names if _FILES.fullmatch(name))
    if "config.json" not in wanted or not any(map(_WEIGHTS.fullmatch, wanted)):
        raise ValueError(
            f"{model.repo} has no config.json with weights in safetensors"
            f"{_files_there(model, names)}"
        )
    return wanted


def _with_later_shards(model: HubModel, file: str) -> list[str]:
    """``file``, and all others where it is the first shard of a split one."""
    shard = parse_shard_name(file)
    if shard is None:
        return [file]
    if shard.count > MAX_SHARDS:
        raise ValueError(f"{file!r}: more than the limit of {MAX_SHARDS} shards")
    if shard.number != 1:
        raise ValueError(
            f"{file!r} is shard {shard.number} of {shard.count}: give the first, "
            f"{model.repo}:{shard.first}"
        )
    return [str(one) for one in shard.all]


def _files_there(model: HubModel, names: Iterable[str]) -> str:
    found = without_later_shards(name for name in names if name.endswith(".gguf"))
    return f"; it has {model.repo}:{found[0]} and {len(found)} GGUF files in all" if found else ""


def _cached(model: HubModel) -> Path:
    """Finds what is there of a model without asking anybody."""
    if model.file:
        options: dict[str, Any] = {"revision": model.revision, "local_files_only": True}
        files = _with_later_shards(model, model.file)
        paths = [Path(hub.hf_hub_download(model.repo, file, **options)) for file in files]
        return paths[0]  # as above; each was looked for
    config = hub.hf_hub_download(
        model.repo, "config.json", revision=model.revision, local_files_only=True
    )
    return Path(config).parent
