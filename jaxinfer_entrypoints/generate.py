"""Generates offline: prompts in, text or JSON lines out. ``python scripts/generate.py --help``."""

from jaxinfer_entrypoints.entry import STARTED, run_main  # before all others: see there

# isort: split

import argparse
import codecs
import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxinfer.batch import BatchShape
from jaxinfer.engine import Engine
from jaxinfer.request import LIMITS, Ending, FinishReason, Request, SamplingParams
from jaxinfer.schedule import TokenLogprobs
from jaxinfer_entrypoints.command_line.engine import add_engine_options, load_options
from jaxinfer_entrypoints.command_line.sampling import (
    add_sampling_options,
    checked_text_options,
    describe_sampling,
    sampling_params,
)
from jaxinfer_entrypoints.generation import Generation, Generations
from jaxinfer_entrypoints.inputs.prompt_lines import PromptLine, parse_lines
from jaxinfer_entrypoints.llm import LLM
from jaxinfer_entrypoints.loading.phases import Phases
from serving.request_checks import DEFAULT_MAX_TOKENS
from serving.request_stream import TextOutput
from serving.rpc.admission import stop_tokens
from serving.text.output_text import TextOptions, output_texts
from serving.text.tokenizer import Tokenizer

MOST_NAMED = 20  # prompts in one line


