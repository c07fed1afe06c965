"""The machine that figures are measured on."""

import os
import warnings


def prepare_environment() -> None:
    """All cores for everyone, one process, and no log lines; the user's word wins."""
    last = (os.cpu_count() or 1) - 1
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{last}" if last else "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # vLLM's, of torch names
