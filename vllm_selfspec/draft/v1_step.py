"""What the V1 runner knows of a step that has sampled, as a `SampledStep`, and of what
drafts read.

One rule: it reads the runner after bookkeeping, when the newest tokens are in its
arrays, and before anything is drafted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_selfspec.draft.row_planner import SampledStep
from vllm_selfspec.draft_length.types import Ints


def num_drafted_in(scheduler_output: Any, req_ids: Sequence[str]) -> Ints:
    """Draft tokens that a step verified, `[num_reqs]`."""
    drafted = scheduler_output.scheduled_spec_decode_tokens
    return np.array([len(drafted.get(req_id, ())) for req_id in req_ids], np.int64)


def sampled_step(
    runner: Any, scheduler_output: Any, num_sampled: Ints, room: Ints
) -> SampledStep:
    """What the V1 runner knows of a step that has sampled."""
    batch, num_reqs = runner.input_batch, len(num_sampled)
    scheduled = scheduler_output.num_scheduled_tokens
    num_scheduled = np.array([scheduled[req_id] for req_id in batch.req_ids], np.int64)
    num_tokens = batch.num_tokens_no_spec[:num_reqs]
    num_read = batch.num_computed_tokens_cpu[:num_reqs] + num_scheduled
    return SampledStep(
        req_ids=batch.req_ids,
        running=runner.requests,
        num_sampled=num_sampled,
        num_drafted=num_drafted_in(scheduler_output, batch.req_ids),
        room=room,
        num_scheduled=num_scheduled,
        num_left=np.maximum(num_tokens - num_read, 0),
        num_tokens=num_tokens.astype(np.int64),
        token_ids_of=lambda row: batch.token_ids_cpu[row, : num_tokens[row]],
    )


def num_tokens_left(runner: Any) -> Ints:
    """Drafts that each request can use, `[num_reqs]`: a verification brings one token
    more."""
    batch = runner.input_batch
    params = [runner.requests[req_id].sampling_params for req_id in batch.req_ids]
    most = np.array([one.max_tokens for one in params], np.int64)
    num_tokens = batch.num_tokens_no_spec[: len(most)]
    num_output = num_tokens - batch.num_prompt_tokens[: len(most)]
    found: Ints = np.maximum(most - num_output - 1, 0)
    return found


def window_of(runner: Any, gid: int, view: Any) -> float | None:
    """What a draft reads of a KV cache group: layers with a sliding window of their own
    read that, or the last tokens they know would be others."""
    spec = runner.kv_cache_config.kv_cache_groups[gid].kv_cache_spec
    is_full = isinstance(spec, FullAttentionSpec) and spec.sliding_window is None
    return view.window if is_full else None


@contextmanager
def dummy_context(runner: Any, num_rows: int, context: int) -> Iterator[dict[str, Any]]:
    """Lets dummy runs of `num_rows` rows of one request attend to `context` tokens
    before them, each in a place of its own as a real request's; gives the arguments of
    vLLM's `_dummy_run`. What stands there is nobody's: it is done before serving."""
    if not context:
        yield {}
        return
    tables = runner.input_batch.block_table.block_tables
    num_blocks = runner.kv_cache_config.num_blocks
    for table in tables:
        row = table.block_table.np[0]
        row[:] = 1 + np.arange(len(row)) % max(num_blocks - 1, 1)
        table.commit_block_table(1)
    try:
        yield {
            "force_attention": True,
            "profile_seq_lens": context + num_rows,
            # One request of all rows rather than one of each.
            "uniform_decode": num_rows > 1,
        }
    finally:
        for table in tables:
            table.block_table.np[0] = 0
            table.commit_block_table(1)
