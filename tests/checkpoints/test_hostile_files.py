"""2,000 damaged files: each is read, or refused with a ``ValueError`` in one line that names it.

Whatever a file says, opening it, its tokenizer, a text and a chat through that, and all parameters
take no longer than ``MAX_SECONDS`` of the processor and no more memory than ``memory_limit`` of the
bytes that are there. Python's and numpy's memory is counted by tracemalloc, array by array, touched
or not; that of the libraries underneath (tokenizers, safetensors, XLA) by the kernel, page by page.
"""

import gc
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from checkpoints.gguf.file import GGUFFile
from checkpoints.load import load_parameters, open_checkpoint
from jaxinfer_entrypoints.memory.peak import PeakMemory
from serving.text.tokenizer import Tokenizer
from tests.checkpoints import hostile_corpus as corpus
from tests.checkpoints.mutations import Mutation, byte_mutations, json_mutations, weighted
from tests.checkpoints.test_load import abstract_parameters

# A tenth of a second is usual here, tracing memory and looking at a new shape included; what has
# no bound takes minutes. The margin is for a busy machine.
MAX_SECONDS = 5.0
# Of a file's bytes: a block of 18 bytes is 32 float32 numbers, as they are made and once more as
# they are placed; a string is an object of 50 bytes, once in every table it is in.
MAX_FACTOR = 32
MAX_CONSTANT = 4 << 20
# What libraries keep for themselves comes on top of it: arenas, threads' stacks, compiled programs.
MAX_RESIDENT_CONSTANT = 64 << 20
MAX_MESSAGE = 2000

# No explanations of failures: they take as long again.
_UNHURRIED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
_PHASES = (Phase.generate, Phase.shrink)
TEXT = "ab 12, <|end|> \u00e4\u4e2d <tool>"
CHAT = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "ab"}]

pytestmark = pytest.mark.thorough("2,000 damaged files")


def use(path: Path) -> None:
    """All that a program does with a checkpoint before it runs it."""
    checkpoint = open_checkpoint(path)
    spec, sampling = checkpoint.tokenizer, checkpoint.default_sampling
    assert sampling.temperature >= 0
    if checkpoint.tensors is not None:  # whose parameters are not damaged here
        load_parameters(checkpoint, abstract_parameters(checkpoint.model))
    try:
        tokenizer = Tokenizer(spec)
    except ValueError as error:  # knows no file: scripts name it
        raise ValueError(f"{path}: {error}") from error
    assert tokenizer.vocab_size <= checkpoint.model.vocab_size
    encodings = [tokenizer.encode(TEXT), tokenizer.encode(TEXT, parse_special_tokens=True)]
    if tokenizer.has_chat_template:
        # A template that fails on a request's messages is that request's error, in its own words.
        with suppress(ValueError):
            encodings.append(tokenizer.encode_chat(CHAT))
    for token_ids in encodings:
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)
        tokenizer.decode(token_ids)


@dataclass
class Case:
    """A sound checkpoint, and one of its files, which is to be damaged."""

    path: Path
    damaged: Path
    sound: bytes = field(repr=False)
    outcomes: Counter[str] = field(default_factory=Counter, repr=False)
    reasons: Counter[str] = field(default_factory=Counter, repr=False)

    def check(self, mutate: Mutation) -> None:
        data = mutate(self.sound)
        self.damaged.write_bytes(data)
        folder = self.path if self.path.is_dir() else self.path.parent
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        resident, start = PeakMemory(), time.process_time()
        try:
            use(self.path)
            self.outcomes["read"] += 1
        except ValueError as error:
            self.outcomes["refused"] += 1
            message = str(error)
            self.reasons[re.sub(r"\d+|'[^']*'", "#", message)[-40:]] += 1
            # The file itself, or the folder or the set that it is part of.
            assert str(folder) in message, message[:MAX_MESSAGE]
            assert len(message.splitlines()) == 1, message[:MAX_MESSAGE]
            assert len(message) <= MAX_MESSAGE, message[:MAX_MESSAGE]
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
        assert seconds < MAX_SECONDS
        assert peak - before <= MAX_FACTOR * size + MAX_CONSTANT
        assert resident.added <= MAX_FACTOR * size + MAX_RESIDENT_CONSTANT


def gguf_case(write: Callable[[Path], None], folder: Path) -> Case:
    path = folder / "tiny.gguf"
    write(path)
    return Case(path, path, path.read_bytes())


def shard_case(number: int, folder: Path) -> Case:
    corpus.write_split_mixture(folder)
    damaged = folder / f"tiny-{number:05}-of-00003.gguf"
    return Case(folder / "tiny-00001-of-00003.gguf", damaged, damaged.read_bytes())


