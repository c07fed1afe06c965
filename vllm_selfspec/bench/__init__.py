"""`vllm-selfspec bench`: plain vLLM, its own speculative methods and selfspec, side by
side. Reads from `tasks`, compares `methods` in `run` or `serve`, writes a `report`."""
