"""Bytes that are free, planned and used."""
