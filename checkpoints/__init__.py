"""Files on disk to parameters on devices, and back."""
