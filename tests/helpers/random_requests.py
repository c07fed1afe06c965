"""Random requests over all fields of vLLM's `SamplingParams`, the same on every run.

A request has up to four of them set, to values that vLLM mostly takes and sometimes
refuses.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helpers.models import VOCAB_SIZE

MAX_TOKENS = 14
GRAMMAR = 'root ::= ("x" | "yy")+ "," [0-9]+'
MAX_SET = 4
THINK = "<", ">"  # what starts and ends what thinking_token_budget limits


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        prompt: Token ids.
        fields: Arguments of `SamplingParams`.
    """

    prompt: list[int]
    fields: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return self.fields["temperature"] == 0

    def params(self) -> Any:
        """New `SamplingParams`; vLLM writes into them.

        Raises:
            ValueError: If vLLM refuses the values.
        """
        from vllm import SamplingParams

        makers = {"structured_outputs": _structured, "repetition_detection": _repeated}
        fields = {
            name: makers[name](value) if name in makers else value
            for name, value in self.fields.items()
        }
        return SamplingParams(**fields)


def _structured(kind: dict[str, Any]) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(**kind)


def _repeated(pattern: dict[str, int]) -> Any:
    from vllm.sampling_params import RepetitionDetectionParams

    return RepetitionDetectionParams(**pattern)


def _token(rng: random.Random) -> int:
    return rng.randrange(2, VOCAB_SIZE)


def _tokens(rng: random.Random, most: int) -> list[int]:
    return [_token(rng) for _ in range(rng.randint(1, most))]


def _word(rng: random.Random) -> str:
    return "".join(map(chr, _tokens(rng, 2)))


def _scores(rng: random.Random, prompt: list[int]) -> list[list[int]]:
    return [_tokens(rng, 3) for _ in prompt[1:]]


def _any_of(*values: Any) -> Callable[[random.Random, list[int]], Any]:
    return lambda rng, _: rng.choice(values)


def _uniform(low: float, high: float) -> Callable[[random.Random, list[int]], Any]:
    return lambda rng, _: round(rng.uniform(low, high), 2)


# How to draw a value of each field, given the prompt; the last of some is refused.
DRAWS: dict[str, Callable[[random.Random, list[int]], Any]] = {
    "n": _any_of(1, 2, 3, 0),
    "presence_penalty": _uniform(-2, 2),
    "frequency_penalty": _uniform(-2, 2),
    "repetition_penalty": _uniform(0.6, 1.8),
    "watermarking": _any_of(None, False, True),
    "top_p": _uniform(0.3, 1),
    "top_k": _any_of(0, 1, 3, 20, VOCAB_SIZE),
    "min_p": _any_of(0.0, 0.2),
    "seed": _any_of(None, 1, 2, 3),
    "stop": lambda rng, _: rng.choice(["e", ["ab", chr(_token(rng))], [""]]),
    "stop_token_ids": lambda rng, _: rng.choice([_tokens(rng, 6), [VOCAB_SIZE]]),
    "ignore_eos": _any_of(True, False),
    "max_tokens": _any_of(1, 2, 5, MAX_TOKENS, MAX_TOKENS, 0),
    "min_tokens": _any_of(1, 4, MAX_TOKENS, 10**6),
    "logprobs": _any_of(0, 1, 3, 20, -1),
    "prompt_logprobs": _any_of(0, 2, 20, -1),
    "prompt_logprob_token_ids": _scores,
    "prompt_logprob_start": _any_of(None, 0),
    "logprob_token_ids": lambda rng, _: rng.choice([_tokens(rng, 5), [VOCAB_SIZE]]),
    "flat_logprobs": _any_of(True, False),
    "detokenize": _any_of(True, False),
    "skip_special_tokens": _any_of(True, False),
    "spaces_between_special_tokens": _any_of(True, False),
    "include_stop_str_in_output": _any_of(True, False),
    "output_kind": lambda rng, _: _output_kind(rng),
    "stream_interval": _any_of(1, 3, 0),
    "skip_clone": _any_of(False, True),
    "structured_outputs": _any_of(
        {"regex": "[ab]{3,9}c[0-9]+z"},
        {"grammar": GRAMMAR},
        {"choice": ["first", "second"]},
        {"json_object": True},
        {"choice": []},
    ),
    "logit_bias": lambda rng, _: rng.choice([{_token(rng): 3.0}, {}]),
    "allowed_token_ids": lambda rng, _: rng.choice([_tokens(rng, 30), []]),
    "extra_args": _any_of({"mine": 1}, {"kv_transfer_params": {"any": "thing"}}),
    "bad_words": lambda rng, _: [_word(rng) for _ in range(rng.randint(1, 6))],
    "skip_reading_prefix_cache": _any_of(None, True, False),
    "thinking_token_budget": lambda rng, prompt: _think(rng, prompt),
    "repetition_detection": _any_of(
        {"max_pattern_size": 2, "min_count": 2}, {"max_pattern_size": 1, "min_count": 1}
    ),
    "routed_experts_prompt_start": _any_of(0, 1, 10**6),
    "trace_decode_token_ids": lambda rng, _: _tokens(rng, 3),
    "temperature": _any_of(0, 0, 0, 0.7, 1.0, 3.0),
}
# What vLLM itself writes into a request.
WRITTEN = {
    "output_text_buffer_length",
    "_eos_token_id",
    "_all_stop_token_ids",
    "_watermarking_skipped",
    "_bad_words_token_ids",
}


def _think(rng: random.Random, prompt: list[int]) -> int:
    prompt.append(ord(THINK[0]))
    return rng.randint(0, 5)


def _output_kind(rng: random.Random) -> Any:
    from vllm.sampling_params import RequestOutputKind

    return rng.choice([RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])


def random_requests(num: int, seed: int = 0) -> list[Asked]:
    """So many; each field is set in one of them or more, if there are enough."""
    rng = random.Random(seed)
    left: list[str] = []
    found = []
    for _ in range(num):
        prompt = [_token(rng) for _ in range(rng.choice([1, 2, 7, 20, 40]))]
        # Two of three are greedy, which are compared token for token.
        fields: dict[str, Any] = {"temperature": rng.choice([0, 0, 0.9])}
        fields["max_tokens"] = MAX_TOKENS
        for _ in range(rng.randint(0, MAX_SET)):
            if not left:
                left = rng.sample(sorted(DRAWS), len(DRAWS))
            name = left.pop()
            fields[name] = DRAWS[name](rng, prompt)
        found.append(Asked(prompt, fields))
    return found
