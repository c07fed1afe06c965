"""`vllm-selfspec tune`: searches for a plan on given texts."""
