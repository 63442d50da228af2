"""Folders as on the Hugging Face hub."""
