import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.gguf.checkpoint import GGUFCheckpoint
from checkpoints.gguf.file import GGUFFile
from tests.checkpoints.gguf import tiny_gguf
from tests.checkpoints.gguf.tiny_gguf import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    file_bytes,
)
from tests.patience import WORK_SECONDS

HUGE = 1 << 60
X = ("x", (4, 32), F32, bytes(512))


def read(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "test.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    start = time.thread_time()
    with pytest.raises(ValueError, match=match) as error:
        read(tmp_path, data)
    assert time.thread_time() - start < WORK_SECONDS
    assert "test.gguf: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_reads_what_gguf_py_reads(tmp_path: Path, version: int, alignment: int) -> None:
    metadata = tiny_gguf.llama_metadata() | {
        "general.alignment": (UINT32, alignment),
        "test.numbers": (ARRAY, (UINT64, [1, HUGE])),
        "test.flags": (ARRAY, (BOOL, [True, False])),
        "test.empty": (ARRAY, (STRING, [])),
    }
    random = np.random.RandomState(0)
    tensors = [
        tiny_gguf.tensor(
            "a", random.standard_normal((3, 5, 64)).astype(np.float32), tiny_gguf.Q8_0
        ),
        tiny_gguf.tensor("b", random.standard_normal(7).astype(np.float32)),
    ]
    path = tmp_path / "test.gguf"
    path.write_bytes(file_bytes(metadata, tensors, version, alignment))
    file, oracle = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in oracle.fields.items():
        if not key.startswith("GGUF."):
            ours = file.metadata[key]
            if isinstance(ours, np.ndarray | tuple):
                ours = list(ours)
            assert ours == field.contents(), key
    assert len(file.metadata) == len(oracle.fields) - 3
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for theirs in oracle.tensors:
        info = file.tensors[theirs.name]
        assert info.shape == tuple(theirs.shape.tolist()[::-1])
        assert (info.start, info.num_bytes) == (theirs.data_offset, theirs.n_bytes)
        assert file.tensor_bytes(theirs.name).tobytes() == theirs.data.tobytes()


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"", "0 bytes is too short"),
        (b"GGUF" + bytes(19), "23 bytes is too short"),
        (b"GGML" + bytes(40), "starts with b'GGML'"),
        (b"FUGG" + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(40), "version 4; versions 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(40), f"tensor count is {HUGE}"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(40), f"metadata count is {HUGE}"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(40), f"key is {HUGE}"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: bytes, match: str) -> None:
    refused(tmp_path, header, match)


def key(kind: int, value: bytes, name: str = "k") -> bytes:
    return tiny_gguf.pack(STRING, name) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            [key(STRING, struct.pack("<Q", HUGE))],
            f"at least {HUGE + 45} bytes, .* 'k'",
        ),
        ([key(STRING, struct.pack("<Q", 2) + b"\xff\xff")], "'k' at .* is not UTF-8"),
        (
            [key(ARRAY, struct.pack("<IQ", STRING, HUGE))],
            f"in all arrays is {HUGE}",
        ),
        (
            [key(ARRAY, struct.pack("<IQ", UINT32, HUGE))],
            f"least {4 * HUGE + 49} bytes",
        ),
        (
            [key(ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))],
            f"{HUGE + 57} bytes, .* in 'k'",
        ),
        ([key(ARRAY, struct.pack("<IQQ", STRING, 1, 1) + b"\xff")], "string in 'k' .* not UTF-8"),
        ([key(ARRAY, struct.pack("<IQ", ARRAY, 1))], "'k' is an array of arrays"),
        ([key(ARRAY, struct.pack("<IQ", 99, 1))], "'k' has element type 99"),
        ([key(13, b"")], "'k' has metadata type 13"),
        ([key(UINT8, b"1"), key(UINT8, b"2")], "'k' occurs twice"),
        ([key(UINT32, struct.pack("<I", 48), "general.alignment")], "power of two .* got 48"),
        ([key(UINT32, struct.pack("<I", 0), "general.alignment")], "power of two .* got 0"),
        ([key(STRING, tiny_gguf.pack(STRING, "32"), "general.alignment")], "got '32'"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, keys: list[bytes], match: str) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    refused(tmp_path, header + b"".join(keys) + bytes(64), match)


