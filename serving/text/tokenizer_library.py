"""Descriptions of tokenizers as tokenizers of the library, and what their tokens mean.

Knows nothing of files or of the engine.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from jaxinfer.config import AnyTokenizer, SentencePieceSpec, TokenizerJson, TokenizerSpec

_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2_SPLIT = _LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# o200k_base of tiktoken, and what Mistral made of it.
_GPT_4O_SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_TEKKEN_SPLIT = _GPT_4O_SPLIT.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(
    r"\p{N}{1,3}", r"\p{N}"
)
_SPACE = "\u2581"
# Those of SentencePiece have 16 characters by default. Every split of every token is looked at.
MAX_PIECE_CHARACTERS = 1024
# What a tokenizer is tried with: a word, a character that few vocabularies have, a space.
_PROBE = "a \u4e2d"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _gpt_2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# Names in GGUF's "tokenizer.ggml.pre" for one split, as llama.cpp groups them; of the first of each
# the Hugging Face tokenizer was compared with.
_LLAMA_3 = (
    *("llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "falcon-h1"),
    *("jina-v5-nano", "lfm2", "midm-2.0"),
)
_SAME_AS_LLAMA_3 = ("chatglm-bpe", "dbrx", "glm4", "smaug-bpe")  # merges count there
_SAME_AS_QWEN_2 = (
    *("deepseek-r1-qwen", "f2llmv2", "grok-2", "hunyuan", "kormo", "megrez"),
    *("solar-open", "stablelm2"),
)
_GPT_4O = ("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie")
_GPT_2 = (
    *("gpt-2", "a.x-4.0", "exaone4", "gigachat", "granite-docling", "jais", "mellum"),
    *("modern-bert", "mpt", "olmo", "phi-2", "trillion"),
)
_SMOLLM = (
    *("smollm", "codeshell", "command-r", "exaone", "mellum2", "minerva-7b"),
    *("refact", "starcoder"),
)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt_2()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    **dict.fromkeys(_GPT_2, _gpt_2),
    **dict.fromkeys(_SMOLLM, _smollm),
    **dict.fromkeys(_LLAMA_3 + _SAME_AS_LLAMA_3, lambda: _split_then_bytes(_LLAMA_3_SPLIT)),
    **dict.fromkeys(("qwen2", *_SAME_AS_QWEN_2), lambda: _split_then_bytes(_QWEN_2_SPLIT)),
    **dict.fromkeys(_GPT_4O, lambda: _split_then_bytes(_GPT_4O_SPLIT)),
    "tekken": lambda: _split_then_bytes(_TEKKEN_SPLIT),
}
# llama.cpp has none; of the others it is not known.
_NORMALIZERS = {"qwen2": normalizers.NFC}
# They take a word that is itself a token whole, merges or not.
_IGNORE_MERGES = (*_LLAMA_3, "tekken")


@functools.singledispatch
def build(spec: AnyTokenizer) -> tokenizers.Tokenizer:
    """The library's tokenizer. Raises ``ValueError`` when ``spec`` does not describe one."""
    raise TypeError(type(spec))


