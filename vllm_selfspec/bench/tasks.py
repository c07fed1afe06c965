"""`Task`: prompts to run, with what their answers are scored against.

One rule: nothing is downloaded. Four small sets ship with the package (made by
`benchmarks/make_tasks.py`), long documents are Python's own library, and the public
sets are read from a local path, in the format they are published in.
"""

import csv
import gzip
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_selfspec.bench.long_documents import asked, documents

DATA = Path(__file__).resolve().parent / "data"
SHIPPED = ("summarization", "code", "chat", "text")
# Questions about long documents, and documents to go on with.
LONG, LONG_CHARACTERS = "long", 40_000

Record = dict[str, Any]
# One turn each, as `{"role": ..., "content": ...}`.
Messages = list[dict[str, str]]


class TaskError(ValueError):
    """A task that is not known, or a file that is not in the task's format."""


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        id: Unique in its task.
        content: A text to go on with, or chat messages to answer.
        reference: What the answer is scored against; None where nothing is.
        extra: What else the scoring needs.
    """

    id: str
    content: str | Messages
    reference: str | None = None
    extra: Record = field(default_factory=dict)

    def render(self, tokenizer: Any) -> str:
        """The text of the request; messages by the tokenizer's chat template, or one a
        line where it has none."""
        if isinstance(self.content, str):
            return self.content
        if getattr(tokenizer, "chat_template", None):
            text: str = tokenizer.apply_chat_template(
                self.content, tokenize=False, add_generation_prompt=True
            )
            return text
        return "\n".join(message["content"] for message in self.content) + "\n"


def token_ids(
    prompts: Sequence[Prompt], model: Path, most: int = sys.maxsize
) -> list[dict[str, Any]]:
    """The last `most` tokens of each prompt, as vLLM takes them.

    Args:
        prompts: Of a task.
        model: Checkpoint directory with a tokenizer.
        most: Tokens that are kept.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    texts = [prompt.render(tokenizer) for prompt in prompts]
    return [{"prompt_token_ids": tokenizer(t)["input_ids"][-most:]} for t in texts]


@dataclass(frozen=True)
class Task:
    """A set of prompts.

    Attributes:
        name: Of a shipped set, a format, or a file of the user's own.
        prompts: In the order they run in.
        metric: `rouge`, `pass@1`, or None where an answer has no score.
    """

    name: str
    prompts: tuple[Prompt, ...]
    metric: str | None = None

    def sample(self, num: int | None, seed: int = 0) -> "Task":
        """`num` of the prompts, drawn with `seed`; all of them for None."""
        if num is None or num >= len(self.prompts):
            return self
        chosen = random.Random(seed).sample(self.prompts, num)
        return Task(self.name, tuple(chosen), self.metric)


@dataclass(frozen=True)
class Format:
    """How a published data set becomes prompts.

    Attributes:
        prompt_of: One record's prompt.
        needs: Keys that a record must have.
        metric: See `Task`.
        about: For the help.
    """

    prompt_of: Callable[[Record, int], Prompt]
    needs: tuple[str, ...]
    metric: str | None
    about: str


def _own(record: Record, number: int) -> Prompt:
    """`prompt` or `messages`, with an optional `id` and `reference`."""
    content = record["messages"] if "messages" in record else record["prompt"]
    return Prompt(str(record.get("id", number)), content, record.get("reference"))


def _cnn_dm(record: Record, number: int) -> Prompt:
    text = f"{record['article'].strip()}\n\nTL;DR:"
    return Prompt(str(record.get("id", number)), text, record["highlights"])


def _xsum(record: Record, number: int) -> Prompt:
    text = f"{record['document'].strip()}\n\nSummary in one sentence:"
    return Prompt(str(record.get("id", number)), text, record["summary"])


def _humaneval(record: Record, number: int) -> Prompt:
    extra = {key: record[key] for key in ("test", "entry_point")}
    return Prompt(
        record["task_id"], record["prompt"], record.get("canonical_solution"), extra
    )


def _gsm8k(record: Record, number: int) -> Prompt:
    text = f"Question: {record['question'].strip()}\nAnswer:"
    return Prompt(str(number), text, record["answer"])


def _turns(record: Record, number: int) -> Prompt:
    """The first turn; the second needs an answer to the first."""
    messages = [{"role": "user", "content": record["turns"][0]}]
    extra = {"category": record.get("category")}
    return Prompt(str(record["question_id"]), messages, extra=extra)


