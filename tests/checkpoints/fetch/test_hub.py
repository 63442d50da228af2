"""Models of the hub, from a server in this process that speaks as the hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from checkpoints.fetch.catalog import resolve
from checkpoints.fetch.hub_id import HubModel, parse_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 5000,
    "model-00002-of-00002.safetensors": bytes(range(256)) * 200,
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"[]",
    "pytorch_model.bin": b"never",
    "consolidated.safetensors": b"never",
    "onnx/model.safetensors": b"never",
    "README.md": b"never",
}
GGUF = {"a-Q4_0.gguf": b"GGUF4", "a-Q8_0.gguf": b"GGUF8"}
SPLIT = {f"q/b-{number:05}-of-00003.gguf": b"GGUF%d" % number for number in (1, 2, 3)}
SPLIT["c-00001-of-00002.gguf"] = b"GGUF"
REPOSITORIES = {"org/small": FILES, "org/only.gguf-files": GGUF, "org/split": SPLIT}


class Hub(ThreadingHTTPServer):
    """Counts what is asked for, and may break off in the middle of a file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str | None]] = []
        self.breaks_at: int | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        self._hub.asked.append((self.command, self.path, self.headers.get("Range")))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._answer_info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _refuse(self, code: str, status: int = 404) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _answer_info(self, repo: str, revision: str) -> None:
        if repo == "org/gated":
            return self._refuse("GatedRepo", 403)
        if repo not in REPOSITORIES:
            return self._refuse("RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self._refuse("RevisionNotFound")
        files = [{"rfilename": n, "size": len(data)} for n, data in REPOSITORIES[repo].items()]
        body = json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode()
        return self._send(200, body, {"Content-Type": "application/json"})

    def _answer_file(self, repo: str, revision: str, name: str) -> None:
        data = REPOSITORIES[repo][name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        assert revision == COMMIT
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[first:]
        stop = self._hub.breaks_at
        if self.command == "GET" and stop is not None and len(data) > stop:
            self._hub.breaks_at = None
            headers["Content-Length"] = str(len(data))
            self.close_connection = True
            data = data[:stop]
        self._send(status, data, headers)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        host, port = server.server_address[:2]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{host}:{port}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"http://{host}:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("org/name", HubModel("org/name")),
        ("org/name@v1.0", HubModel("org/name", "v1.0")),
        ("org/name@refs/pr/1:a/b.gguf", HubModel("org/name", "refs/pr/1", "a/b.gguf")),
        ("org/name:a.gguf", HubModel("org/name", None, "a.gguf")),
        *((text, None) for text in ("", "name", "/a/b", "a/b/c", "a/b:c.bin", "a b/c", "a/b@")),
        *((text, None) for text in ("org/n\u00e4me", "a/" + "b" * 97, "https://a/b")),
    ],
)
def test_ids(text: str, model: HubModel | None) -> None:
    assert parse_hub_id(text) == model


def test_only_needed_files_of_one_commit(hub: Hub) -> None:
    counted: list[tuple[int, int]] = []
    folder = resolve("org/small@v1", lambda *count: counted.append(count))
    assert folder.name == COMMIT
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    needed = {name: data for name, data in FILES.items() if data != b"never"}
    assert found == needed
    total = sum(map(len, needed.values()))
    assert counted[-1] == (total, total)
    assert not any("never" in path or "onnx" in path for _, path, _ in hub.asked)


def test_without_a_network_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("org/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert resolve(f"org/small@{COMMIT}") == resolve("org/small") == folder
    assert hub.asked == []
    with pytest.raises(ValueError, match="cannot fetch org/small"):
        resolve("org/small@v1")  # the same commit, but nobody has said so yet
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert resolve("org/small@v1") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/small@v1") == folder
    with pytest.raises(ValueError, match=r"cannot fetch org/other: tried the cache \([^)]*\)\. Ch"):
        resolve("org/other")


def test_a_server_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot fetch org/small: tried the cache .* and http"):
        resolve("org/small")


def test_goes_on_where_it_was_broken_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.breaks_at = 20_000
    folder = resolve("org/small")
    name = "model-00002-of-00002.safetensors"
    assert (folder / name).read_bytes() == FILES[name]
    ranges = [asked for command, path, asked in hub.asked if command == "GET" and name in path]
    assert len(ranges) == 2
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").partition("-")[0]) > 0


def test_one_gguf_file(hub: Hub) -> None:
    path = resolve("org/only.gguf-files:a-Q8_0.gguf")
    assert path.name == "a-Q8_0.gguf"
    assert path.read_bytes() == b"GGUF8"
    assert not any("Q4_0" in asked for _, asked, _ in hub.asked)


def test_a_split_gguf_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards are fetched, and all must be in the cache where there is no network."""
    name = f"org/split@{COMMIT}:q/b-00001-of-00003.gguf"
    counted: list[tuple[int, int]] = []
    path = resolve(name, lambda *count: counted.append(count))
    assert path.name == "b-00001-of-00003.gguf"
    found = {f"q/{file.name}": file.read_bytes() for file in path.parent.iterdir()}
    assert found == {name: data for name, data in SPLIT.items() if name.startswith("q/")}
    assert counted[-1] == (15, 15)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(name) == path
    (path.parent / "b-00003-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match="cannot fetch org/split: tried the cache"):
        resolve(name)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("org/absent", "there is no model org/absent at http"),
        ("org/small@v2", "org/small has no revision 'v2'"),
        ("org/gated", "given only to those who have agreed to its terms: do so at http"),
        ("org/only.gguf-files", r"no config.json .*; it has .*files:a-Q4_0.gguf and 2 GGUF files"),
        ("org/small:b.gguf", "org/small has no file 'b.gguf'"),
        ("org/only.gguf-files:b.gguf", r"no file 'b.gguf'; it has org/only.gguf-files:a-Q4_0"),
        ("org/a--b", "org/a--b"),
        (
            "org/split",
            r"no config.json .*; it has org/split:c-00001-of-00002.gguf and 2 GGUF files",
        ),
        ("org/split:c-00001-of-00002.gguf", "org/split has no file 'c-00002-of-00002.gguf'"),
        (
            "org/split:q/b-00002-of-00003.gguf",
            "is shard 2 of 3: give the first, org/split:q/b-00001-of-00003.gguf",
        ),
        ("org/split:b-00001-of-99999.gguf", "more than the limit of 512 shards"),
    ],
)
def test_what_cannot_be_had(hub: Hub, model: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        resolve(model)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"no file or folder {model!r} is here, and ")
