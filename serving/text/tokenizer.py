"""Text to token ids and back, by the tokenizer that a checkpoint describes.

Knows nothing of files or of the engine.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Protocol, Self

from jaxinfer.config import AnyTokenizer, TokenizerJson
from serving.text import tokenizer_library
from serving.text.chat_template import ChatTemplate
from serving.text.token_bounds import fewest_tokens

# Letters of Linear B: without case or other forms, and printable, so that no filter of a template
# alters or escapes them.
_MARKS = [chr(code) for code in range(0x10000, 0x1000C)]


class Tokenizer:
    """A BPE tokenizer. Raises ``ValueError`` when ``spec`` does not describe one.

    Special tokens written out ("<|im_end|>") in a text, or in the messages and tools of a chat, are
    text, unless ``parse_special_tokens`` asks for what Hugging Face does everywhere: to take them
    for those tokens. Those that a chat template writes are tokens always. Bytes for which the
    vocabulary has no token (some control characters in SmolLM) are dropped, as there.

    ``num_embeddings``: tokens from that id on have no embedding (Gemma 3's for images), and a
    prompt with one is refused; where there are more embeddings than tokens, the model may write
    the rest. None where they are as many.
    """

    def __init__(self, spec: AnyTokenizer, num_embeddings: int | None = None) -> None:
        self._spec = spec
        self._num_embeddings = len(spec.tokens) if num_embeddings is None else num_embeddings
        self._parsing = tokenizer_library.build(spec)
        # A second one, as the library has this as a setting that all threads would share.
        self._literal = tokenizer_library.build(spec)
        self._literal.encode_special_tokens = True
        tokens = sorted((spec.tokens[i] for i in spec.control_token_ids), key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in tokens if len(token) > 1))
        self._bytes_of = tokenizer_library.token_bytes(spec)
        self._fewest_tokens = fewest_tokens(
            spec, self._bytes_of, tokenizer_library.bytes_with_tokens(spec)
        )
        self._max_tokens: int | None = None
        self._control_ids = frozenset(spec.control_token_ids)
        self._template, self._tool_template = (
            None if source is None else ChatTemplate(source, _template_tokens(spec))
            for source in (spec.chat_template, spec.tool_template)
        )

    def limited(self, max_tokens: int) -> Self:
        """Returns this tokenizer for prompts of at most ``max_tokens``.

        Its ``encode`` and ``encode_chat`` raise ``ValueError`` at once for a text whose length
        alone proves that it has more; other texts may still turn out to have more.
        """
        limited = copy(self)
        limited._max_tokens = max_tokens
        return limited

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows."""
        return len(self._spec.tokens)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self._spec.eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, where there is one."""
        return self._spec.bos_token_id

    @property
    def has_chat_template(self) -> bool:
        """True when chats can be rendered, if only those with tools."""
        return self._template is not None or self._tool_template is not None

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        """Returns token ids. ``add_special_tokens`` puts BOS first where the checkpoint wants it.

        Raises ``ValueError`` for text that is no Unicode (a lone surrogate), for tokens without an
        embedding, and when the checkpoint's tokenizer cannot cope with it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start}") from error
        self._check_length(text, parse_special_tokens)
        tokenizer = self._parsing if parse_special_tokens else self._literal
        # The batch call lets other threads run meanwhile; encode() holds the interpreter's lock,
        # a second for a long prompt.
        own = add_special_tokens and isinstance(self._spec, TokenizerJson)
        with tokenizer_library.refusing("the text cannot be encoded"):
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=own)
        token_ids = encoding.ids
        if add_special_tokens and self._spec.add_bos_token and self.bos_token_id is not None:
            token_ids = [self.bos_token_id, *token_ids]
        return self._embedded(token_ids)

    def _embedded(self, token_ids: list[int]) -> list[int]:
        count = self._num_embeddings
        if count >= self.vocab_size or max(token_ids, default=0) < count:
            return token_ids
        token_id = next(one for one in token_ids if one >= count)
        raise ValueError(
            f"the prompt has {self._spec.tokens[token_id]!r:.80}, token {token_id}, which this "
            f"model does not take: it has {count} embeddings"
        )

    def decode(self, token_ids: Iterable[int], skip_control_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are no UTF-8 become U+FFFD.

        It is a whole text: the space that a tokenizer puts before one is left out. Raises
        ``ValueError`` for an id outside the vocabulary.
        """
        data = b"".join(self.token_bytes(token_id, skip_control_tokens) for token_id in token_ids)
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._spec.add_space_prefix else text

    def control_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Returns the control tokens that are written as one of ``texts``, in order."""
        wanted, tokens = frozenset(texts), self._spec.tokens
        return tuple(i for i in sorted(self._control_ids) if tokens[i] in wanted)

    def token_bytes(self, token_id: int, skip_control_tokens: bool = True) -> bytes:
        """Returns the bytes of one token, which may be a part of a character.

        Rows of the embedding that no token has, which only fill it up, stand for nothing.
        """
        if self.vocab_size <= token_id < self._num_embeddings:
            return b""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id must be in [0, {self.vocab_size - 1}], got {token_id}")
        if token_id in self._control_ids and skip_control_tokens:
            return b""
        return self._bytes_of(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, str | bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Returns the prompt text of a chat, special tokens written out.

        ``continue_final_message`` leaves the last message open, without a generation prompt.
        ``tools`` are descriptions of functions, in the form that the template knows.
        Raises ``ValueError`` when the checkpoint has no chat template, for an unknown role, and
        when the template refuses the messages or the arguments.
        """
        template = self._tool_template if tools and self._tool_template else self._template
        if template is None:
            without = " for chats without tools" if self._tool_template else ""
            raise ValueError(
                f"this checkpoint has no chat template{without}; send text or token ids"
            )
        arguments = template_arguments or {}
        if continue_final_message:
            return template.render_open(messages, arguments, tools)
        return template.render(messages, add_generation_prompt, arguments, tools)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, str | bool] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        parse_special_tokens: bool = False,
    ) -> list[int]:
        """Returns the token ids of a chat. The template writes BOS itself where it wants one."""
        given = (messages, template_arguments or {}, tools)
        mark = "" if parse_special_tokens else self._mark_for(given)
        messages, arguments, tools = self._marked(given, mark) if mark else given
        text = self.render_chat(
            messages, add_generation_prompt, continue_final_message, arguments, tools
        )
        if not mark:
            return self.encode(text, add_special_tokens=False, parse_special_tokens=True)
        self._check_length(text.replace(mark, ""), True)
        return self._encode_marked(text, mark)

    def _check_length(self, text: str, parses_special: bool) -> None:
        if self._max_tokens is None or len(text) <= self._max_tokens // 4:  # bytes a character
            return
        if (fewest := self._fewest_tokens(text, parses_special)) > self._max_tokens:
            raise ValueError(
                f"the prompt has {len(text)} characters, which are {fewest} tokens at least, "
                f"more than max_model_len ({self._max_tokens})"
            )

    def _mark_for(self, given: object) -> str:
        """A character that is nowhere in ``given``; "" where no special token is written out."""
        strings = list(_strings(given))
        if not self._special.pattern or not any(map(self._special.search, strings)):
            return ""
        for mark in _MARKS:
            if not any(mark in string for string in strings):
                return mark
        raise ValueError(f"a chat with special tokens must lack one of {' '.join(_MARKS)}")

    def _marked(self, given: Any, mark: str) -> Any:
        """``given`` with a mark in each special token, which then is none to the library."""
        if isinstance(given, str):
            return self._special.sub(lambda found: found[0][0] + mark + found[0][1:], given)
        if isinstance(given, Mapping):
            return {self._marked(k, mark): self._marked(v, mark) for k, v in given.items()}
        if isinstance(given, list | tuple):
            return type(given)(self._marked(item, mark) for item in given)
        return given

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """The template's special tokens as such, and what is between them, unmarked, as text.

        Each piece is encoded by itself: a tokenizer that begins a text with a space does so there.
        """
        # The batch call for the same reason as in encode().
        with tokenizer_library.refusing("the chat cannot be encoded"):
            (encoding,) = self._parsing.encode_batch([text], add_special_tokens=False)
        token_ids, end = list[int](), 0

        def add_text(upto: int) -> None:
            if piece := text[end:upto].replace(mark, ""):
                token_ids.extend(self.encode(piece, add_special_tokens=False))

        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._control_ids:
                self._embedded([token_id])
                add_text(first)
                token_ids.append(token_id)
                end = last
        add_text(len(text))
        return token_ids


class TokenBytes(Protocol):
    """A tokenizer as a detokenizer needs it."""

    def token_bytes(self, token_id: int, skip_control_tokens: bool = True) -> bytes: ...


class Detokenizer:
    """Turns a stream of token ids into a stream of text, never a part of a character.

    What ``add`` and ``finish`` returned, joined, is what ``tokenizer.decode`` of all ids has behind
    the prompt: a space at the beginning is kept. At most the first 3 bytes of a character are held
    back, until the rest comes or cannot come any more.
    """

    def __init__(self, tokenizer: TokenBytes, skip_control_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_control_tokens = skip_control_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Iterable[int]) -> str:
        """Returns the text that is certain now. Time is linear in the new tokens alone."""
        return self._decoder.decode(
            b"".join(
                self._tokenizer.token_bytes(token_id, self._skip_control_tokens)
                for token_id in token_ids
            )
        )

    def finish(self) -> str:
        """Returns what was held back: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def _template_tokens(spec: AnyTokenizer) -> dict[str, str]:
    tokens = {}
    if spec.bos_token_id is not None:
        tokens["bos_token"] = spec.tokens[spec.bos_token_id]
    if spec.eos_token_ids:
        tokens["eos_token"] = spec.tokens[spec.eos_token_ids[0]]
    return tokens | dict(spec.template_tokens)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
