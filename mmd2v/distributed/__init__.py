"""Ranks, process groups and collective operations."""
