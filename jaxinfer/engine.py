"""The engine: requests in, tokens out. The one place where host scheduling meets device state."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer import models
from jaxinfer import step as step_program
from jaxinfer.batch import BatchShape, batch_shapes, fitting_shape, pack
from jaxinfer.config import DtypePolicy, EngineConfig, ModelConfig
from jaxinfer.kv_cache import page_bytes
from jaxinfer.request import Request, SamplingParams
from jaxinfer.schedule import EngineStats, RequestOutput, Schedule, ScheduledSequence, StepOutput
from jaxinfer.scheduler import Scheduler
from jaxinfer.sharding import abstract_parameters
from jaxinfer.step import Parameters

Progress = Callable[[int, int], None]


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it.

    ``abstract_parameters`` says which arrays are wanted; give them to ``start``, which allocates
    the KV cache and must come before the first step. ``compile`` may run before or meanwhile.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, dtypes: DtypePolicy, mesh: Mesh
    ) -> None:
        self.model, self.config, self.dtypes, self.mesh = model, config, dtypes, mesh
        self._graph, state = models.abstract(model, dtypes)
        self.abstract_parameters = abstract_parameters(state, mesh)
        self._abstract_state = step_program.abstract_state(model, config, dtypes, mesh)
        self._platform = mesh.devices.flat[0].platform
        self._shapes = batch_shapes(config)
        self._programs: dict[tuple[Any, BatchShape], Any] = {}
        self._scheduler = Scheduler(config)
        # Of requests that live: when they were added, and how long they waited for a first step.
        self._added_times: dict[str, float] = {}
        self._queue_seconds: dict[str, float] = {}
        self._parameters: Parameters | None = None
        self._state: step_program.StepState | None = None

    @property
    def num_programs(self) -> int:
        """How many step programs ``compile`` makes."""
        return len(self._shapes)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache over all devices."""
        size = page_bytes(self.model, self.config.page_size, self.dtypes.kv_cache)
        return self.config.num_pages * size

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would have something to do."""
        return self._scheduler.has_unfinished

    @property
    def stats(self) -> EngineStats:
        """Counts for load reports."""
        return self._scheduler.stats

    def compile(self, progress: Progress | None = None) -> None:
        """Compiles every step program, several at a time. Nothing compiles after this.

        ``progress(done, total)`` is called from this thread as programs are finished.
        """
        self._compile([(step_program.step, shape) for shape in self._shapes], progress)

    def start(self, parameters: Parameters) -> None:
        """Takes the parameters and allocates the device state.

        Raises ``ValueError`` when they are not what ``abstract_parameters`` asks for.
        """
        check_parameters(self.abstract_parameters, parameters)
        self._parameters = parameters
        abstract = self._abstract_state
        allocate = jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        )
        self._state = allocate()

    def add(self, request: Request) -> None:
        """Queues a request. Raises ``ValueError`` when this engine can never serve it."""
        request.check_fits(self.model.vocab_size, self.config.max_model_len)
        self._scheduler.add(request)
        self._added_times[request.request_id] = time.perf_counter()

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees its pages; unknown and finished ids are ignored."""
        self._scheduler.abort(request_id)
        self._forget(request_id)

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns what it yielded; [] when there is nothing to do."""
        schedule = self._scheduler.schedule()
        if not schedule:
            return []
        now = time.perf_counter()
        for chunk in schedule.chunks:
            added = self._added_times[chunk.request_id]
            self._queue_seconds.setdefault(chunk.request_id, now - added)
        sampled, rows = self._dispatch(schedule)
        token_ids = np.asarray(sampled)
        output = StepOutput(tuple((name, (int(token_ids[row]),)) for name, row in rows.items()))
        return [self._timed(output) for output in self._scheduler.update(schedule, output)]

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """Negative log-likelihood in nats of tokens 1, 2, ... given all before: [n - 1] float32.

        One window of at most max_model_len tokens; the engine must be idle, since the window's keys
        and values take the first pages. Compiles its own program at first use.
        """
        size, tile = len(token_ids), self.config.chunk_tile
        if not 2 <= size <= self.config.max_model_len:
            raise ValueError(f"a window of 2 to {self.config.max_model_len} tokens, got {size}")
        if self.has_unfinished:
            raise ValueError("score needs an idle engine, requests are still running")
        shape = self._shapes[-1]
        program = (step_program.score, shape)
        if program not in self._programs:
            self._compile([program], None)
        losses = []
        step_tokens = shape.num_tiles * tile
        for start in range(0, size, step_tokens):
            window = tuple(token_ids[start : start + step_tokens])
            packed, _ = pack(self._scoring_schedule(start, window), shape, self.config)
            targets = np.zeros(step_tokens, np.int32)
            following = token_ids[start + 1 : start + 1 + step_tokens]
            targets[: len(following)] = following
            self._state, step_losses = self._programs[program](
                self._parameters, self._state, packed, targets.reshape(shape.num_tiles, tile)
            )
            losses.append(np.asarray(step_losses).reshape(-1)[: len(following)])
        return np.concatenate(losses)

    def _timed(self, output: RequestOutput) -> RequestOutput:
        queue_seconds = self._queue_seconds[output.request_id]
        if output.finish_reason:
            self._forget(output.request_id)
        return dataclasses.replace(output, queue_seconds=queue_seconds)

    def _forget(self, request_id: str) -> None:
        self._added_times.pop(request_id, None)
        self._queue_seconds.pop(request_id, None)

    def _scoring_schedule(self, start: int, token_ids: tuple[int, ...]) -> Schedule:
        pages = -(-(start + len(token_ids)) // self.config.page_size)
        chunk = ScheduledSequence(
            request_id="score",
            slot=0,
            start=start,
            token_ids=token_ids,
            page_ids=tuple(range(pages)),
            samples=False,
            sampling=SamplingParams(),
        )
        return Schedule(chunks=(chunk,))

    def _dispatch(self, schedule: Schedule) -> tuple[jax.Array, dict[str, int]]:
        """Sends a step to the device: the sampled tokens, not yet read, and whose row is which."""
        shape = fitting_shape(self._shapes, schedule, self.config.chunk_tile)
        packed, rows = pack(schedule, shape, self.config)
        program = self._programs[step_program.step, shape]
        self._state, sampled = program(self._parameters, self._state, packed)
        return sampled, rows

    def _compile(self, wanted: Sequence[tuple[Any, BatchShape]], progress: Progress | None) -> None:
        options = step_program.compiler_options(self._platform, self.dtypes)
        # Tracing holds the interpreter's lock, compiling does not: two threads keep two cores busy.
        with ThreadPoolExecutor(max_workers=2) as threads:
            compiling = {}
            for program, shape in wanted:
                lowered = step_program.lower(
                    program,
                    self._graph,
                    self.config,
                    shape,
                    self.abstract_parameters,
                    self._abstract_state,
                    self.mesh,
                )
                future = threads.submit(lowered.compile, compiler_options=options)
                compiling[future] = (program, shape)
            for done, future in enumerate(as_completed(compiling), start=1):
                self._programs[compiling[future]] = future.result()
                if progress:
                    progress(done, len(wanted))


def check_parameters(wanted: Parameters, given: Parameters) -> None:
    """Raises ``ValueError`` naming the first parameter that is missing or of another shape."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(given)}
    for path, leaf in jax.tree.leaves_with_path(wanted):
        name = jax.tree_util.keystr(path)
        array = leaves.pop(name, None)
        if array is None:
            raise ValueError(f"parameter {name} is missing")
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"parameter {name} is {array.dtype}{array.shape}, "
                f"the model wants {leaf.dtype}{leaf.shape}"
            )
    if leaves:
        raise ValueError(f"the model has no parameter {next(iter(leaves))}")
