"""Kernels over arrays. They know no model, no request and no file."""
