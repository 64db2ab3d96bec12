"""Public entry to the frozen teachers: ``mmd2v.teachers.load("timm:resnet50")``."""

from mmd2v.models.teachers import Targets, Teacher, load

__all__ = ["Targets", "Teacher", "load"]