def folder_case(write: Callable[..., None], name: str, folder: Path, **options: Any) -> Case:
    path = folder / "folder"
    write(path, **options)
    return Case(path, path / name, (path / name).read_bytes())


class _Fields(GGUFFile):
    """Notes where a file has integers: counts, lengths, types, sizes, offsets, values."""

    def __init__(self, path: Path) -> None:
        self.found: list[tuple[int, int]] = []
        super().__init__(path)

    def _take(self, num_bytes: int, what: str) -> int:
        start = super()._take(num_bytes, what)
        if num_bytes in (1, 2, 4, 8):
            # Memory is taken by counts and by the lengths of values; tensors have most integers.
            is_size = "count" in what or what.startswith("the length of '")
            self.found += [(start, num_bytes)] * (6 if is_size else 1)
        return start


def gguf_mutations(case: Case) -> st.SearchStrategy[Mutation]:
    fields = _Fields(case.damaged)
    return byte_mutations(min(info.start for info in fields.tensors.values()), fields.found)


def safetensors_mutations(case: Case) -> st.SearchStrategy[Mutation]:
    header = 8 + int.from_bytes(case.sound[:8], "little")
    length = [(0, 8), (0, 4), (0, 2)]
    in_header = json_mutations()

    def with_header(mutate: Mutation) -> Mutation:
        def changed(data: bytes) -> bytes:
            text = mutate(data[8:header])
            return len(text).to_bytes(8, "little") + text + data[header:]

        return changed

    return weighted((1, byte_mutations(header, length)), (2, in_header.map(with_header)))


def text_mutations(case: Case) -> st.SearchStrategy[Mutation]:
    in_text = byte_mutations(len(case.sound), is_text=True)
    return weighted((6, json_mutations()), (1, in_text))


G, S, T = gguf_mutations, safetensors_mutations, text_mutations
folders, pieces = corpus.write_folder, corpus.write_sentence_piece_folder
packed = corpus.write_packed_folder
CASES: dict[str, tuple[int, Callable[[Path], Case], Callable[[Case], Any]]] = {
    "llama": (250, lambda f: gguf_case(corpus.write_sentence_piece_llama, f), G),
    "qwen2": (250, lambda f: gguf_case(corpus.write_byte_level_qwen2, f), G),
    "experts": (200, lambda f: gguf_case(corpus.write_mixture, f), G),
    "shard 1": (150, lambda f: shard_case(1, f), G),
    "shard 2": (100, lambda f: shard_case(2, f), G),
    "safetensors": (100, lambda f: folder_case(folders, "model.safetensors", f), S),
    "index": (
        80,
        lambda f: folder_case(folders, "model.safetensors.index.json", f, num_files=2),
        T,
    ),
    "config": (130, lambda f: folder_case(folders, "config.json", f), T),
    "packed safetensors": (40, lambda f: folder_case(packed, "model.safetensors", f), S),
    "packed config": (60, lambda f: folder_case(packed, "config.json", f), T),
    "experts' config": (120, lambda f: folder_case(folders, "config.json", f, has_experts=True), T),
    "tokenizer": (150, lambda f: folder_case(folders, "tokenizer.json", f), T),
    "sentence piece": (150, lambda f: folder_case(pieces, "tokenizer.json", f), T),
    "tokenizer_config": (75, lambda f: folder_case(folders, "tokenizer_config.json", f), T),
    "generation_config": (75, lambda f: folder_case(folders, "generation_config.json", f), T),
    "jaxinfer.json": (30, lambda f: folder_case(corpus.write_converted, "jaxinfer.json", f), T),
    "vocabulary": (40, lambda f: folder_case(corpus.write_converted, "vocabulary.json", f), T),
}


@pytest.fixture(scope="module", autouse=True)
def traced() -> Iterator[None]:
    """Counts memory. What was there before is left out of collections, which then take no time."""
    gc.collect()
    gc.freeze()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.unfreeze()


def test_there_are_2000() -> None:
    assert sum(number for number, _, _ in CASES.values()) == 2000


@pytest.mark.parametrize("name", CASES)
def test_read_or_refused(tmp_path: Path, name: str) -> None:
    number, make, mutations = CASES[name]
    case = make(tmp_path)
    use(case.path)  # it is sound, and what is imported and compiled once is not counted

    @settings(max_examples=number, suppress_health_check=_UNHURRIED, phases=_PHASES)
    @given(mutations(case))
    def check(mutate: Mutation) -> None:
        case.check(mutate)

    check()
    # Neither harmless damage alone, nor only what the first check notices.
    assert case.outcomes.total() == number
    assert case.outcomes["read"] >= number // 50  # of safetensors the library refuses nearly all
    assert case.outcomes["refused"] >= number // 10
    assert len(case.reasons) >= 4
