"""Generates offline: prompts in, text or JSON lines out. ``python scripts/generate.py --help``."""

import time

STARTED = time.perf_counter()

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

if __package__ in (None, ""):  # run as a file: the packages lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from jaxinfer.request import LIMITS, FinishReason, Request, SamplingParams
from scripts.assembly import LoadedModel, add_engine_options, load_model, run_main
from scripts.phases import Phases
from serving.tokenizer import Detokenizer, Tokenizer

DEFAULT_MAX_TOKENS = 256
INPUT_KINDS = ("prompt", "messages", "token_ids")
MAX_LINE_CHARACTERS = 16 << 20


@dataclass
class Generation:
    """One prompt's way through the engine; times are seconds since it was added."""

    prompt_token_ids: list[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


def main() -> None:
    """Entry point ``jaxinfer-generate``."""
    run_main(generate)


def generate() -> None:
    """Reads all prompts, checks them, loads the model, and prints results in input order."""
    options = parse_arguments()
    inputs = read_inputs(options)
    phases = Phases(STARTED, quiet=options.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    loaded = load_model(options, phases)
    phases.print_table()
    generations, requests = [], []
    for number, line in enumerate(inputs):
        token_ids = encode(line, loaded.tokenizer, options.chat)
        seed = options.seed if options.seed is not None else secrets.randbits(63)
        generations.append(Generation(token_ids, seed))
        requests.append(make_request(number, generations[-1], loaded, options))
    if len(requests) == 1 and not options.json:
        stream(loaded, requests[0], generations[0])
        return
    for request in requests:
        loaded.engine.add(request)
    run(loaded, generations, options)


def make_request(
    number: int, generation: Generation, loaded: LoadedModel, options: argparse.Namespace
) -> Request:
    """A request that is known to fit; errors name the input."""
    prompt = tuple(generation.prompt_token_ids)
    room = loaded.engine_config.max_model_len - len(prompt)
    try:
        request = Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            max_tokens=options.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room)),
            sampling=SamplingParams(
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=generation.seed,
            ),
            eos_token_ids=loaded.tokenizer.eos_token_ids,
            ignore_eos=options.ignore_eos,
        )
        request.check_fits(loaded.model.vocab_size, loaded.engine_config.max_model_len)
    except ValueError as error:
        raise ValueError(f"input {number + 1}: {error}") from error
    return request


def stream(loaded: LoadedModel, request: Request, generation: Generation) -> None:
    """Prints one answer as it comes."""
    detokenizer = Detokenizer(loaded.tokenizer)
    loaded.engine.add(request)
    added = time.perf_counter()
    while loaded.engine.has_unfinished:
        for output in loaded.engine.step():
            note(generation, output.token_ids, output.finish_reason, added)
            print(detokenizer.add(output.token_ids), end="", flush=True)
    print(detokenizer.finish())


def run(loaded: LoadedModel, generations: list[Generation], options: argparse.Namespace) -> None:
    """Steps until all are finished; prints each as soon as all before it are printed."""
    added, printed = time.perf_counter(), 0
    disable = True if options.quiet else None
    with tqdm(total=len(generations), desc="generate", file=sys.stderr, disable=disable) as bar:
        while loaded.engine.has_unfinished:
            for output in loaded.engine.step():
                generation = generations[int(output.request_id)]
                note(generation, output.token_ids, output.finish_reason, added)
                bar.update(generation.finish_reason is not None)
            while printed < len(generations) and generations[printed].finish_reason:
                print_result(generations[printed], loaded.tokenizer, options.json)
                printed += 1


def note(
    generation: Generation, token_ids: Sequence[int], reason: FinishReason | None, added: float
) -> None:
    """Adds an output to what is known of a generation."""
    now = time.perf_counter() - added
    if token_ids and not generation.token_ids:
        generation.first_token_seconds = now
    generation.token_ids += token_ids
    generation.total_seconds = now
    generation.finish_reason = reason


def print_result(generation: Generation, tokenizer: Tokenizer, as_json: bool) -> None:
    """One line of JSON, or the text."""
    text = tokenizer.decode(generation.token_ids)
    if not as_json:
        print(text, flush=True)
        return
    assert generation.finish_reason
    result: dict[str, Any] = {
        "prompt_token_ids": generation.prompt_token_ids,
        "token_ids": generation.token_ids,
        "text": text,
        "finish_reason": generation.finish_reason.value,
        "seed": generation.seed,
        "usage": {
            "prompt_tokens": len(generation.prompt_token_ids),
            "completion_tokens": len(generation.token_ids),
        },
        "timings": {
            "first_token_seconds": round(generation.first_token_seconds, 6),
            "total_seconds": round(generation.total_seconds, 6),
        },
    }
    print(json.dumps(result, ensure_ascii=False), flush=True)


def read_inputs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts of the command line, or the lines of ``--input``; every line is checked first."""
    if options.prompts:
        return [{"prompt": prompt} for prompt in options.prompts]
    if options.input == "-":
        return parse_lines(sys.stdin)
    with Path(options.input).open(encoding="utf-8") as file:
        return parse_lines(file)


def parse_lines(file: TextIO) -> list[dict[str, Any]]:
    """JSON objects with exactly one of prompt, messages and token_ids. Raises ``ValueError``."""
    inputs = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_CHARACTERS:
            raise ValueError(f"line {number} has more than {MAX_LINE_CHARACTERS} characters")
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in INPUT_KINDS:
            raise ValueError(
                f"line {number} must be an object with exactly one of {', '.join(INPUT_KINDS)}"
            )
        check_line(number, value)
        inputs.append(value)
    if not inputs:
        raise ValueError("no prompts: the input has no lines")
    return inputs


def check_line(number: int, value: dict[str, Any]) -> None:
    """Raises ``ValueError`` naming the line when a prompt is not of its kind."""
    kind, content = next(iter(value.items()))
    if kind == "prompt" and not isinstance(content, str):
        raise ValueError(f"line {number}: prompt must be a string")
    if kind == "token_ids" and not (
        isinstance(content, list) and all(type(token) is int for token in content)
    ):
        raise ValueError(f"line {number}: token_ids must be a list of whole numbers")
    if kind == "messages":
        fits = isinstance(content, list) and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(part, str) for part in message.values())
            for message in content
        )
        if not fits:
            raise ValueError(f"line {number}: messages must be objects with role and content")
        LIMITS["messages"].check(f"line {number}: number of messages", len(content))


def encode(line: dict[str, Any], tokenizer: Tokenizer, chat: bool) -> list[int]:
    """Token ids of one input; ``chat`` makes a user's message of a plain prompt."""
    if "token_ids" in line:
        return line["token_ids"]
    if "messages" in line:
        return tokenizer.encode_chat(line["messages"])
    LIMITS["prompt_characters"].check("prompt_characters", len(line["prompt"]))
    if chat:
        return tokenizer.encode_chat([{"role": "user", "content": line["prompt"]}])
    return tokenizer.encode(line["prompt"])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text offline.")
    parser.add_argument("prompts", nargs="*", help="prompts; or use --input")
    parser.add_argument(
        "--input", help="JSON lines, each with prompt, messages or token_ids; - reads stdin"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON a prompt")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's chat message")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, help="new tokens at most (default: 256, or what the context has)"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, help="0 is off (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 is off (default)")
    group.add_argument("--seed", type=int, help="repeats a sampled run (default: random)")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end of the text")
    add_engine_options(parser)
    options = parser.parse_args()
    if bool(options.prompts) == bool(options.input):
        parser.error("give prompts or --input, one of the two")
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {options.max_tokens}")
    return options


if __name__ == "__main__":
    main()
