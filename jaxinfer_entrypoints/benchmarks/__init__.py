"""Commands of bench.py, a module each."""
