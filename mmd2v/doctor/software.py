"""The packages of this machine: what mmd2v needs, what it uses when it is there, and the compiler."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mmd2v import __version__
from mmd2v.doctor.finding import Check, Finding, Subject

# Without mmd2v's own metadata (a source tree that is not installed) these stand for what it needs.
_NEEDED = ("torch", "torchvision", "deepspeed", "timm", "transformers", "tokenizers", "webdataset", "numpy")
_COMPARED = ("torch", "deepspeed", "numpy")


def software_checks() -> list[Check]:
    """Return the checks of Python, every needed and optional package, and the compiler."""
    needed = [Check(name, partial(package, name, wanted)) for name, wanted in _requirements()]
    return [
        Check("python", python),
        Check("mmd2v", own_package),
        *needed,
        Check("operators of torchvision", torchvision_operators),
        Check("triton", partial(optional_on_cuda, "triton", "kernels are compiled with it")),
        Check("xformers", xformers),
        Check("apex", apex),
        Check("mpi4py", mpi4py),
        Check("C++ compiler", compiler),
    ]


def versions() -> dict[str, str]:
    """What all nodes must have alike: name → version, ``absent`` where it is not installed."""
    found = {"python": platform.python_version(), "mmd2v": __version__}
    return found | {name: installed(name) or "absent" for name in _COMPARED}


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def python(subject: Subject) -> Finding:
    """Check the interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("error", f"{found}; expected 3.11 to 3.13", "make an environment with another Python")
    return Finding("ok", found)


def own_package(subject: Subject) -> Finding:
    """Check that mmd2v itself is installed."""
    if __version__ == "0+unknown":
        return Finding("warning", "runs from a source tree that is not installed", "pip install -e .")
    return Finding("ok", __version__)


def package(name: str, wanted: str, subject: Subject) -> Finding:
    """Check that a needed package is there in a version that is ``wanted``, such as ``>=2.10``."""
    found = installed(name)
    if found is None:
        return Finding("error", f"not installed; expected {wanted or 'any version'}", f"pip install '{name}{wanted}'")
    if not _satisfies(found, wanted):
        return Finding("error", f"{found}; expected {wanted}", f"pip install '{name}{wanted}'")
    return Finding("ok", found)


def torchvision_operators(subject: Subject) -> Finding:
    """Check that torchvision was built for this torch."""
    try:
        importlib.import_module("torchvision").ops.nms  # noqa: B018 - fails when the two do not fit
    except Exception as error:  # torchvision raises what torch does
        reason = str(error).splitlines()[0]
        return Finding("error", f"cannot be loaded: {reason}", "install torch and torchvision from the same source")
    return Finding("ok", "fit torch")


def optional_on_cuda(name: str, use: str, subject: Subject) -> Finding:
    """Check a package that makes CUDA faster and is of no use elsewhere."""
    found = installed(name)
    if found is not None:
        return Finding("ok", found)
    if _has_cuda():
        return Finding("warning", f"not installed: {use}", "pip install 'mmd2v[gpu]'")
    return Finding("ok", f"not installed: {use}, on CUDA only")


def xformers(subject: Subject) -> Finding:
    """Check what attention on CUDA uses and that its kernels load: a build for another CUDA comes without them."""
    finding = optional_on_cuda("xformers", "attention uses it; without it, torch's SDPA", subject)
    problem = xformers_load_error() if installed("xformers") is not None and _has_cuda() else None
    if problem is None:
        return finding
    hint = "install the build for this torch and CUDA; until then attention uses torch's SDPA"
    return Finding("warning", f"{finding.what}, but its kernels do not load: {problem}", hint)


def xformers_load_error() -> str | None:
    """Return why xformers' compiled part does not load; None if it does."""
    try:
        from xformers import _cpp_lib
    except Exception as error:  # a build for another torch raises all kinds of errors at import
        return str(error).splitlines()[0]
    error = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    return None if error is None else " ".join(str(error).split("\n  Please")[0].split())


def apex(subject: Subject) -> Finding:
    """Check whether NVIDIA's apex is there, and not the other package of that name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("ok", "not installed: its Adam is used when it is there, on CUDA only")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return Finding(
            "warning",
            "the package of this name is not NVIDIA's",
            "pip uninstall apex; NVIDIA's is built from source",
        )
    return Finding("ok", f"{installed('apex') or 'present'} (NVIDIA's)")


def mpi4py(subject: Subject) -> Finding:
    """Check what mpirun needs."""
    found = installed("mpi4py")
    return Finding("ok", found or "not installed: needed under mpirun when MASTER_ADDR and MASTER_PORT are not set")


def compiler(subject: Subject) -> Finding:
    """Check for the compiler of DeepSpeed's own operators."""
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        hint = "launch/debian-packages.sh installs it"
        return Finding("warning", "none: optimizer.name deepspeed_adam cannot be compiled", hint)
    return Finding("ok", found)


def _requirements() -> list[tuple[str, str]]:
    """Return (name, versions) of every package that mmd2v needs."""
    try:
        texts = requires("mmd2v") or []
    except PackageNotFoundError:
        return [(name, "") for name in _NEEDED]
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in texts]
    return [(r.name, str(r.specifier)) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _satisfies(found: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
