"""What Triton's interpreter gets wrong or cannot run, mended for the V2 test runs.

`make test-v2` runs vLLM's V2 model runner without a GPU, every Triton kernel under the
interpreter. The mends act on plain and on drafting engines alike. As one of vLLM's
general plugins they reach the processes that it starts: workers, servers, Ray's actors.
"""

import functools
from typing import Any


@functools.cache  # vLLM loads plugins, and so do the tests
def mend() -> None:
    _rebind_the_language_once()
    _take_integers_for_masks()
    _give_log1p_a_body()
    _filter_top_k_and_top_p_in_torch()


def _rebind_the_language_once() -> None:
    """The interpreter looks through Triton's language for what to rebind on every call
    of a kernel or of a function in it: most of its time here. Nothing compiles in these
    processes, so it may stay rebound."""
    from triton.runtime import interpreter

    rebind, done = interpreter._patch_lang, set()

    def _patch_lang(fn: Any) -> Any:
        languages = (interpreter.tl, interpreter.tl.core)
        used = tuple(
            any(v is lang for v in fn.__globals__.values()) for lang in languages
        )
        if used not in done:
            rebind(fn)
            done.add(used)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_lang


def _take_integers_for_masks() -> None:
    """Triton 3.9.0 stores through a comparison that was reshaped, as vLLM's grammar
    bitmask does, and loads through one of comparisons' `and`, as its n-gram matcher
    does, with 'mask has unsupported dtype': the interpreter's mask is int32."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load = InterpreterBuilder.create_masked_load
    store = InterpreterBuilder.create_masked_store

    def create_masked_load(
        self: Any, ptrs: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any
    ) -> Any:
        mask = TensorHandle(mask.data.astype(bool), mask.dtype)
        return load(self, ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(
        self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any
    ) -> Any:
        mask = TensorHandle(mask.data.astype(bool), mask.dtype)
        return store(self, ptrs, value, mask, cache_policy)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _give_log1p_a_body() -> None:
    """Functions of CUDA's libdevice return nothing here; vLLM's rejection sampler takes
    a log1p, of numbers that are far from 0 unless it makes no difference."""
    import triton.language as tl
    from triton.language.extra import libdevice

    libdevice.log1p = lambda x: tl.log(1.0 + x)


def _filter_top_k_and_top_p_in_torch() -> None:
    """vLLM's kernel calls a tensor method on the index of a `tl.range`, which is a
    Python number here. vLLM's own PyTorch code does the same wherever Triton is not."""
    from vllm.v1.sample.ops import topk_topp_sampler

    def filtered(logits: Any, k: Any, p: Any, **_: Any) -> Any:
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p_triton = filtered
