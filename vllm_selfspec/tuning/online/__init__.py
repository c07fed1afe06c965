"""The search for a better skip set while serving."""
