"""What becomes of each thing a request asks vLLM for, beside drafts.

One rule: every field of vLLM's `SamplingParams` and of the request that carries it to
the engine has a row here; a test fails when a release brings another. A row says what
was seen in the source of the releases that are supported, in both model runners, and
`tests/engine/test_requests.py` holds it against plain vLLM.

What verification does not carry is served by steps that verify nothing
(`plain_steps`): vLLM chooses between its sampler and its rejection sampler for a whole
step, so one draft token of one request is enough to send all of them through the
latter.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Fate(Enum):
    """What becomes of a field beside drafts."""

    CARRIED = "verification reads it, for the row of each draft token"
    OUTSIDE = "it acts before or after verification, token by token"
    REFUSED = "vLLM itself refuses it beside any speculation, at submission"
    PLAIN_STEPS = "no drafts are verified in the steps that such a request is in"


@dataclass(frozen=True)
class Field:
    """A row.

    Attributes:
        fate: What becomes of it.
        why: How that was found, or what would go wrong otherwise.
        in_v2: What becomes of it with the V2 runner, where that is something else.
    """

    fate: Fate
    why: str
    in_v2: Fate | None = None

    def of(self, is_v2: bool) -> Fate:
        """What becomes of it with the V1 or the V2 runner."""
        return self.in_v2 if is_v2 and self.in_v2 is not None else self.fate


def _carried(why: str) -> Field:
    return Field(Fate.CARRIED, why)


def _outside(why: str) -> Field:
    return Field(Fate.OUTSIDE, why)


def _refused(why: str) -> Field:
    return Field(Fate.REFUSED, why)


_TEXT = _outside("The front end makes text of tokens that are final.")
_STOPS = _outside("The scheduler looks at each emitted token, and drops those after.")
_PROMPT = _outside("Taken from the forward of the prompt, which has no drafts.")
_FRONT_END = _outside("Read by the front end alone.")
_LOGITS = _carried("Applied to the row of each draft token, and to the bonus row.")
_KV = _outside("Of the KV cache of the prompt.")

# vLLM's `SamplingParams`, 0.32 and 0.33.
SAMPLING_FIELDS: dict[str, Field] = {
    "n": _outside("The front end makes n requests of it."),
    "presence_penalty": _LOGITS,
    "frequency_penalty": _LOGITS,
    "repetition_penalty": _LOGITS,
    "temperature": _LOGITS,
    "watermarking": _outside(
        "Decided by --watermark-config when the engine starts; without it this does "
        "nothing."
    ),
    "top_p": _LOGITS,
    "top_k": _LOGITS,
    "min_p": _refused("The V1 runner has no rows for it in verification."),
    "seed": _carried("Draws of verification come from the request's own generator."),
    "stop": _TEXT,
    "stop_token_ids": _STOPS,
    "ignore_eos": _STOPS,
    "max_tokens": _STOPS,
    "min_tokens": _carried("Ends are masked in rows before that many tokens."),
    "logprobs": _carried("Of every emitted token, from the target's row of it."),
    "prompt_logprobs": _PROMPT,
    "prompt_logprob_token_ids": _PROMPT,
    "prompt_logprob_start": _PROMPT,
    "logprob_token_ids": Field(
        Fate.PLAIN_STEPS,
        "Neither rejection sampler knows of it. V1's gathers these few where it needs "
        "the whole vocabulary's: beside a request with logprobs the step raises, and "
        "an engine goes on for ever with requests that it lost; else they are missing "
        "from the answer. So it is with n-gram speculation.",
    ),
    "flat_logprobs": _FRONT_END,
    "detokenize": _TEXT,
    "skip_special_tokens": _TEXT,
    "spaces_between_special_tokens": _TEXT,
    "include_stop_str_in_output": _TEXT,
    "output_kind": _FRONT_END,
    "stream_interval": _FRONT_END,
    "skip_clone": _FRONT_END,
    "output_text_buffer_length": _TEXT,
    "_eos_token_id": _STOPS,
    "_all_stop_token_ids": _carried("What min_tokens masks."),
    "_watermarking_skipped": _FRONT_END,
    "structured_outputs": _carried(
        "The grammar goes through the drafts and masks the row of each; those that "
        "break it are dropped before."
    ),
    "logit_bias": _refused("The V1 runner has no rows for it in verification."),
    "allowed_token_ids": _LOGITS,
    "extra_args": _outside(
        "Read by KV connectors, and by logits processors of the user's, with which "
        "vLLM starts no engine that speculates."
    ),
    "bad_words": _LOGITS,
    "_bad_words_token_ids": _LOGITS,
    "skip_reading_prefix_cache": _KV,
    "thinking_token_budget": Field(
        Fate.PLAIN_STEPS,
        "V1 marks an end that it forced on a bonus token, and where thinking starts "
        "again it forces none. V2 counts anew. Without --reasoning-config vLLM "
        "refuses it.",
        in_v2=Fate.CARRIED,
    ),
    "repetition_detection": _STOPS,
    "routed_experts_prompt_start": _PROMPT,
    "trace_decode_token_ids": _refused("A replay draws nothing to verify."),
}

# vLLM's `EngineCoreRequest`, which carries them, 0.32 and 0.33.
REQUEST_FIELDS: dict[str, Field] = {
    "request_id": _FRONT_END,
    "prompt_token_ids": _PROMPT,
    "mm_features": _PROMPT,
    "sampling_params": _outside("See `SAMPLING_FIELDS`."),
    "pooling_params": _refused("A model that generates has no pooling task."),
    "arrival_time": _FRONT_END,
    "lora_request": _outside("Drafts run with the request's own adapter."),
    "cache_salt": _KV,
    "data_parallel_rank": _FRONT_END,
    "prompt_embeds": _PROMPT,
    "prompt_is_token_ids": _PROMPT,
    "client_index": _FRONT_END,
    "current_wave": _FRONT_END,
    "priority": _outside("Orders the queue."),
    "trace_headers": _FRONT_END,
    "resumable": _outside("A turn that ends drops its drafts."),
    "external_req_id": _FRONT_END,
    "reasoning_ended": _outside("Says whether a grammar applies yet."),
    "reasoning_parser_kwargs": _FRONT_END,
    "abort_immediately": _outside("Such a request is never scheduled."),
    "session_id": _FRONT_END,
    "kv_hints": _KV,
}


def needs_plain_steps(sampling_params: Any, is_v2: bool) -> bool:
    """Whether verification does not carry what these `SamplingParams` ask for.

    Args:
        sampling_params: vLLM's; None for a request that does not generate.
        is_v2: Whether the V2 model runner verifies.
    """
    return any(
        getattr(sampling_params, name, None) is not None
        for name in _IN_PLAIN_STEPS[is_v2]
    )


_IN_PLAIN_STEPS = {
    is_v2: [
        name
        for name, field in SAMPLING_FIELDS.items()
        if field.of(is_v2) is Fate.PLAIN_STEPS
    ]
    for is_v2 in (False, True)
}
