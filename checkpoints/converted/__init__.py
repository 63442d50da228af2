"""Converted checkpoints: each device reads its part."""
