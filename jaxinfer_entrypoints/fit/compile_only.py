"""Will it fit? ``serve.py --compile-only`` compiles for a TPU, there or not.

The TPU's own compiler says what each chip would hold, beside what was planned.
"""

import dataclasses
import re
import signal
import time
from dataclasses import dataclass

import jax

from jaxinfer.engine import Engine
from jaxinfer_entrypoints.fit.roofline import Roofline
from jaxinfer_entrypoints.fit.what_fits import refusal
from jaxinfer_entrypoints.loading.assembly import Plan, plan_model
from jaxinfer_entrypoints.loading.options import LoadOptions
from jaxinfer_entrypoints.loading.phases import Phases
from jaxinfer_entrypoints.loading.sizes import DoesNotFitError
from jaxinfer_entrypoints.machine.tpu_targets import TpuGeneration, generation_of_kind, parse_target
from jaxinfer_entrypoints.machine.units import MIB
from jaxinfer_entrypoints.memory.plan import MemoryPlan, plan_memory

# Lengths for which the KV cache and the estimate of speed are told, in tokens.
LENGTH = 1024


@dataclass(frozen=True)
class CompileReport:
    """The plan beside what the compiler says, bytes on each chip.

    ``seconds`` of tracing and compiling all programs.
    """

    name: str
    plan: Plan
    memory: MemoryPlan
    engine: Engine
    seconds: float

    @property
    def compiled(self) -> MemoryPlan:
        """As the compiler sees it, in the plan's parts.

        It tells arguments as one number: weights and pages are taken from it as planned, and what
        differs is among the slots.
        """
        analyses = [program.memory_analysis() for program in self.engine.programs.values()]
        arguments = max(analysis.argument_size_in_bytes for analysis in analyses)
        return MemoryPlan(
            weights=self.memory.weights,
            kv_pages=self.memory.kv_pages,
            slots=arguments - self.memory.weights - self.memory.kv_pages,
            temporaries=max(
                # What is returned and does not lie where an argument lay.
                analysis.temp_size_in_bytes
                + analysis.output_size_in_bytes
                - analysis.alias_size_in_bytes
                for analysis in analyses
            ),
            code=sum(analysis.generated_code_size_in_bytes for analysis in analyses),
        )

    @property
    def has_kernel(self) -> bool:
        """True where the programs call a kernel of ours; plain XLA otherwise."""
        program = next(iter(self.engine.programs.values()))
        return "tpu_custom_call" in program.as_text()

    @property
    def chip(self) -> TpuGeneration:
        """Whose chips these are."""
        return generation_of_kind(self.plan.devices[0].device_kind)


def compile_only(options: LoadOptions, phases: Phases) -> None:
    """Compiles every program for ``options.tpu`` and prints what each chip would hold.

    Raises ``ValueError`` in one line where it does not fit: why, and what would.
    """
    # What the compiler has begun it ends before Python would hear of a Ctrl-C: minutes.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if options.tpu is None:
        raise ValueError("compile_only needs the name of a TPU as device, such as v5e-8")
    target = parse_target(options.tpu)
    try:
        plan = plan_model(options, phases, needs_weights=False)
    except DoesNotFitError as error:
        if options.kv_memory is not None:
            raise
        flags = _dividing_flags(options)
        raise ValueError(refusal(options.model, target, error, flags)) from error
    title = f"{options.model} in {plan.spec.dtypes.matrices} on {target.name}"
    memory = plan_memory(plan.spec)
    limit = generation_of_kind(plan.devices[0].device_kind).hbm_bytes
    if memory.total > limit:
        raise ValueError(
            f"{title}: a chip would hold {memory.total / MIB:.0f} MiB, of which "
            f"{memory.kv_pages / MIB:.0f} MiB of KV pages; a program may use {limit / MIB:.0f} "
            f"MiB: lower --kv-memory"
        )
    engine = Engine(plan.spec)
    begun = time.perf_counter()
    try:
        with phases.phase("compile", unit="programs") as progress, jax.set_mesh(plan.spec.mesh):
            engine.compile(progress)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{title}: the compiler says: {_reason(error)}") from error
    report = CompileReport(title, plan, memory, engine, time.perf_counter() - begun)
    print(describe(report))
    if report.compiled.total > limit:
        raise ValueError(
            f"{title}: the compiled programs take {report.compiled.total / MIB:.0f} MiB a chip of "
            f"{limit / MIB:.0f} MiB: lower --kv-memory"
        )
    print(f"{title}: fits", flush=True)


