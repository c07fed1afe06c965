"""`vllm-selfspec bench`: plain vLLM, its own speculative methods and selfspec, side by
side. Reads from `tasks`, runs `arms` in `offline` or `serving`, writes a `report`."""
