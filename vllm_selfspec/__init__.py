"""Self-speculative decoding for vLLM: the target model drafts for itself."""

__version__ = "0.1.0"
