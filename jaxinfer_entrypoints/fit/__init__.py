"""Will it fit, where, and how fast at best: answers without loading weights."""
