"""Text to token ids and back: byte-level BPE rebuilt from a checkpoint's description.

Knows nothing of files or of the engine.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from jaxinfer.config import TokenizerSpec
from serving.chat_template import ChatTemplate

_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2_SPLIT = _LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _gpt_2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# By the name in GGUF's "tokenizer.ggml.pre"; each as in the Hugging Face tokenizer it stands for.
_PRE_TOKENIZERS = {
    "gpt-2": _gpt_2,
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _gpt_2()]
    ),
    "llama-bpe": lambda: _split_then_bytes(_LLAMA_3_SPLIT),
    "qwen2": lambda: _split_then_bytes(_QWEN_2_SPLIT),
}
_NORMALIZERS = {"qwen2": normalizers.NFC}
# Llama 3 takes a word that is itself a token whole, merges or not.
_IGNORE_MERGES = ("llama-bpe",)


class Tokenizer:
    """A byte-level BPE tokenizer. Raises ``ValueError`` when ``spec`` does not describe one.

    Special tokens written out in a text ("<|im_end|>") become those tokens, as in Hugging Face:
    a prompt is trusted to that degree, and so is the content of a chat message. Bytes for which
    the vocabulary has no token (some control characters in SmolLM) are dropped, as there.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        if spec.pre_tokenizer not in _PRE_TOKENIZERS:
            raise ValueError(
                f"pre-tokenizer {spec.pre_tokenizer!r} is not supported; "
                f"supported are {', '.join(sorted(_PRE_TOKENIZERS))}"
            )
        self._spec = spec
        self._tokenizer = _build(spec)
        self._control_ids = frozenset(spec.control_token_ids)
        # Control and added tokens are written as they are, not in the byte alphabet.
        self._literal_ids = self._control_ids | frozenset(spec.added_token_ids)
        self._template = None
        if spec.chat_template is not None:
            self._template = ChatTemplate(spec.chat_template, _special_tokens(spec))

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
        """True when chats can be rendered."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns token ids. ``add_special_tokens`` puts BOS first where the checkpoint wants it.

        Raises ``ValueError`` for text that is no Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start}") from error
        # The batch call lets other threads run meanwhile; encode() holds the interpreter's lock,
        # a second for a long prompt.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        token_ids = encoding.ids
        if add_special_tokens and self._spec.add_bos_token and self.bos_token_id is not None:
            return [self.bos_token_id, *token_ids]
        return token_ids

    def decode(self, token_ids: Iterable[int], skip_control_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises ``ValueError`` for an id outside the vocabulary.
        """
        data = b"".join(self.token_bytes(token_id, skip_control_tokens) for token_id in token_ids)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_control_tokens: bool = True) -> bytes:
        """Returns the bytes of one token, which may be a part of a character."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id must be in [0, {self.vocab_size - 1}], got {token_id}")
        if token_id in self._control_ids and skip_control_tokens:
            return b""
        token = self._spec.tokens[token_id]
        if token_id not in self._literal_ids:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:
                pass  # a token outside the byte alphabet stands for itself, as in Hugging Face
        return token.encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, str | bool] | None = None,
    ) -> str:
        """Returns the prompt text of a chat, special tokens written out.

        ``continue_final_message`` leaves the last message open, without a generation prompt.
        Raises ``ValueError`` when the checkpoint has no chat template, for an unknown role, and
        when the template refuses the messages or the arguments.
        """
        if self._template is None:
            raise ValueError("this checkpoint has no chat template; send text or token ids")
        arguments = template_arguments or {}
        if continue_final_message:
            return self._template.render_open(messages, arguments)
        return self._template.render(messages, add_generation_prompt, arguments)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, str | bool] | None = None,
    ) -> list[int]:
        """Returns the token ids of a chat. The template writes BOS itself where it wants one."""
        text = self.render_chat(
            messages, add_generation_prompt, continue_final_message, template_arguments
        )
        return self.encode(text, add_special_tokens=False)


class TokenBytes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def token_bytes(self, token_id: int, skip_control_tokens: bool = True) -> bytes: ...


class Detokenizer:
    """Turns a stream of token ids into a stream of text, never a part of a character.

    What ``add`` and ``finish`` returned, joined, is ``tokenizer.decode`` of all ids. At most the
    first 3 bytes of a character are held back, until the rest comes or cannot come any more.
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


def _build(spec: TokenizerSpec) -> tokenizers.Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(spec.tokens)}
    if len(vocabulary) < len(spec.tokens):
        raise ValueError(
            f"of the tokenizer's {len(spec.tokens)} tokens only {len(vocabulary)} are different"
        )
    merges = []
    for merge in spec.merges:
        # A space inside a token is another character in the byte alphabet.
        left, separator, right = merge.partition(" ")
        if not (left and separator and right):
            raise ValueError(f"a merge must be two tokens and a space, got {merge!r:.40}")
        merges.append((left, right))
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            ignore_merges=spec.pre_tokenizer in _IGNORE_MERGES,
        )
    except Exception as error:  # the library has no narrower type
        raise ValueError(f"the tokenizer's merges do not fit its tokens: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    if spec.pre_tokenizer in _NORMALIZERS:
        tokenizer.normalizer = _NORMALIZERS[spec.pre_tokenizer]()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[spec.pre_tokenizer]()
    tokenizer.add_special_tokens(
        [AddedToken(spec.tokens[i], special=True, normalized=False) for i in spec.control_token_ids]
    )
    tokenizer.add_tokens(
        [AddedToken(spec.tokens[i], special=False, normalized=False) for i in spec.added_token_ids]
    )
    return tokenizer


def _special_tokens(spec: TokenizerSpec) -> dict[str, str]:
    tokens = {}
    if spec.bos_token_id is not None:
        tokens["bos_token"] = spec.tokens[spec.bos_token_id]
    if spec.eos_token_ids:
        tokens["eos_token"] = spec.tokens[spec.eos_token_ids[0]]
    return tokens


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