@dataclass
class Choice:
    """One continuation of a prompt; times are seconds since all prompts were added."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, told: TextOutput, seconds: float) -> None:
        """Takes what is new."""
        if told.output.token_ids and not self.token_ids:
            self.first_token_seconds = seconds
        self.token_ids += told.output.token_ids
        self.texts.append(told.text)
        self.logprobs += told.output.logprobs
        self.total_seconds = seconds
        self.num_drafted_tokens = told.output.num_drafted_tokens
        self.num_accepted_tokens = told.output.num_accepted_tokens
        self.finish_reason = told.output.finish_reason
        self.stop_string = told.stop_string


@dataclass
class Answer:
    """The choices of one prompt as far as they have come; ``place``: where it was given."""

    place: str
    generation: Generation
    choices: list[Choice]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    def add(self, told: TextOutput, seconds: float) -> None:
        """Takes what is new of one choice."""
        self.prompt_logprobs += told.output.prompt_logprobs
        self.choices[told.output.choice].add(told, seconds)


def main() -> None:
    """Entry point ``jaxinfer-generate``."""
    run_main(generate)


def generate() -> None:
    """Reads all prompts, checks them, loads the model, and prints results in input order."""
    options = parse_arguments()
    sampling_params(options)  # what cannot be is refused before anything is fetched
    checked_text_options(options)
    wanted = load_options(options)
    inputs = read_inputs(options)
    phases = Phases(STARTED, quiet=options.quiet)
    phases.add("import", time.perf_counter() - STARTED)
    answers: list[Answer] = []

    def pick_shapes(
        engine: Engine, tokenizer: Tokenizer, default: SamplingParams, ending: Ending
    ) -> Sequence[BatchShape] | None:
        # What does not fit is refused before the weights are loaded.
        sampling = sampling_params(options, default)
        text_options = checked_text_options(options, ending)
        if describe_sampling(default, ending) and not options.quiet:
            note = "sampling, by generation_config.json where no flag says else"
            said = describe_sampling(sampling, Ending(text_options.stop, text_options.min_tokens))
            print(f"{note}: {said}", file=sys.stderr)
        new_text = output_texts(tokenizer, text_options)
        for number, line in enumerate(inputs):
            seed = secrets.randbits(63) if options.seed is None else options.seed
            seeded = replace(sampling, seed=seed)
            try:
                prompt = tuple(encode(line, tokenizer, options))
                request = make_request(prompt, seeded, engine, tokenizer, text_options, options)
            except ValueError as error:
                raise ValueError(f"{line.place}: {error}") from error
            request = replace(request, request_id=str(number))
            generation = Generation.of(request, new_text)
            answers.append(Answer(line.place, generation, [Choice() for _ in range(request.n)]))
        return shapes_for(engine, [answer.generation.request for answer in answers])

    llm = LLM.load(wanted, phases, pick_shapes)
    phases.print_table()
    run(llm.generations, answers, options)


def shapes_for(engine: Engine, requests: Sequence[Request]) -> Sequence[BatchShape] | None:
    """The steps that ``requests`` need; None, which is all, where many are to run at once.

    Of few requests each program takes longer to compile than it saves.
    """
    choices = sum(request.n for request in requests)
    rows = min(shape.num_decodes for shape in engine.shapes if not shape.num_drafts)
    if choices > rows:
        return None
    counts, size = engine.spec.config.tile_counts, engine.spec.config.chunk_tile
    tiles = sum(-(-len(request.prompt_token_ids) // size) for request in requests)
    tiles = min((count for count in counts if count >= tiles), default=counts[-1])
    drafts = [s for s in engine.shapes if s.num_drafts and not s.num_tiles]
    return [BatchShape(rows, 0), BatchShape(rows, tiles), *drafts]


def make_request(
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    engine: Engine,
    tokenizer: Tokenizer,
    text_options: TextOptions,
    options: argparse.Namespace,
) -> Request:
    """A request that is known to fit.

    ``text_options`` have the fewest tokens where nobody says how many: no more than the most.
    """
    room = engine.spec.config.max_model_len - len(prompt)
    max_tokens = options.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, room))
    fewest, is_default = text_options.min_tokens, options.min_tokens is None
    request = Request(
        request_id="",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        eos_token_ids=tokenizer.eos_token_ids,
        ignore_eos=options.ignore_eos,
        stop_token_ids=stop_tokens(options.stop_token_id, text_options, tokenizer),
        min_tokens=min(fewest, max_tokens) if is_default else fewest,
        n=options.n,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
    )
    request.check_fits(engine.spec.model.num_tokens, engine.spec.config.max_model_len)
    return request


def run(generations: Generations, answers: list[Answer], options: argparse.Namespace) -> None:
    """Steps until all are finished; prints each as soon as all before it are printed.

    A single answer that is not JSON is printed as it comes. Where a step fails, those that are
    finished are printed all the same, and the others are named.
    """
    is_streaming = len(answers) == options.n == 1 and not options.json
    for answer in answers:
        generations.add(answer.generation)
    added, printed = time.perf_counter(), 0
    disable = True if options.quiet or is_streaming else None
    with tqdm(total=len(answers), desc="generate", file=sys.stderr, disable=disable) as bar:
        while generations.has_unfinished:
            try:
                # Nothing yet is not the end: the engine may have work in flight.
                news = generations.step()
            except (Exception, KeyboardInterrupt):
                print_what_is_there(answers, printed, options)
                raise
            for generation, told in news:
                answers[int(generation.request.request_id)].add(told, time.perf_counter() - added)
                if is_streaming:
                    print(told.text, end="", flush=True)
            while printed < len(answers) and answers[printed].generation.is_finished:
                if not is_streaming:
                    print_result(answers[printed], options)
                printed += 1
                bar.update()
    assert printed == len(answers), "the engine lost a request"
    if is_streaming:
        print()


def print_what_is_there(answers: list[Answer], first: int, options: argparse.Namespace) -> None:
    """Prints those from ``first`` on that are finished, and on stderr which are not."""
    lost = list[str]()
    for answer in answers[first:]:
        if answer.generation.is_finished:
            print_result(answer, options)
        else:
            lost.append(answer.place)
    more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
    print(f"not answered: {', '.join(lost[:MOST_NAMED])}{more}", file=sys.stderr)


def print_result(answer: Answer, options: argparse.Namespace) -> None:
    """One line of JSON, or the texts."""
    request, choices = answer.generation.request, answer.choices
    if not options.json:
        for choice in choices:
            print("".join(choice.texts), flush=True)
        return
    described = [describe(choice, options.logprobs is not None) for choice in choices]
    result: dict[str, Any] = {
        "prompt_token_ids": request.prompt_token_ids,
        **(described[0] if request.n == 1 else {"choices": described}),
        "seed": request.sampling.seed,
        "usage": {
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": sum(len(choice.token_ids) for choice in choices),
            "drafted_tokens": sum(choice.num_drafted_tokens for choice in choices),
            "accepted_tokens": sum(choice.num_accepted_tokens for choice in choices),
        },
        "timings": {
            "first_token_seconds": round(min(c.first_token_seconds for c in choices), 6),
            "total_seconds": round(max(c.total_seconds for c in choices), 6),
        },
    }
    if options.prompt_logprobs is not None:
        result["prompt_logprobs"] = [entry and asdict(entry) for entry in answer.prompt_logprobs]
    print(json_line(result, sys.stdout.encoding), flush=True)


def json_line(value: Any, encoding: str | None) -> str:
    """Returns one line of JSON; characters are escaped that ``encoding`` may lack."""
    is_complete = codecs.lookup(encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_complete)


def describe(choice: Choice, with_logprobs: bool) -> dict[str, Any]:
    """Describes one choice as JSON."""
    assert choice.finish_reason
    result: dict[str, Any] = {
        "token_ids": choice.token_ids,
        "text": "".join(choice.texts),
        "finish_reason": choice.finish_reason.value,
    }
    if choice.stop_string is not None:
        result["stop_string"] = choice.stop_string
    if with_logprobs:
        result["logprobs"] = [asdict(entry) for entry in choice.logprobs]
    return result


def read_inputs(options: argparse.Namespace) -> list[PromptLine]:
    """Prompts of the command line, or the lines of ``--input``; every line is checked first."""
    if options.prompts:
        return [
            PromptLine(f"prompt {number}", "prompt", prompt)
            for number, prompt in enumerate(options.prompts, start=1)
        ]
    if options.input == "-":
        return parse_lines(sys.stdin, "standard input")
    with Path(options.input).open(encoding="utf-8-sig") as file:
        return parse_lines(file, options.input)


def encode(line: PromptLine, tokenizer: Tokenizer, options: argparse.Namespace) -> list[int]:
    """Token ids of one input; ``--chat`` makes a user's message of a plain prompt."""
    if line.kind == "token_ids":
        return line.content
    parses = options.parse_special_tokens
    if line.kind == "messages":
        return tokenizer.encode_chat(line.content, parse_special_tokens=parses)
    LIMITS["prompt_characters"].check("prompt_characters", len(line.content))
    if options.chat:
        message = {"role": "user", "content": line.content}
        return tokenizer.encode_chat([message], parse_special_tokens=parses)
    return tokenizer.encode(line.content, parse_special_tokens=parses)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text offline.")
    parser.add_argument("prompts", nargs="*", help="prompts; or use --input")
    parser.add_argument(
        "--input", help="JSON lines, each with prompt, messages or token_ids; - reads stdin"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON a prompt")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's chat message")
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help='"<|im_end|>" and its like in prompts are those tokens, and not text',
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_sampling_options(parser)
    add_engine_options(parser)
    options = parser.parse_args()
    if bool(options.prompts) == bool(options.input):
        parser.error("give prompts or --input, one of the two")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(options, name) is not None and not options.json:
            parser.error(f"--{name.replace('_', '-')} needs --json")
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {options.max_tokens}")
    return options
