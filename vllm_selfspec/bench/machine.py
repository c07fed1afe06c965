"""The machine that figures are measured on."""

import os
import platform
import warnings
from pathlib import Path


def prepare_environment() -> None:
    """All cores for everyone, one process, and no log lines; the user's word wins."""
    last = (os.cpu_count() or 1) - 1
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{last}" if last else "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # vLLM's, of torch names


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor()).strip()
