"""What a job is told before it loses its place, and what it answers."""

from __future__ import annotations

REQUEUE_STATUS = 75
"""Exit status of a run that was asked to stop, has saved its state and wants to go on later: EX_TEMPFAIL of sysexits.h.

Every rank exits with it, and a job script requeues itself on it.
"""
