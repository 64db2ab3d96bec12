"""What a run directory says about where its numbers come from."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

import mmd2v
from mmd2v.config.load import dump_config
from mmd2v.config.schema import Config
from mmd2v.config.secrets import without_secrets
from mmd2v.distributed.environment import World
from mmd2v.files import write_json, write_text

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
_PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "transformers", "tokenizers", "webdataset", "numpy")


def describe_run(run_dir: Path, config: Config, world: World, optimizer: str) -> None:
    """Write the resolved config and the versions that produce the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / CONFIG_FILE, dump_config(config))
    write_json(run_dir / ENVIRONMENT_FILE, environment(world, optimizer))


def config_changes(run_dir: Path, config: Config) -> list[str]:
    """Return ``key: old → new`` for every value that differs from the config the run directory holds."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return []
    # A file that an earlier version wrote may hold secrets, which no message may show.
    texts = (path.read_text(encoding="utf-8"), dump_config(config))
    old, new = (_flat(without_secrets(yaml.safe_load(text))) for text in texts)
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {at: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{at}.{key}" if at else str(key)).items()}


def environment(world: World, optimizer: str) -> dict[str, Any]:
    """Return versions, device and code version: nothing that names the machine or its folders."""
    on_cuda = world.device.type == "cuda"
    return {
        "mmd2v": mmd2v.__version__,
        "commit": code_version(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name(world.device) if on_cuda else f"cpu ({platform.machine()})",
        "ranks": world.size,
        "backend": world.backend,
        "threads": torch.get_num_threads(),
        "optimizer": optimizer,
    }


def code_version() -> str | None:
    """Return the git commit of the source tree this package runs from (``+changes`` if edited); None if installed."""
    root = Path(mmd2v.__file__).parents[1]
    if not (root / ".git").exists():  # a package inside somebody else's repository is not that commit
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
