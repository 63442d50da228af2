"""Flags, and inputs that a user gives as files."""
