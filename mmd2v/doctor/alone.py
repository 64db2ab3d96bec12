"""The check of one machine."""

from __future__ import annotations

from mmd2v.doctor.devices import device_checks
from mmd2v.doctor.finding import Check, Named, Subject, ask_all, worst
from mmd2v.doctor.folders import folder_checks, run_folder
from mmd2v.doctor.machine import machine_checks
from mmd2v.doctor.software import software_checks

SECONDS = 60.0
"""How long all checks of a machine may take together."""


def node_checks() -> list[Check]:
    """Return every check that a node answers without the others: what can go bad on one node alone."""
    return [*device_checks(), *machine_checks(), Check("run folder", run_folder), *folder_checks()]


def examine(subject: Subject) -> tuple[list[Named], bool]:
    """Ask everything of this machine; return what was found, and whether it is fit."""
    found = ask_all([*software_checks(), *node_checks()], subject, SECONDS)
    return found, worst(named.finding for named in found) != "error"
