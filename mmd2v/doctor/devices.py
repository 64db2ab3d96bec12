"""The GPUs of this machine: how many, of which model, and whether they compute."""

from __future__ import annotations

import shutil
import subprocess

import torch

from mmd2v.doctor.finding import Check, Finding, Subject

_SIDE = 512
_TAKEN = 0.1  # part of a GPU's memory that may be in use before a run


def device_checks() -> list[Check]:
    """Return the checks of the GPUs."""
    return [Check("GPUs", gpus), Check("products on GPUs", products), Check("memory of GPUs", gpu_memory)]


def models() -> list[str]:
    """Name of every GPU torch sees."""
    return [torch.cuda.get_device_name(i) for i in range(count())]


def count() -> int:
    """GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpus(subject: Subject) -> Finding:
    """Check that torch sees the GPUs that are expected."""
    return count_finding(models(), _driver_says(), subject)


def count_finding(seen: list[str], driver: int | str | None, subject: Subject) -> Finding:
    """Judge the GPUs that torch has ``seen``; ``driver``: how many the driver lists, or its error, None without one."""
    kinds = ", ".join(f"{seen.count(model)} × {model}" for model in dict.fromkeys(seen)) or "none"
    short = f"{len(seen)} GPUs" if len(seen) != 1 else "1 GPU"
    if isinstance(driver, str):
        hint = "look at the driver: dmesg | grep -i nvrm"
        return Finding("error", f"{kinds}; nvidia-smi fails: {driver}", hint, short)
    listed = "" if driver is None else f"; nvidia-smi lists {driver}"
    if subject.gpus is not None and len(seen) != subject.gpus:
        hint = "ask the scheduler for them, look at CUDA_VISIBLE_DEVICES, or leave the node out"
        return Finding("error", f"{kinds}{listed}; expected {subject.gpus}", hint, short)
    if not seen and subject.device == "cuda":
        return Finding("error", f"none{listed}, but engine.device is cuda", "leave the node out", short)
    if not seen and driver and subject.device == "auto" and subject.gpus is None:
        hint = "install a torch whose CUDA fits the driver, or look at CUDA_VISIBLE_DEVICES"
        return Finding("error", f"torch sees none{listed}", hint, short)
    if not seen:
        return Finding("ok", "none; runs use the CPU", short="CPU")
    return Finding("ok", kinds + listed, short=short)


def products(subject: Subject) -> Finding:
    """Check a matrix product on every GPU against the CPU's."""
    return product_finding([torch.device("cuda", i) for i in range(count())])


def product_finding(devices: list[torch.device]) -> Finding:
    """Compare the product of two matrices of small whole numbers, which is exact in every precision of fp32 units."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 8, (_SIDE, _SIDE), generator=generator).float() for _ in range(2))
    expected = a @ b
    wrong = []
    for device in devices:
        try:
            if not torch.equal((a.to(device) @ b.to(device)).cpu(), expected):
                wrong.append(f"{device}: a wrong result")
        except RuntimeError as error:  # torch's name for every error of a device
            wrong.append(f"{device}: {str(error).splitlines()[0]}")
    if wrong:
        return Finding("error", "; ".join(wrong), "leave the node out: this hardware or driver is faulty")
    return Finding("ok", f"right on {len(devices)}" if devices else "no GPU to try")


def gpu_memory(subject: Subject) -> Finding:
    """Check that nobody else uses the GPUs."""
    return gpu_memory_finding([torch.cuda.mem_get_info(i) for i in range(count())])


def gpu_memory_finding(free_and_total: list[tuple[int, int]]) -> Finding:
    """Judge (free, total) bytes of every GPU."""
    taken = [
        f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB of GPU {i}"
        for i, (free, total) in enumerate(free_and_total)
        if total - free > _TAKEN * total
    ]
    if taken:
        return Finding("warning", f"in use: {', '.join(taken)}", "nvidia-smi shows whose processes they are")
    return Finding("ok", "free" if free_and_total else "no GPU")


def _driver_says() -> int | str | None:
    """Number of GPUs the driver lists, its error, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return (done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}").splitlines()[0]
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
