"""What `bench` is asked for, looked at before an engine starts.

One rule: what would end a run after hours, or make its figures mean something else, is
told at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vllm_selfspec.bench.methods import Method
from vllm_selfspec.bench.tasks import Task, TaskError, token_ids
from vllm_selfspec.packages import raise_if_lacking

if TYPE_CHECKING:
    from vllm_selfspec.bench.run import BenchOptions

MAX_MODEL_LEN = 1024  # or as much as the longest request needs
# What methods need that are left out otherwise.
NEEDS = {"suffix": "arctic-inference", "draft_model": "--draft-model"}


def check_packages(options: "BenchOptions", tasks: Sequence[Task]) -> None:
    """Looks for those that scores and plots need.

    Raises:
        MissingPackageError: If one is not installed.
    """
    packages = ["rouge_score"] * any(task.metric == "rouge" for task in tasks)
    packages += ["matplotlib"] * (options.output is not None)
    raise_if_lacking("bench", packages, "bench")


def positions_for(tasks: Sequence[Task], options: "BenchOptions", model: Path) -> int:
    """What vLLM's `max_model_len` must be for all of these prompts.

    Raises:
        TaskError: If the model has no such positions.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    most = getattr(config, "max_position_embeddings", None) or sys.maxsize
    found = min(MAX_MODEL_LEN, most)
    for task in tasks:
        found_ids = token_ids(task.prompts, model)
        lengths = (len(prompt["prompt_token_ids"]) for prompt in found_ids)
        longest = max(lengths) + options.max_tokens
        if longest > most:
            raise TaskError(
                f"a prompt and what follows must fit into the model's {most} "
                f"positions, but one of {task.name!r} has "
                f"{longest - options.max_tokens} tokens, and {options.max_tokens} "
                "follow: leave it out, or lower --max-tokens"
            )
        found = max(found, longest)
    return found


def num_asked(options: "BenchOptions") -> int:
    """Prompts of each task, where none is asked twice."""
    return len(options.temperatures) * sum(load.num_prompts for load in options.loads)


def tell_what_is_asked_again(
    options: "BenchOptions", tasks: Sequence[Task], console: Console
) -> None:
    """Prints which tasks have too few prompts."""
    num = num_asked(options)
    for task in tasks:
        if len(task.prompts) < num:
            console.print(
                f"{task.name} has {len(task.prompts)} prompts for {num} requests: some "
                "are asked again, which flatters what remembers answers (suffix)."
            )


def tell_what_is_left_out(
    options: "BenchOptions", methods: Sequence[Method], console: Console
) -> None:
    """Prints which methods were asked for and cannot be run here."""
    there = {method.group for method in methods}
    for group, needs in NEEDS.items():
        if group in options.groups and group not in there:
            console.print(f"{group} is left out: it needs {needs}.")
