"""The device that something runs on, or was measured on."""

import os
import platform
from pathlib import Path


def device_name() -> str:
    """The GPU's name, or the processor's where there is none. As vLLM finds it out: to
    ask CUDA would keep vLLM from forking its workers."""
    from vllm.platforms import current_platform

    found: str = _cpu_name() if on_cpu() else current_platform.get_device_name()
    return found


def on_cpu() -> bool:
    """Whether vLLM serves on the processor."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def num_cores() -> int:
    """Of this machine."""
    return os.cpu_count() or 1


def _cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor()).strip()
