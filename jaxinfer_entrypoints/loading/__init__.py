"""From options to an engine with a model in it."""
