"""Bounds on waiting in tests: they end what hangs, and no slow or busy machine reaches them."""

# For an event that cannot fail to come, be it late.
HANG_SECONDS = 900.0
# For work of one thread, in seconds of its processor (``time.thread_time``): what took minutes, or
# for ever, before it was bounded takes a hundredth of this now.
WORK_SECONDS = 20.0
