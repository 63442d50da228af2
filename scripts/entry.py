"""How every program starts and ends. Imports no JAX."""

from collections.abc import Callable


def run_main(main: Callable[[], None]) -> None:
    """Runs ``main``; errors a user can mend end the program with one line and status 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
