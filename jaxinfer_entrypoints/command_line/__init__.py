"""Flags, and the values that they make: only they and programs import argparse."""
