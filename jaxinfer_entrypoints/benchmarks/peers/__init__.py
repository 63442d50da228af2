"""Runners of ``bench_peers.py``, each executed as a file by the interpreter of its own peer."""
