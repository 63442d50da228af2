"""The tokenizer of a Hugging Face folder: tokenizer.json and what lies around it.

Only described here; serving builds it. No code of a folder is run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints.hugging_face.generation_config import read_generation_config
from checkpoints.json_file import read_json, read_text
from checkpoints.token_rows import MAX_TOKENS_WITHOUT_ROW
from jaxinfer.config import TokenizerJson

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
MAX_TOKENIZER_BYTES = 128 << 20
MAX_CONFIG_BYTES = 16 << 20

# Kinds of decoders: what a token's string means.
_BYTE_LEVEL, _SENTENCE_PIECE = {"ByteLevel"}, {"ByteFallback", "Metaspace"}


def read_tokenizer(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> TokenizerJson:
    """The tokenizer of ``folder``; ``config`` is the model's, with ``vocab_size`` embeddings.

    Raises ``ValueError`` in one line: files missing or damaged, a kind that is not supported,
    tokens beyond the embeddings that are not added ones.
    """
    path = folder / TOKENIZER
    fields = read_json(path, MAX_TOKENIZER_BYTES)
    settings = _optional(folder / TOKENIZER_CONFIG)
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: the model must be a BPE with a vocab")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{path}: model {model['type']!r:.40} is not supported; supported is BPE")
    decoder = list(_decoders(fields.get("decoder")))
    kinds = {str(step.get("type")) for step in decoder}
    is_byte_level = kinds >= _BYTE_LEVEL
    if not is_byte_level and not kinds & _SENTENCE_PIECE:
        found = ", ".join(sorted(kinds)) or "none"
        raise ValueError(
            f"{path}: decoder {found!r:.80} is not supported; supported "
            "are ByteLevel, ByteFallback and Metaspace"
        )
    try:
        added = list(_added_tokens(fields.get("added_tokens", [])))
        tokens = _tokens_by_id(model["vocab"], added, vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ids = {token: token_id for token_id, token in enumerate(tokens) if token}
    bos, eos = (ids.get(_token_text(settings.get(f"{name}_token"))) for name in ("bos", "eos"))
    end_ids = _end_ids(folder, config)
    if eos is not None:
        end_ids.append(eos)
    # Some configurations name tokens that a smaller vocabulary has not.
    end_ids = [token_id for token_id in end_ids if token_id < min(len(tokens), vocab_size)]
    template, tool_template = _chat_templates(folder, settings)
    return TokenizerJson(
        # Without what cuts and pads texts for training.
        text=json.dumps({**fields, "truncation": None, "padding": None}, ensure_ascii=False),
        is_byte_level=is_byte_level,
        add_space_prefix=not is_byte_level and any(map(_strips_space, decoder)),
        tokens=tokens,
        control_token_ids=tuple(token_id for token_id, _, is_special in added if is_special),
        added_token_ids=tuple(token_id for token_id, _, is_special in added if not is_special),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(end_ids)),
        chat_template=template,
        tool_template=tool_template,
        template_tokens=_template_tokens(folder, settings),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_CONFIG_BYTES) if path.exists() else {}


def _decoders(decoder: object) -> Iterator[dict[str, Any]]:
    """A decoder and those within it."""
    if isinstance(decoder, dict):
        yield decoder
        inner = decoder.get("decoders")
        yield from (
            (one for one in inner if isinstance(one, dict)) if isinstance(inner, list) else ()
        )


def _strips_space(step: Mapping[str, Any]) -> bool:
    """Tells if a step of a decoder takes a space from the beginning of a text."""
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step.get("type") == "Strip" and step.get("start") == 1


def _added_tokens(added: object) -> Iterator[tuple[int, str, bool]]:
    """Id, string and whether it is special."""
    if not isinstance(added, list):
        raise ValueError("added_tokens must be a list")
    for token in added:
        if (
            not isinstance(token, dict)
            or type(token.get("id")) is not int
            or token["id"] < 0
            or not isinstance(token.get("content"), str)
        ):
            raise ValueError(f"an added token needs an id and a content, got {token!r:.80}")
        yield token["id"], token["content"], token.get("special") is True


def _tokens_by_id(
    vocab: Mapping[str, Any], added: list[tuple[int, str, bool]], vocab_size: int
) -> tuple[str, ...]:
    everything = [*vocab.items(), *((token, token_id) for token_id, token, _ in added)]
    special_ids = {
        token_id for token_id, _, _ in added if token_id < vocab_size + MAX_TOKENS_WITHOUT_ROW
    }
    for token, token_id in everything:
        has_row = type(token_id) is int and 0 <= token_id < vocab_size
        if not has_row and (type(token_id) is not int or token_id not in special_ids):
            raise ValueError(
                f"token {token!r:.40} has id {token_id!r:.40}, the embedding has {vocab_size} rows"
            )
    # Little longer than the embedding, which is in a file.
    tokens = [""] * (1 + max((token_id for _, token_id in everything), default=-1))
    for token, token_id in everything:
        if tokens[token_id] not in ("", token):
            raise ValueError(f"id {token_id} is of {tokens[token_id]!r:.40} and of {token!r:.40}")
        tokens[token_id] = token
    return tuple(tokens)


def _token_text(token: object) -> str:
    """A token in tokenizer_config.json: a string, or an object with its content; "" for none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _end_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text, of generation_config.json before those of config.json."""
    value = read_generation_config(folder).get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"{folder}: eos_token_id must be a token id, got {token_id!r:.40}")
    return list(ids)


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The template, and the one for chats with tools: of files of their own, else of settings."""
    jinja, wrapped, for_tools = (folder / name for name in CHAT_TEMPLATES)
    if jinja.exists() or for_tools.exists():
        return tuple(
            read_text(path, MAX_CONFIG_BYTES) if path.exists() else None
            for path in (jinja, for_tools)
        )
    template = _optional(wrapped).get("chat_template") or settings.get("chat_template")
    named = {"default": template}
    if isinstance(template, list):
        of_names = (one for one in template if isinstance(one, dict))
        named = {str(one.get("name")): one.get("template") for one in of_names}
    elif isinstance(template, dict):
        named = template
    templates = named.get("default"), named.get("tool_use")
    for value in templates:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{folder / TOKENIZER_CONFIG}: chat_template must be a string")
    return templates


def _template_tokens(folder: Path, settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The tokens that settings give a name, as templates know them."""
    further = settings.get("extra_special_tokens")
    given = {
        **_optional(folder / SPECIAL_TOKENS_MAP),
        **(further if isinstance(further, dict) else {}),
        **settings,
    }
    texts = {name: _token_text(token) for name, token in given.items() if name.endswith("_token")}
    return tuple((name, text) for name, text in texts.items() if text)
