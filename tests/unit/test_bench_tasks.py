"""Each task set is read in the format it is published in, and what isn't is refused."""

import csv
import gzip
import json
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest

from vllm_selfspec.bench import tasks
from vllm_selfspec.bench.long_documents import QUESTIONS, asked, documents
from vllm_selfspec.bench.tasks import FORMATS, SHIPPED, Task, TaskError

# Three records of each, in its authors' format.
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "cnn_dm": [
        {
            "id": f"{n:040x}",
            "article": f"Article {n}, with a comma.",
            "highlights": "It",
        }
        for n in range(3)
    ],
    "xsum": [
        {"document": f"Document {n}.\nMore.", "summary": f"Sum {n}.", "id": str(n)}
        for n in range(3)
    ],
    "humaneval": [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f"def f{n}(x):\n",
            "entry_point": f"f{n}",
            "canonical_solution": "    return x\n",
            "test": "def check(candidate):\n    assert candidate(1) == 1\n",
        }
        for n in range(3)
    ],
    "gsm8k": [
        {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        for n in range(3)
    ],
    "mt_bench": [
        {"question_id": 81 + n, "category": "writing", "turns": ["Write.", "Again."]}
        for n in range(3)
    ],
    "spec_bench": [
        {"question_id": n, "category": "translation", "turns": ["Translate: Hallo"]}
        for n in range(3)
    ],
    "jsonl": [
        {"prompt": "Once", "reference": "upon"},
        {"id": "a", "messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": ""},
    ],
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_published_format_is_read(name: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"sample.{suffix}", PUBLISHED[name])
    task = tasks.load(f"{name}={path}")
    assert len(task.prompts) == 3 and task.metric == FORMATS[name].metric
    assert len({prompt.id for prompt in task.prompts}) == 3
    assert all(prompt.content is not None for prompt in task.prompts)
    if task.metric is not None or name == "gsm8k":
        assert all(prompt.reference for prompt in task.prompts)


@pytest.mark.parametrize("name", ["cnn_dm", "xsum"])
def test_summaries_are_read_from_csv_too(name: str, tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, PUBLISHED[name][0])
        writer.writeheader()
        writer.writerows(PUBLISHED[name])
    json_path = write(tmp_path / "test.jsonl", PUBLISHED[name])
    assert tasks.load(f"{name}={path}") == tasks.load(f"{name}={json_path}")


def test_the_text_of_a_record_is_in_its_prompt(tmp_path: Path) -> None:
    def first(name: str) -> Any:
        path = write(tmp_path / f"{name}.jsonl", PUBLISHED[name])
        return tasks.load(f"{name}={path}").prompts[0]

    assert first("humaneval").content == "def f0(x):\n", "to the character"
    assert first("humaneval").extra["entry_point"] == "f0"
    assert "Article 0, with a comma." in first("cnn_dm").content
    assert "What is 0 + 1?" in first("gsm8k").content
    assert first("mt_bench").content == [{"role": "user", "content": "Write."}]
    assert first("spec_bench").extra == {"category": "translation"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tasks_have_fifty_prompts_with_references(name: str) -> None:
    task = tasks.load(name)
    assert len(task.prompts) >= 50
    assert len({str(prompt.content) for prompt in task.prompts}) == len(task.prompts)
    assert all(prompt.reference for prompt in task.prompts)
    assert all(len(str(prompt.content)) < 2500 for prompt in task.prompts), "1024 fit"


def test_a_sample_is_of_the_task_and_the_same_each_time() -> None:
    task = tasks.load("code")
    assert task.sample(5) == task.sample(5) != task.sample(5, seed=1)
    assert all(prompt in task.prompts for prompt in task.sample(5).prompts)
    assert task.sample(None) is task.sample(1000) is task


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ("codes", None, "prompts are one of summarization, code, chat, text, "),
        ("xsun={}", "{}", "format is one of jsonl, cnn_dm"),
        ("xsum={}", None, "there must be a file"),
        ("xsum={}", "", "at least one record, but is empty"),
        ("xsum={}", '{"document": "x"}', "record 1: it must have summary, but has doc"),
        ("jsonl={}", '{"text": "x"}', "must have prompt or messages, but has text"),
        ("jsonl={}", '{"prompt": "x"}\n{"prompt"', "line 2: "),
        ("jsonl={}", "[1]", "line 1: a line must be a JSON object, but it is a list"),
    ],
)
def test_what_cannot_be_read_is_refused(
    words: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "task.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TaskError, match=message.replace("(", r"\(")):
        tasks.load(words.format(path))


def test_messages_are_rendered_by_the_tokenizer_that_can() -> None:
    class Chat:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            assert kwargs == {"tokenize": False, "add_generation_prompt": True}
            return f"<{messages[0]['content']}>"

    class Plain:
        chat_template = None

    asked = tasks.Prompt("1", [{"role": "user", "content": "Hi"}])
    assert asked.render(Chat()) == "<Hi>"
    assert asked.render(Plain()) == "Hi\n"
    assert tasks.Prompt("1", "text").render(Chat()) == "text"
    assert Task("t", (asked,)).metric is None


def test_requests_about_one_long_document_share_it() -> None:
    document = next(documents(20_000))
    assert len(document) == 20_000
    for task in QUESTIONS:
        texts = asked(task, document, 8)
        assert len({*texts}) == 8, task
        shared = commonprefix(texts)
        assert len(shared) > 17_000 and document.startswith(shared[:17_000]), task
    for document in documents(4_000):
        assert len(asked("question", document, 8)) == 8, "also where nothing is defined"
    with pytest.raises(ValueError, match="8 requests .* make it longer"):
        asked("continuation", document[:1000], 8)


def test_the_long_set_is_there_without_a_file() -> None:
    task = tasks.load("long")
    assert len(task.prompts) > 20 and len({p.id for p in task.prompts}) > 20
    assert all(len(str(prompt.content)) >= 40_000 for prompt in task.prompts)
