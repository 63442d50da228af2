# pyright: reportMissingImports=false
"""Writes tokenizer_reference.json: token ids of small tokenizers of every kind, by transformers.

Run in an environment of its own with Python 3.11:

    pip install transformers==5.23.0 sentencepiece tiktoken mistral-common blobfile
    python make_tokenizer_reference.py

Each tokenizer is trained here on a few lines, so that its vocabulary is small enough to be kept.
How texts are split comes from where each kind comes from: transformers' own classes, tiktoken and
mistral-common. Nothing of jaxinfer is used.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import mistral_common
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2
from tiktoken_ext import openai_public
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2

OUTPUT = Path(__file__).with_name("tokenizer_reference.json")
CORPUS = json.loads(Path(__file__).with_name("tokenizer_corpus.json").read_text())
SPECIAL = ["<|start|>", "<|end|>"]
VOCAB_SIZE = 520


def main() -> None:
    kinds = {name: byte_level(name, *how) for name, how in byte_level_kinds().items()}
    for name, has_prefix in (("sentencepiece", True), ("sentencepiece_no_prefix", False)):
        kinds[name] = sentence_piece(has_prefix)
    versions = {
        "transformers": transformers.__version__,
        "sentencepiece": sentencepiece.__version__,
    }
    text = json.dumps({"versions": versions, "kinds": kinds}, ensure_ascii=False)
    # A kind a line.
    OUTPUT.write_text(text.replace('}, "', '},\n"') + "\n")


def byte_level_kinds() -> dict[str, tuple[Any, Any, bool]]:
    """Normalizer, pre-tokenizer and whether merges are ignored for what is a token."""
    tekken = Path(str(mistral_common.__file__)).parent / "data" / "tekken_240911.json"
    pattern = json.loads(tekken.read_text())["config"]["pattern"]
    openai_public.load_tiktoken_bpe = lambda *_, **__: {}
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama = TikTokenConverter.__init__.__kwdefaults__ or {}
    llama = llama.get("pattern") or TikTokenConverter("").pattern
    return {
        "gpt-2": (None, whole, False),
        "smollm": (None, pre_tokenizers.Sequence([digits, whole]), False),
        "llama-bpe": (None, split(llama), True),
        "qwen2": (normalizers.NFC(), split(tokenization_qwen2.PRETOKENIZE_REGEX), False),
        "gpt-4o": (None, split(openai_public.o200k_base()["pat_str"]), False),
        "tekken": (None, split(pattern), True),
    }


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """As transformers builds it for Qwen2 and for files of tiktoken."""
    by_pattern = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([by_pattern, to_bytes])


def byte_level(name: str, normalizer: Any, pre: Any, ignore_merges: bool) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS["training"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "pre_tokenizer": name,
        "tokens": [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])],
        "merges": [" ".join(merge) for merge in model["merges"]],
        **ids_of(wrapped),
    }


def ids_of(tokenizer: Any) -> dict[str, Any]:
    """Ids of every text, with special tokens parsed and as text, and the text of the first."""
    parsed, literal = [], []
    for text in CORPUS["texts"]:
        tokenizer._tokenizer.encode_special_tokens = False
        parsed.append(tokenizer.encode(text, add_special_tokens=False))
        # Its own keyword does not reach every version of the library.
        tokenizer._tokenizer.encode_special_tokens = True
        literal.append(tokenizer._tokenizer.encode(text, add_special_tokens=False).ids)
    tokenizer._tokenizer.encode_special_tokens = False
    decoded = [tokenizer.decode(ids, skip_special_tokens=False) for ids in literal]
    return {"parsed": parsed, "literal": literal, "decoded": decoded}


def sentence_piece(has_prefix: bool) -> dict[str, Any]:
    """A BPE model of SentencePiece itself, and the tokenizer.json that transformers makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS["training"]),
            model_prefix=f"{folder}/small",
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            add_dummy_prefix=has_prefix,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.99,
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/small.model")
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(Path(f"{folder}/small.model").read_bytes())
        kind = LlamaTokenizer if has_prefix else GemmaTokenizer
        options = {} if has_prefix else {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
        vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        scores = [piece.score for piece in proto.pieces]
        merges = transformers.convert_slow_tokenizer.generate_merges(
            vocab, dict(zip(vocab, scores, strict=True))
        )
        fast = kind(vocab=vocab, merges=merges, mask_token=None, **options)
    return {
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": scores,
        "types": [piece.type for piece in proto.pieces],
        "sentencepiece": [processor.encode(text) for text in CORPUS["texts"]],
        "tokenizer_json": fast._tokenizer.to_str(),
        **ids_of(fast),
    }


if __name__ == "__main__":
    main()
