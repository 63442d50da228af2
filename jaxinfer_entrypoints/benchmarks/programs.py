"""``bench.py programs``: a step with drafts as one XLA program, as two, and as three.

Other engines draft in one program and verify in another, with the host between them. Here the same
functions are compiled apart, so that all that differs is what lies between.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.batch import Batch, BatchShape, unpack
from jaxinfer.engine import Engine
from jaxinfer.speculation.drafter import TargetAndDraft, draft
from jaxinfer.speculation.drafts import Drafts
from jaxinfer.step import (
    Verified,
    accept,
    compiler_options,
    merged,
    verify,
    with_draft_lens,
    without_ended,
)
from jaxinfer.step_state import StepResult, StepState
from jaxinfer_entrypoints.benchmarks.measuring import describe, measure
from jaxinfer_entrypoints.benchmarks.ranges import check_range
from jaxinfer_entrypoints.benchmarks.speculation import (
    drafts_of,
    engine_for,
    prompt_texts,
    requests_for,
)
from jaxinfer_entrypoints.loading.assembly import LoadedModel

Program = Callable[[Any, StepState, jax.Array], tuple[StepState, StepResult]]
WAYS = ("one program", "two programs", "three programs", "three, drafts by the host")


@dataclass(frozen=True)
class Options:
    """New tokens, and how often all ways are taken in turn. ``ValueError`` if out of range."""

    output_len: int = 96
    rounds: int = 5

    def __post_init__(self) -> None:
        check_range("output_len", self.output_len, 8, 1024)
        check_range("rounds", self.rounds, 1, 100)


def run(loaded: LoadedModel, options: Options) -> dict[str, Any]:
    """Milliseconds a token of one sequence in each way, medians of rounds, one step a call."""
    name = loaded.spec.config.draft or "ngram"
    engine = engine_for(loaded, 1, draft=name, max_steps_per_call=1, adapt_drafts=False)
    whole = {shape: program for shape, program in engine.programs.items() if shape.num_drafts}
    apart = {shape: _Stages(engine, shape) for shape in whole}
    text = prompt_texts()["edit code"]
    requests = requests_for(loaded, text, 1, options.output_len)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens, drafted = [], (0, 0)
    for number in range(options.rounds + 1):
        for way in WAYS:
            for shape, program in whole.items():
                other = {"one program": program, **apart[shape].ways()}
                engine.replace_program(shape, other[way])
            measured = measure(engine, requests)
            tokens.append(measured.token_ids)
            drafted = drafts_of(measured)
            if number:  # the first round compiles
                times[way].append(1e3 * measured.decode_seconds / measured.decode_tokens)
    return describe(loaded) | {
        "draft": loaded.options.draft or name,
        "num_drafts": loaded.spec.config.num_drafts,
        "output_len": options.output_len,
        "rounds": options.rounds,
        "acceptance_rate": round(drafted[1] / drafted[0], 4) if drafted[0] else None,
        "ms_per_token": {way: round(statistics.median(of), 3) for way, of in times.items()},
        "of_one_program": {
            way: round(statistics.median(np.array(of) / np.array(times["one program"])).item(), 3)
            for way, of in times.items()
        },
        "tokens_equal": all(given == tokens[0] for given in tokens),
    }


class _Stages:
    """The parts of one step, each compiled by itself; the state is donated from one to the next."""

    def __init__(self, engine: Engine, shape: BatchShape) -> None:
        self.config, self.shape, self.graphs = engine.spec.config, shape, engine.graphs
        platform = engine.spec.mesh.devices.flat[0].platform
        options = compiler_options(platform, engine.spec.dtypes, engine.spec.config.batch_invariant)
        compiled = functools.partial(jax.jit, compiler_options=options)
        self.draft = compiled(self._draft, donate_argnums=1)
        self.verify = compiled(self._verify, donate_argnums=1)
        self.accept = compiled(self._accept, donate_argnums=0)
        self.verify_and_accept = compiled(self._verify_and_accept, donate_argnums=1)

    def ways(self) -> dict[str, Program]:
        """Programs of more than one part."""
        return {
            "two programs": self.two,
            "three programs": self.three,
            "three, drafts by the host": self.by_host,
        }

    def two(self, parameters: Any, state: StepState, packed: Any) -> Any:
        drafts, state = self.draft(parameters, state, packed)
        return self.verify_and_accept(parameters, state, packed, drafts)

    def three(self, parameters: Any, state: StepState, packed: Any) -> Any:
        drafts, state = self.draft(parameters, state, packed)
        verified, state = self.verify(parameters, state, packed, drafts)
        return self.accept(state, packed, drafts, verified)

    def by_host(self, parameters: Any, state: StepState, packed: Any) -> Any:
        drafts, state = self.draft(parameters, state, packed)
        drafts = jax.device_put(jax.device_get(drafts))  # waits, as a scheduler would
        verified, state = self.verify(parameters, state, packed, drafts)
        return self.accept(state, packed, drafts, verified)

    def _batch(self, state: StepState, packed: jax.Array) -> Batch:
        return without_ended(self.config, state, unpack(packed, self.shape, self.config))

    def _draft(self, parameters: TargetAndDraft, state: StepState, packed: jax.Array) -> Any:
        batch = self._batch(state, packed)
        return draft(merged(self.graphs, parameters), self.config, self.shape, state, batch)

    def _verify(
        self, parameters: TargetAndDraft, state: StepState, packed: jax.Array, drafts: Drafts
    ) -> Any:
        batch, target = self._batch(state, packed), merged(self.graphs, parameters).target
        return verify(target, self.config, self.shape, state, batch, drafts)

    def _accept(
        self, state: StepState, packed: jax.Array, drafts: Drafts, verified: Verified
    ) -> Any:
        batch = self._batch(state, packed)
        state, result = accept(self.config, state, batch, drafts, verified)
        return state, with_draft_lens(self.config, state, batch, result)

    def _verify_and_accept(
        self, parameters: TargetAndDraft, state: StepState, packed: jax.Array, drafts: Drafts
    ) -> Any:
        verified, state = self._verify(parameters, state, packed, drafts)
        return self._accept(state, packed, drafts, verified)


def table(figures: dict[str, Any]) -> str:
    """The ways as text."""
    lines = [
        f"{figures['model']}, {figures['num_drafts']} drafts by {figures['draft']}, one sequence: "
        f"tokens {'equal' if figures['tokens_equal'] else 'DIFFER'}"
    ]
    for way, milliseconds in figures["ms_per_token"].items():
        ratio = figures["of_one_program"][way]
        lines.append(f"{way:<28} {milliseconds:>8.2f} ms a token  {ratio:>6.3f}x of one")
    return "\n".join(lines)
