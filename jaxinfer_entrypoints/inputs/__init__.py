"""Files that a user gives: prompts and texts."""
