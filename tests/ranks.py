"""Running a script as several ranks on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(script: str | Path, world_size: int, *arguments: object, timeout: int = 300) -> list[str]:
    """Run ``python SCRIPT ARGUMENTS`` once a rank and return what each printed; a rank that fails fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    tests = Path(__file__).parent
    processes = []
    for rank in range(world_size):
        values = {**common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "PYTHONPATH": tests}
        environment = {**os.environ, **{key: str(value) for key, value in values.items()}}
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {errors[-3000:]}"
    return [output for output, _ in outputs]
