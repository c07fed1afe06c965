"""For `python -m vllm_selfspec.cli`."""

from vllm_selfspec.cli.main import main

main()
