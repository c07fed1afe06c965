"""Drafting in the workers, with torch and vLLM. It decides nothing by itself."""