@build.register
def _byte_level(spec: TokenizerSpec) -> tokenizers.Tokenizer:
    if spec.pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(
            f"pre-tokenizer {spec.pre_tokenizer!r} is not supported; "
            f"supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    merges = []
    for merge in spec.merges:
        # A space inside a token is another character in the byte alphabet.
        left, separator, right = merge.partition(" ")
        if not (left and separator and right):
            raise ValueError(f"a merge must be two tokens and a space, got {merge!r:.40}")
        merges.append((left, right))
    tokenizer = _bpe(_ids_of(spec), merges, ignore_merges=spec.pre_tokenizer in _IGNORE_MERGES)
    if spec.pre_tokenizer in _NORMALIZERS:
        tokenizer.normalizer = _NORMALIZERS[spec.pre_tokenizer]()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[spec.pre_tokenizer]()
    return _with_added_tokens(tokenizer, spec)


@build.register
def _sentence_piece(spec: SentencePieceSpec) -> tokenizers.Tokenizer:
    ids = _ids_of(spec)
    if len(spec.scores) != len(spec.tokens):
        raise ValueError(f"{len(spec.scores)} scores for {len(spec.tokens)} tokens")
    tokenizer = _bpe(
        ids,
        _merges_by_score(ids, spec),
        unk_token=spec.tokens[spec.unknown_token_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if spec.add_space_prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return _with_added_tokens(tokenizer, spec)


@build.register
def _as_described(spec: TokenizerJson) -> tokenizers.Tokenizer:
    with refusing("tokenizer.json is not valid"):
        tokenizer = tokenizers.Tokenizer.from_str(spec.text)
        ids = tokenizer.encode(_PROBE).ids
    for token_id in ids:
        if token_id >= len(spec.tokens):
            raise ValueError(
                f"tokenizer.json is not valid: it gives token id {token_id}, the vocabulary has "
                f"{len(spec.tokens)} tokens"
            )
    # The library numbers added tokens by itself, whatever the file says.
    for token_id in (*spec.control_token_ids, *spec.added_token_ids):
        if (found := tokenizer.token_to_id(spec.tokens[token_id])) != token_id:
            raise ValueError(
                f"tokenizer.json is not valid: added token {spec.tokens[token_id]!r:.40} has id "
                f"{token_id}, by its place it is {found}"
            )
    return tokenizer


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever the library raises within, as ``ValueError``: it has no narrower type.

    Its panics, for files that it did not expect, are not even an ``Exception``.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from error


def token_bytes(spec: AnyTokenizer) -> Callable[[int], bytes]:
    """Returns a function from the ids of ``spec``'s vocabulary to the bytes that they stand for."""
    tokens = spec.tokens
    # Control and added tokens are written as they are, not in the byte alphabet.
    literal_ids = frozenset(spec.control_token_ids) | frozenset(spec.added_token_ids)

    def of_byte_level(token_id: int) -> bytes:
        token = tokens[token_id]
        if token_id not in literal_ids:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:
                pass  # a token outside the byte alphabet stands for itself, as in Hugging Face
        return token.encode()

    def of_sentence_piece(token_id: int) -> bytes:
        token = tokens[token_id]
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace(_SPACE, " ").encode()

    return of_byte_level if _is_byte_level(spec) else of_sentence_piece


def bytes_with_tokens(spec: AnyTokenizer) -> frozenset[int]:
    """Returns the bytes for which the vocabulary has a token: a text's others are dropped."""
    literal_ids = frozenset(spec.control_token_ids) | frozenset(spec.added_token_ids)
    tokens = (token for i, token in enumerate(spec.tokens) if i not in literal_ids)
    if _is_byte_level(spec):
        return frozenset(_BYTE_OF[token] for token in tokens if token in _BYTE_OF)
    known = frozenset(spec.tokens)
    return frozenset(byte for byte in range(256) if f"<0x{byte:02X}>" in known)


def _is_byte_level(spec: AnyTokenizer) -> bool:
    return isinstance(spec, TokenizerSpec) or (
        isinstance(spec, TokenizerJson) and spec.is_byte_level
    )


def _ids_of(spec: AnyTokenizer) -> dict[str, int]:
    ids = {token: token_id for token_id, token in enumerate(spec.tokens)}
    if len(ids) < len(spec.tokens):
        raise ValueError(
            f"of the tokenizer's {len(spec.tokens)} tokens only {len(ids)} are different"
        )
    return ids


def _bpe(
    ids: dict[str, int], merges: list[tuple[str, str]], **options: object
) -> tokenizers.Tokenizer:
    with refusing("the tokenizer's merges do not fit its tokens"):
        return tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, **options))


def _with_added_tokens(tokenizer: tokenizers.Tokenizer, spec: AnyTokenizer) -> tokenizers.Tokenizer:
    stripping = spec.rstrip_token_ids if isinstance(spec, SentencePieceSpec) else ()
    tokenizer.add_special_tokens(
        [
            AddedToken(spec.tokens[i], special=True, normalized=False, rstrip=i in stripping)
            for i in spec.control_token_ids
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(spec.tokens[i], special=False, normalized=False) for i in spec.added_token_ids]
    )
    return tokenizer


def _merges_by_score(ids: dict[str, int], spec: SentencePieceSpec) -> list[tuple[str, str]]:
    """All pairs of tokens that are a token together, in the order that SentencePiece takes them:
    the highest score first, of equal ones (Llama's) the shorter left part.
    """
    found = []
    for token, token_id in ids.items():
        if len(token) > MAX_PIECE_CHARACTERS:
            raise ValueError(
                f"token {token_id} has {len(token)} characters, more than the limit of "
                f"{MAX_PIECE_CHARACTERS}"
            )
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in ids and token[i:] in ids
        ]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(spec.scores[token_id], *pair) for pair in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte of each character in GPT-2's alphabet (``bytes_to_unicode`` there).

    Printable bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
