"""Start and end of every program. Imports no JAX, and is what a program imports first.

Importing JAX takes seconds. A Ctrl-C meanwhile would be a traceback from within, or be lost where
an import is tried only: until ``run_main`` is there, it ends the process at once.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# When the program began, so that the table of phases is complete; imports come after it.
STARTED = time.perf_counter()

INTERRUPTED = 130  # what shells know as ended by Ctrl-C


def run_main(main: Callable[[], None]) -> None:
    """Runs ``main``; errors a user can mend end the program with one line and status 1.

    Ctrl-C is a ``KeyboardInterrupt`` from here on, and ends the program in silence, like a reader
    of its output that has gone (``| head``). What the output's encoding lacks is replaced: an
    answer that was made is not lost for a character.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError, NotImplementedError) as error:  # the last: no kernel takes this
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def importing() -> Iterator[None]:
    """For imports within a program: Ctrl-C ends the process at once."""
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
    else:
        yield


def _end_at_once(*_: object) -> None:
    os._exit(INTERRUPTED)


def _is_program() -> bool:
    """Tells if this process is one of ours, and not a test or somebody else's program."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or ".")
    here = Path(__file__).resolve().parent
    folders = (here, here.parent / "scripts")
    return path.stem.startswith("jaxinfer-") or path.resolve().parent in folders


if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_once)
