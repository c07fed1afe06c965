"""`provenance`: what is needed to measure a figure again.

One rule: whatever is saved with a figure in it, reports, profiles and cards, says this
with the same keys.
"""

import platform
import shlex
import sys
from datetime import date
from pathlib import Path

from vllm_selfspec import __version__
from vllm_selfspec.engine import versions
from vllm_selfspec.engine.hardware import device_name, num_cores

SCRIPTS = "benchmarks"  # the folder of them


def command_line() -> str:
    """How this process was started, from the repository."""
    program = Path(sys.argv[0]).resolve()
    words = ["vllm-selfspec"]
    if program.parent.name == SCRIPTS:
        words = ["python", f"{SCRIPTS}/{program.name}"]
    return shlex.join([*words, *sys.argv[1:]])


def provenance(command: str | None) -> dict[str, str | int]:
    """Command, date, versions and machine.

    Args:
        command: How to do it again; None for what nobody asked for by a command.
    """
    import torch

    return {
        **({} if command is None else {"command": command}),
        "date": date.today().isoformat(),
        "vllm_selfspec": __version__,
        "vllm": versions.vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": device_name(),
        "num_cores": num_cores(),
    }
