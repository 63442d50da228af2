"""Parts of doctor.py's page."""
