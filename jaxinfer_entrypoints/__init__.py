"""Programs, and what wires flags, checkpoints, the engine and servers together."""
