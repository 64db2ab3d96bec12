"""Submitting runs to schedulers."""