def describe(report: CompileReport) -> str:
    """The tables: memory of a chip, what the KV cache holds, and the estimate of speed."""
    plan, config = report.plan, report.plan.spec.config
    num_chips, replicas = plan.spec.mesh.size, len(plan.devices) // plan.spec.mesh.size
    lines = [
        f"{report.name}: {replicas} x {num_chips} chips with {report.chip.hbm_bytes / MIB:.0f} MiB "
        f"for a program on each; attention: {'TPU kernel' if report.has_kernel else 'plain XLA'}",
        "",
        *_memory_lines(report),
        "",
    ]
    tokens = config.num_pages * config.page_size
    lengths = sorted({min(LENGTH, config.max_model_len), config.max_model_len})
    sequences = " or ".join(f"{tokens // length} of {length}" for length in lengths)
    lines.append(
        f"KV cache: {tokens} tokens a replica: sequences: {sequences} tokens; "
        f"{config.max_num_seqs} run at once (--max-num-seqs)"
    )
    lines.append(f"compiled: {len(report.engine.programs) + 1} programs in {report.seconds:.1f} s")
    return "\n".join([*lines, *_speed_lines(report)])


def _dividing_flags(options: LoadOptions) -> str:
    """Returns what the user said of how the chips are divided, as it was typed."""
    flags = []
    if options.tensor_parallel is not None:
        flags.append(f"--tensor-parallel {options.tensor_parallel}")
    if options.data_parallel > 1:
        flags.append(f"--data-parallel {options.data_parallel}")
    return " ".join(flags)


def _memory_lines(report: CompileReport) -> list[str]:
    config = report.plan.spec.config
    notes = {
        "weights": report.plan.spec.dtypes.matrices,
        "kv_pages": f"{config.num_pages} of {config.page_size} tokens, "
        f"{report.plan.spec.dtypes.kv_cache}",
        "slots": f"of {config.max_num_seqs} sequences, and a step's rows",
        "temporaries": "of the largest program",
        "code": f"of {len(report.engine.programs)} programs",
        "page_copies": "by plain XLA attention; to the compiler they are temporaries",
    }
    planned, compiled = report.memory, report.compiled
    lines = [f"{'MiB a chip':<12} {'planned':>9} {'compiler':>9}"]
    for field in dataclasses.fields(planned):
        ours, theirs = getattr(planned, field.name), getattr(compiled, field.name)
        if ours or theirs:
            name = field.name.replace("_", " ").replace("kv", "KV")
            numbers = f"{ours / MIB:>9.1f} {theirs / MIB:>9.1f}"
            lines.append(f"{name:<12} {numbers}  {notes[field.name]}")
    difference = planned.total / compiled.total - 1
    lines.append(
        f"{'total':<12} {planned.total / MIB:>9.1f} {compiled.total / MIB:>9.1f}  "
        f"the plan is {abs(difference):.1%} {'above' if difference >= 0 else 'below'}"
    )
    return lines


def _speed_lines(report: CompileReport) -> list[str]:
    plan, peaks = report.plan, report.chip
    model = Roofline(plan.spec, peaks)
    length = min(LENGTH, plan.spec.config.max_model_len)
    fitting = plan.spec.config.num_pages * plan.spec.config.page_size // length
    rates = []
    for count in sorted({1, min(plan.spec.config.max_num_seqs, max(1, fitting))}):
        seconds = model.decode_seconds(count, length)
        rates.append(f"{count / seconds:.0f} tok/s ({count} x {length} tokens)")
    return [
        f"estimate: decode {', '.join(rates)}; prefill of {length} tokens "
        f"{1000 * model.prefill_seconds(length):.1f} ms",
        f"  a roofline, no measurement: {peaks.name} peaks of "
        f"{peaks.bf16_flops_per_second / 1e12:.0f} TFLOP/s in bfloat16 and "
        f"{peaks.hbm_bytes_per_second / 1e9:.0f} GB/s a chip; without exchanges between chips, "
        f"sampling and the host",
    ]


def _reason(error: Exception) -> str:
    """The first sentence of a compiler's error that says something of memory, in one line."""
    text = " ".join(str(error).split())
    match = re.search(r"Ran out of memory.*?exceeds available \w+ \([^)]*\)", text)
    return match[0] if match else text[:300]
