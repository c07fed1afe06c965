"""The device that something runs on, or was measured on."""

import os
import platform
from pathlib import Path


def device_name() -> str:
    """The GPU's name, or the processor's where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


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
