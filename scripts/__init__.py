"""Command lines: the only place that parses arguments, prints and wires the packages together."""
