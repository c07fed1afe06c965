"""What tests share. Fixtures are in `tests/conftest.py`."""

from helpers import environment

__all__ = ["environment"]  # which comes before anything imports vLLM
