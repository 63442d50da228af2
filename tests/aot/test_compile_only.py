"""``serve.py --compile-only`` as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Answer:
    """The output of the program, and its exit status."""

    status: int
    stdout: str
    error: str

    def numbers(self, row: str) -> tuple[float, float]:
        """MiB planned, and MiB by the compiler."""
        (line,) = [line for line in self.stdout.splitlines() if line.startswith(row)]
        planned, compiled = line.removeprefix(row).split()[:2]
        return float(planned), float(compiled)


def start(*flags: str) -> subprocess.Popen[str]:
    """Runs it without a word about platforms in the environment, as on a user's machine."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), "--compile-only", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
    )


def ask(*flags: str) -> Answer:
    """Runs it to its end."""
    with start(*flags) as process:
        try:
            stdout, stderr = process.communicate(timeout=900)
        finally:
            process.kill()
    return Answer(process.returncode, stdout, (stderr.splitlines() or [""])[-1])


def check(answer: Answer, num_chips: int) -> None:
    """It fits, and the plan is within 3 %."""
    assert answer.status == 0, answer.error
    assert f": 1 x {num_chips} chips with " in answer.stdout
    assert "attention: TPU kernel" in answer.stdout
    assert answer.stdout.endswith(": fits\n")
    planned, compiled = answer.numbers("total")
    assert 0.97 <= planned / compiled <= 1.03
    for row in ("weights", "KV pages"):
        planned, compiled = answer.numbers(row)
        assert planned == compiled > 0
    assert re.search(
        r"KV cache: \d+ tokens .* sequences: \d+ of 1024 or \d+ of 8192", answer.stdout
    )
    assert re.search(r"compiled: \d+ programs in [\d.]+ s", answer.stdout)
    assert re.search(
        r"estimate: decode \d+ tok/s .* prefill of 1024 tokens [\d.]+ ms", answer.stdout
    )
    assert "a roofline, no measurement" in answer.stdout


def test_a_small_model_fits_with_chips_to_spare() -> None:
    """3 kv heads are not divided over 8 chips: one is used. Two programs."""
    flags = ("--max-num-seqs", "8", "--max-num-batched-tokens", "64")
    answer = ask("--tpu", "v5litepod-8", "--model", "smollm2-135m-instruct", *flags)
    check(answer, 1)


def test_eight_billion_on_one_chip() -> None:
    answer = ask("--tpu", "v5e", "--model", "llama-3-8b")
    assert (answer.status, answer.stdout) == (1, "")
    assert answer.error.startswith("error: llama-3-8b in bfloat16 does not fit v5e: 15317 MiB of")
    assert answer.error.endswith(
        "It would fit v5e-4, or v5p-8, or v6e-1, or v5e with --max-model-len 3840, or v5e with "
        "--quantize int8"
    )


def test_a_slice_of_several_hosts_is_said_to_be_one() -> None:
    answer = ask("--tpu", "v5e-8", "--model", "llama-3-70b")
    assert answer.status == 1
    assert "v5e-16 (several hosts, for which serving is not built yet)" in answer.error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "llama-3-8b", "--tpu", "v4-8"), "--compile-only cannot answer for v4"),
        (("--model", "llama-3-9b", "--tpu", "v5e"), "'llama-3-9b' is neither a file or folder"),
        (("--model", "llama-3-8b", "--tpu", "v5e-8", "--kv-memory", "1TiB"), "of which"),
        (("--model", "llama-3-8b", "--tpu", "v5e-8", "--kv-memory", "125GiB"), "lower --kv-memory"),
        (("--model", "llama-3-8b", "--tpu", "v5e-8", "--kv-memory", "9MiB"), "raise --kv-memory"),
        (
            ("--model", "llama-3-8b", "--tpu", "v5e-4", "--tensor-parallel", "8"),
            "there are 4 x TPU",
        ),
        (
            ("--model", "llama-3-8b", "--tpu", "v5e-8", "--tensor-parallel", "1"),
            "It would fit v5e-8 without --tensor-parallel 1, or v5p-8,",
        ),
        (
            ("--model", "llama-3-8b", "--tpu", "v5e-8", "--data-parallel", "8"),
            "It would fit v5e-8 without --data-parallel 8, or v5p-8,",
        ),
    ],
)
def test_what_is_refused(flags: tuple[str, ...], message: str) -> None:
    answer = ask(*flags)
    assert (answer.status, answer.stdout) == (1, "")
    assert message in answer.error


def test_ctrl_c_ends_it_at_once() -> None:
    """The compiler would not hear of it for minutes."""
    with start("--tpu", "v5e-8", "--model", "llama-3-8b") as process:
        try:
            time.sleep(20)  # compiling by now, which takes more than a minute
            assert process.poll() is None
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            assert process.returncode in (-signal.SIGINT, 130)
            assert time.monotonic() - begun < 10
        finally:
            process.kill()


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "target", "num_chips"),
    [("llama-3-8b", "v5e-4", 4), ("llama-3-8b", "v5e-8", 8), ("llama-3-70b", "v6e-8", 8)],
)
def test_full_depth(model: str, target: str, num_chips: int) -> None:
    check(ask("--tpu", target, "--model", model), num_chips)
