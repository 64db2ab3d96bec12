"""Measuring an encoder: retrieval over any number of ranks, with the chance level beside it."""
