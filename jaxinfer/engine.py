"""The engine: requests in, tokens out. The one place where host scheduling meets device state."""

import dataclasses
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import models
from jaxinfer import step as step_program
from jaxinfer.batch import BatchShape, Packer, batch_shapes, fitting_shape
from jaxinfer.config import MAX_CPU_THREADS, DtypePolicy, ModelConfig
from jaxinfer.engine_spec import EngineSpec
from jaxinfer.host_clock import HostClock
from jaxinfer.kv_cache import num_bytes
from jaxinfer.request import Request
from jaxinfer.results import read_result
from jaxinfer.schedule import EngineStats, RequestOutput, Schedule
from jaxinfer.scheduler import Scheduler
from jaxinfer.sharding import abstract_parameters, device_bytes
from jaxinfer.slot_upload import lower_set_slot, slot_upload
from jaxinfer.speculation.draft_policy import DraftPolicy
from jaxinfer.speculation.drafter import TargetAndDraft
from jaxinfer.step import Parameters
from jaxinfer.step_state import StepResult, StepState, abstract_state

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Call:
    """A call of the device that was sent and is not read yet."""

    schedule: Schedule
    result: StepResult
    rows: list[int]
    num_drafts: int
    sent_seconds: float


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it.

    ``abstract_parameters`` says which arrays are wanted; give them to ``start``, which allocates
    the KV cache and must come before the first step. ``compile`` may run before or meanwhile.
    ``abstract_draft_parameters`` are those of the draft model, None without one.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        model, config, dtypes, mesh = spec.model, spec.config, spec.dtypes, spec.mesh
        self._platform = mesh.devices.flat[0].platform
        if config.batch_invariant and self._platform == "cpu" and dtypes.weights == "float32":
            _warn_of_many_threads()
        graph, self.abstract_parameters = self._abstract(model, dtypes)
        draft_graph, self.abstract_draft_parameters = None, None
        if spec.draft:
            draft_graph, self.abstract_draft_parameters = self._abstract(
                spec.draft.model, spec.draft.dtypes
            )
        self.graphs = TargetAndDraft(graph, draft_graph)
        self._abstract_state = abstract_state(spec)
        self.shapes = batch_shapes(config)
        self._programs: dict[BatchShape, Any] = {}
        self._set_slot: Any = None
        self._draft_policy = DraftPolicy(config)
        self._scheduler = Scheduler(config, self._draft_policy)
        self._read_seconds = 0.0
        self._packer = Packer(config)
        self._in_flight: deque[_Call] = deque()
        self._parameters: TargetAndDraft | None = None
        self._state: StepState | None = None
        self._clock = HostClock()

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache over all devices."""
        state = self._abstract_state
        return num_bytes((*state.kv_pages, *state.draft_kv_pages))

    @property
    def programs(self) -> Mapping[BatchShape, Any]:
        """The compiled step of each batch shape; empty before ``compile``."""
        return MappingProxyType(self._programs)

    def replace_program(self, shape: BatchShape, program: Any) -> None:
        """Runs ``program`` instead of the compiled one: for measurements of other ways.

        It takes and gives what ``step`` does: parameters, state and packed batch; state and result.
        """
        if shape not in self._programs:
            raise KeyError(f"no program of {shape} is compiled")
        self._programs[shape] = program

    @property
    def memory_by_program(self) -> dict[BatchShape, int]:
        """Bytes of temporaries of each step program, on each device."""
        return {
            shape: program.memory_analysis().temp_size_in_bytes
            for shape, program in self._programs.items()
        }

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Returns the bytes that the engine keeps on each of its devices, by kind."""
        state = self._abstract_state
        return {
            "parameters": device_bytes((self.abstract_parameters, self.abstract_draft_parameters)),
            "kv cache": device_bytes((state.kv_pages, state.draft_kv_pages)),
            "slots": device_bytes(dataclasses.replace(state, kv_pages=(), draft_kv_pages=())),
            "temporaries": max(self.memory_by_program.values(), default=0),
        }

    @property
    def has_unfinished(self) -> bool:
        """True while a step would have something to do."""
        return self._scheduler.has_unfinished

    @property
    def stats(self) -> EngineStats:
        """Counts for load reports."""
        return self._scheduler.stats

    @property
    def host_seconds(self) -> dict[str, float]:
        """Returns the host's seconds since start by phase, and the calls ``sent`` and ``read``.

        ``schedule``, ``pack``, ``dispatch``, ``wait`` (for the device), ``convert``, ``update``.
        """
        return dict(self._clock.seconds)

    @property
    def host_cpu_seconds(self) -> dict[str, float]:
        """The same in seconds that the engine's thread had a processor."""
        return dict(self._clock.cpu_seconds)

    def compile(
        self, progress: Progress | None = None, shapes: Sequence[BatchShape] | None = None
    ) -> None:
        """Compiles the step programs, several at a time. Nothing compiles after this.

        ``shapes``: only some of ``self.shapes``, one of them as large as all others in both ways;
        no step is then larger than it, and smaller ones are padded. ``progress(done, total)`` is
        called from this thread as programs are finished.
        """
        shapes = self.shapes if shapes is None else tuple(shapes)
        self._limit_steps(shapes)
        options = step_program.compiler_options(
            self._platform, self.spec.dtypes, self.spec.config.batch_invariant
        )
        programs: dict[BatchShape | None, Any] = {}
        # Tracing holds the interpreter's lock, compiling does not: two threads keep two cores busy.
        with ThreadPoolExecutor(max_workers=2) as threads:
            compiling = {}
            for shape in (*reversed(shapes), None):
                lowered = self._lower(shape)
                future = threads.submit(lowered.compile, compiler_options=options)
                compiling[future] = shape
            for done, future in enumerate(as_completed(compiling), start=1):
                programs[compiling[future]] = future.result()
                if progress:
                    progress(done, len(compiling))
        self._set_slot = programs.pop(None)
        self._programs = {shape: programs[shape] for shape in shapes}

    def _limit_steps(self, shapes: Sequence[BatchShape]) -> None:
        """Lets the scheduler plan no step that is larger than the largest of ``shapes``."""
        rows = max((shape.num_decodes for shape in shapes), default=0)
        tiles = max((shape.num_tiles for shape in shapes), default=0)
        if not tiles or BatchShape(rows, tiles) not in shapes or not set(shapes) <= {*self.shapes}:
            raise ValueError(f"no shape of {shapes} has room for all that the others have")
        if self.has_unfinished:
            raise RuntimeError("programs must be compiled before requests are added")
        limits = dataclasses.replace(
            self.spec.config,
            max_num_seqs=min(self.spec.config.max_num_seqs, rows),
            max_num_batched_tokens=min(
                self.spec.config.max_num_batched_tokens, tiles * self.spec.config.chunk_tile
            ),
        )
        self._scheduler.limit(limits)
        with_drafts = (shape for shape in shapes if shape.num_drafts and not shape.num_tiles)
        self._draft_policy.limit({shape.num_decodes for shape in with_drafts})

    def start(self, parameters: Parameters, draft_parameters: Parameters | None = None) -> None:
        """Takes the parameters, those of the draft model too, and allocates the device state.

        Raises ``ValueError`` when they are not what ``abstract_parameters`` and
        ``abstract_draft_parameters`` ask for.
        """
        check_parameters(self.abstract_parameters, parameters)
        check_parameters(self.abstract_draft_parameters or {}, draft_parameters or {})
        self._parameters = TargetAndDraft(parameters, draft_parameters)
        abstract = self._abstract_state
        allocate = jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        )
        self._state = allocate()

    def close(self) -> None:
        """Frees what ``start`` took of the devices' memory, and the programs; nothing runs after.

        The parameters are the caller's and stay.
        """
        for leaf in jax.tree.leaves(self._state):
            leaf.delete()
        self._parameters, self._state = None, None
        self._programs, self._set_slot = {}, None
        self._in_flight.clear()

    def add(self, request: Request) -> None:
        """Queues a request. Raises ``ValueError`` when this engine can never serve it."""
        request.check_fits(self.spec.model.num_tokens, self.spec.config.max_model_len)
        self._scheduler.add(request, time.monotonic())

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request, or one choice of it, and frees its pages; unknown ids are ignored."""
        self._scheduler.abort(request_id, choice)

    def step(self) -> list[RequestOutput]:
        """Sends the next step to the device and reads the one before; what that one yielded.

        [] is no sign of the end: see ``has_unfinished``.
        """
        with self._clock.timed("schedule"):
            schedule = self._scheduler.schedule(time.monotonic())
        if schedule:
            self._in_flight.append(self._dispatch(schedule))
            if len(self._in_flight) <= self.spec.config.steps_ahead:
                return []
        if not self._in_flight:
            return []
        return self._read(self._in_flight.popleft())

    def _dispatch(self, schedule: Schedule) -> _Call:
        """Sends a step to the device."""
        for chunk in schedule.chunks:
            if chunk.is_first:
                upload = slot_upload(chunk, self.spec.config)
                if upload is not None:
                    self._state = self._set_slot(self._state, *upload)
        with self._clock.timed("pack"):
            shape = fitting_shape(tuple(self._programs), schedule, self.spec.config.chunk_tile)
            packed, rows = self._packer.pack(schedule, shape)
        with self._clock.timed("dispatch"):
            self._state, result = self._programs[shape](self._parameters, self._state, packed)
        self._clock.count("sent")
        return _Call(schedule, result, rows, shape.num_drafts, time.perf_counter())

    def _read(self, call: _Call) -> list[RequestOutput]:
        """Waits for a call and hands its tokens to the scheduler."""
        with self._clock.timed("wait"):
            call.result.tokens.block_until_ready()
        self._clock.count("read")
        with self._clock.timed("convert"):
            output = read_result(call.schedule, call.result, call.rows, call.num_drafts)
        has_drafts, seconds = call.num_drafts > 0, self._device_seconds(call)
        self._draft_policy.note_call(call.schedule, output, has_drafts, seconds)
        with self._clock.timed("update"):
            return self._scheduler.update(call.schedule, output)

    def _device_seconds(self, call: _Call) -> float:
        """Returns how long the device took for a call that has just been read."""
        now = time.perf_counter()
        # The device began when the call came, or when it had done the one before.
        seconds = now - max(call.sent_seconds, self._read_seconds)
        self._read_seconds = now
        return seconds

    def _lower(self, shape: BatchShape | None) -> Any:
        if shape is None:
            return lower_set_slot(self.spec.config, self._abstract_state, self.spec.mesh)
        return step_program.lower(
            self.graphs,
            self.spec.config,
            shape,
            TargetAndDraft(self.abstract_parameters, self.abstract_draft_parameters),
            self._abstract_state,
            self.spec.mesh,
        )

    def _abstract(self, model: ModelConfig, dtypes: DtypePolicy) -> tuple[Any, Parameters]:
        """A model's graph and its abstract parameters."""
        graph, state = models.abstract(
            model.served(self.spec.config.max_model_len), dtypes, self.spec.mesh
        )
        return graph, abstract_parameters(state, self.spec.mesh)


def _warn_of_many_threads() -> None:
    """Scripts limit themselves; who makes an engine of their own has to be told."""
    threads = os.environ.get("NPROC", "")
    count = int(threads) if threads.isdecimal() else os.cpu_count() or 1
    if count > MAX_CPU_THREADS:
        warnings.warn(
            f"XLA has {count} threads here; with more than {MAX_CPU_THREADS} a request's tokens "
            f"may depend on what else is being served: set NPROC={MAX_CPU_THREADS} in the "
            f"environment before JAX starts, or batch_invariant=False",
            RuntimeWarning,
            stacklevel=3,
        )


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
