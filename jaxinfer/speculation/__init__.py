"""Speculative decoding: who drafts, what is accepted, when it pays."""
