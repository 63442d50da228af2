"""Facts about machines: TPUs by name, what is idle, what to install."""
