"""Fixtures every test may use."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from slurm_cluster import slurm  # noqa: F401 - a fixture

# Before torch is imported, here and in every process a test starts: the tests' tensors are tiny, and several processes
# with a thread a core each would spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes, or the drawing of it, says more of what else the machine is doing than of the code.
settings.register_profile("mmd2v", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mmd2v")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data named by MMD2V_SHARED; tests that need it are skipped where it is unset."""
    folder = os.environ.get("MMD2V_SHARED")
    if not folder:
        pytest.skip("MMD2V_SHARED is unset: no real data to test with")
    return Path(folder) / "data"


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Leave the process group of a run that ended in an error, as its process would have: the next test is no rank."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        from mmd2v.distributed.environment import shutdown

        shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, with that reason."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
