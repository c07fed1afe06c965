"""Every contact with vLLM's engine: what is rebound, configured and measured."""