FORMATS = {
    "jsonl": Format(_own, (), None, "lines with prompt or messages, and a reference"),
    "cnn_dm": Format(
        _cnn_dm, ("article", "highlights"), "rouge", "CNN/DailyMail, CSV or JSON lines"
    ),
    "xsum": Format(_xsum, ("document", "summary"), "rouge", "XSum, CSV or JSON lines"),
    "humaneval": Format(
        _humaneval,
        ("task_id", "prompt", "test", "entry_point"),
        "pass@1",
        "HumanEval.jsonl or .jsonl.gz",
    ),
    "gsm8k": Format(_gsm8k, ("question", "answer"), None, "GSM8K's test.jsonl"),
    "mt_bench": Format(
        _turns, ("question_id", "turns"), None, "MT-bench's question.jsonl"
    ),
    "spec_bench": Format(
        _turns, ("question_id", "turns"), None, "Spec-Bench's question.jsonl"
    ),
}


# How every command takes prompts, for its help.
PROMPTS_HELP = (
    "Prompts like those that will be served: a shipped set (summarization, code, chat, "
    "text; long: about documents of 10,000 tokens), the path of JSON lines with prompt "
    "or messages, or FORMAT=PATH with a format of jsonl, cnn_dm, xsum, humaneval, "
    "gsm8k, mt_bench, spec_bench."
)


def load(words: str) -> Task:
    """The prompts that `words` name: `code`, the path of JSON lines, or a format and a
    path, as in `humaneval=data/HumanEval.jsonl.gz`.

    Raises:
        TaskError: If there is no such set or format, or the file is not in it.
    """
    if words in SHIPPED:
        metric = "rouge" if words == "summarization" else None
        return Task(words, _prompts(DATA / f"{words}.jsonl", FORMATS["jsonl"]), metric)
    if words == LONG:
        return Task(words, tuple(_long()))
    name, _, path = words.partition("=")
    if not path:
        if not words.endswith((".jsonl", ".jsonl.gz")):
            raise TaskError(
                f"prompts are one of {', '.join((*SHIPPED, LONG))}, the path of a "
                f".jsonl file, or FORMAT=PATH with a format of {', '.join(FORMATS)}, "
                f"but they are {words!r}: write one of these"
            )
        name, path = "jsonl", words
    if name not in FORMATS:
        raise TaskError(
            f"a task's format is one of {', '.join(FORMATS)}, but it is {name!r}: use "
            f"jsonl={path} for a file of your own"
        )
    prompts = _prompts(Path(path), FORMATS[name])
    file = Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
    own = file if name == "jsonl" else name
    return Task(own, prompts, FORMATS[name].metric)


def load_all(words: Sequence[str]) -> list[Task]:
    """Several, each with a name of its own, by which results are kept.

    Raises:
        TaskError: If one cannot be read, or two have the same name.
    """
    found = [load(one) for one in words]
    twice = [name for name, num in Counter(t.name for t in found).items() if num > 1]
    if twice:
        raise TaskError(
            "results are told apart by a set's name, which of a file of your own is "
            f"its own, but two are {twice[0]!r}: rename a file, or name each set once"
        )
    return found


def _long() -> Iterator[Prompt]:
    for number, document in enumerate(documents(LONG_CHARACTERS)):
        question, continued = (
            asked(task, document, 1)[0] for task in ("question", "continuation")
        )
        yield Prompt(f"question {number}", [{"role": "user", "content": question}])
        yield Prompt(f"continuation {number}", continued)


def _prompts(path: Path, format: Format) -> tuple[Prompt, ...]:
    found = []
    for number, record in enumerate(_records(path)):
        missing = [key for key in format.needs if key not in record]
        is_own = format.prompt_of is _own
        if is_own and not {"prompt", "messages"} & set(record):
            missing = ["prompt or messages"]
        if missing:
            raise TaskError(
                f"{path}, record {number + 1}: it must have {', '.join(missing)}, but "
                f"has {', '.join(record) or 'nothing'}: is the format the right one?"
            )
        found.append(format.prompt_of(record, number))
    if not found:
        raise TaskError(f"{path} must hold at least one record, but is empty")
    return tuple(found)


def _records(path: Path) -> Iterator[Record]:
    """Of JSON lines or CSV, gzipped or not."""
    if not path.is_file():
        raise TaskError(f"there must be a file {str(path)!r}, but there is none")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    is_csv = ".csv" in path.suffixes
    with opened(path, "rt", encoding="utf-8", newline="" if is_csv else None) as file:
        if is_csv:
            csv.field_size_limit(sys.maxsize)  # an article may be long
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}, line {number}: {error}") from error
            if not isinstance(record, dict):
                raise TaskError(
                    f"{path}, line {number}: a line must be a JSON object, but it is a "
                    f"{type(record).__name__}"
                )
            yield record
