"""Draft plans as pure values: neither torch nor vLLM is imported here."""
