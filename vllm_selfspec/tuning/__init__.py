"""Finds the draft plan that makes a model fastest on given texts.

`probe` runs in the worker and drafts from every position of a text at once, exactly as
the engine drafts; `score` turns what was right into tokens per second; `search` looks
for the plan with the best score. `online` does the like while serving, on what is in
the KV cache anyway, and `online.search` decides there.
"""
