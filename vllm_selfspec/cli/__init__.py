"""The command `vllm-selfspec`: a file for each of its subcommands."""
