"""A Triton backend named `cpu` that compiles nothing.

vLLM's V2 model runner wants Triton, and Triton wants an active backend before it
imports. Under `TRITON_INTERPRET=1` kernels are run by Triton's interpreter in NumPy and
no backend is ever asked for anything, so this one only has to exist. It must not be
installed beside code that runs without the interpreter.
"""