def info(
    sizes: tuple[int, ...] = (32, 4),
    number: int = F32,
    offset: int = 0,
    name: str = "x",
    num_dimensions: int | None = None,
) -> bytes:
    count = len(sizes) if num_dimensions is None else num_dimensions
    packed = struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, number, offset)
    return tiny_gguf.pack(STRING, name) + packed


@pytest.mark.parametrize(
    ("infos", "match"),
    [
        ([info((HUGE, HUGE, HUGE, HUGE))], "expected at least .* 'x', found 8288$"),
        ([info((1 << 33, 1 << 31))], "expected at least .* 'x', found 8288$"),
        ([info((0, 4))], "every dimension must be at least 1"),
        ([info(num_dimensions=0)], "0 dimensions, 1 to 4"),
        ([info(num_dimensions=1 << 31)], f"{1 << 31} dimensions, 1 to 4"),
        ([info((33, 4), tiny_gguf.Q4_0)], "rows of 33 elements, not a multiple of the 32"),
        ([info(number=11)], "'x' has type Q3_K; supported are BF16, F16, F32, Q4_0, Q4_1, Q4_K, "),
        ([info(number=77)], "'x' has type 77; supported"),
        ([info(offset=16)], "offset 16, not a multiple of the alignment 32"),
        ([info(offset=1 << 40)], "expected at least .* 'x', found 8288$"),
        ([info((32, 100))], "cut off or damaged: expected at least 12896 bytes"),
        ([info(), info(offset=32, name="y")], "'y' at .* overlaps tensor 'x'"),
        ([info(), info(offset=0, name="y")], "'y' at .* overlaps tensor 'x'"),
        ([info(), info(offset=512)], "'x' occurs twice"),
        ([info(name="n" * 65)], "length of a tensor name is 65, more than the limit of 64"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, infos: list[bytes], match: str) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), 0) + b"".join(infos)
    refused(tmp_path, header + bytes(-len(header) % 32) + bytes(8192), match)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = file_bytes({"k": (STRING, "value"), "l": (ARRAY, (UINT32, [1, 2]))}, [X])
    read(tmp_path, data)
    for size in range(len(data)):
        refused(tmp_path, data[:size], "byte|the limit of [01]$")


@contextmanager
def suppress_refusal(path: Path) -> Iterator[None]:
    """Lets a ValueError that names the file pass, and nothing else."""
    try:
        yield
    except ValueError as error:
        if f"{path}: " not in str(error):
            raise


SOUND = tiny_gguf.llama_bytes(tiny_gguf.Q4_1)
# Damage in the tensors' data is harmless; most of it goes to what comes before.
HEADER_BYTES = SOUND.index(b"blk.1.ffn_down.weight") + 64
_POSITIONS = st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, len(SOUND) - 1))
_NUMBERS = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    flips=st.lists(st.tuples(_POSITIONS, st.integers(0, 255)), max_size=8),
    numbers=st.lists(st.tuples(_POSITIONS, _NUMBERS), max_size=2),
    size=st.one_of(st.just(len(SOUND)), st.integers(0, len(SOUND))),
)
def test_a_damaged_file_is_read_or_refused(
    tmp_path: Path, flips: list[tuple[int, int]], numbers: list[tuple[int, int]], size: int
) -> None:
    data = bytearray(SOUND)
    for position, byte in flips:
        data[position] = byte
    for position, number in numbers:
        data[position : position + 8] = number.to_bytes(8, "little")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data[:size])
    with suppress_refusal(path):
        checkpoint = GGUFCheckpoint(path)
        for name in ("embed_tokens", "norm", "layers.1.q", "layers.0.down"):
            checkpoint.tensor(name)
        assert checkpoint.tokenizer.tokens


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    """Wherever it ends, it is said so, with the bytes that there should be and those found."""
    data = tiny_gguf.llama_bytes()
    for size in (24, 30, 100, 500, 1500, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=rf"cut off or damaged: .*, found {size}$") as error:
            read(tmp_path, data[:size])
        expected = int(str(error.value).split("expected at least ")[1].split(" ")[0])
        assert size < expected <= len(data)
    assert expected == len(data)
