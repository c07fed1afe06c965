"""What the README and docs/ say of files, keys, figures and each other is so."""

import json
import re
import runpy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from helpers.environment import REPOSITORY
from vllm_selfspec.config import config_type
from vllm_selfspec.plan.families import FAMILIES

README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in (REPOSITORY / "README.md", *DOCS.glob("*.md"))
}
MAX_README_BYTES = 8192  # so that it is read
TABLES = runpy.run_path(str(REPOSITORY / "benchmarks" / "update_tables.py"))


def test_the_readme_is_short() -> None:
    size = len(README.encode())
    assert size < MAX_README_BYTES, f"{size} bytes: what is too long belongs to docs/"


def test_the_list_of_files_is_what_their_docstrings_say() -> None:
    script = runpy.run_path(str(DOCS / "update_file_list.py"))
    page = script["PAGE"].read_text()
    assert script["updated"](page) == page, "run python docs/update_file_list.py"


def test_the_map_names_every_folder_and_nothing_else() -> None:
    block = README.split("## Files", 1)[1].split("```")[1].strip()
    names = [
        name for line in block.splitlines() for name in line.split("  ")[0].split()
    ]
    paths = {name: place_of(name) for name in names}
    gone = [name for name, path in paths.items() if not path.exists()]
    assert not gone, f"in the README, but not in the repository: {gone}"
    folders = {p for p in REPOSITORY.iterdir() if p.is_dir() and p.name not in MADE}
    folders = {p for p in folders if not p.name.startswith((".", "_"))}
    folders |= {p.parent for p in (REPOSITORY / PACKAGE).glob("*/__init__.py")}
    missing = folders - {*paths.values()} - {REPOSITORY / PACKAGE}
    assert not missing, f"missing in the README: {sorted(missing)}"


PACKAGE = "vllm_selfspec"
MADE = {"build", "vllm_selfspec.egg-info"}  # by setuptools


def place_of(name: str) -> Path:
    """Where a file or folder of the map is: in the package, if there is one there."""
    inner = REPOSITORY / PACKAGE / name
    return inner if inner.exists() else REPOSITORY / name


# `[words](target)` outside of code, images included.
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in HEADING.findall(CODE.sub("", text)):
        words = LINK.sub("]", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def broken_links(page: str, text: str) -> Iterator[str]:
    """The relative links of a page that lead nowhere."""
    for link in LINK.findall(CODE.sub("", text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        file = (REPOSITORY / page).parent / path
        is_there = not path or file.exists()
        if is_there and anchor:
            is_there = anchor in anchors_of(file.read_text() if path else text)
        if not is_there:
            yield link


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert not [*broken_links(page, PAGES[page])]


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = (
        "# One & two: `three`\n\n## Again\n\n## Again\n\n[a](#one--two-three) "
        "[b](#again-1) [c](docs/ray.md#ray-data) [d](https://nowhere)\n"
    )
    assert not [*broken_links("README.md", text)]
    gone = ["#again-2", "docs/gone.md", "docs/ray.md#gone"]
    text += "".join(f"[x]({link})\n" for link in gone)
    text += "```\n# Gone\n[x](gone)\n```\n[x](#gone)\n"
    assert [*broken_links("README.md", text)] == [*gone, "#gone"]


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = waiting.pop()
        for link in LINK.findall(PAGES[page]):
            file = ((REPOSITORY / page).parent / link.partition("#")[0]).resolve()
            name = file.relative_to(REPOSITORY).as_posix() if "://" not in link else ""
            if name in PAGES and name not in reached:
                reached.add(name)
                waiting.append(name)
    assert reached == {*PAGES}


def test_pages_are_plain_markdown() -> None:
    for page, text in PAGES.items():
        assert not re.findall(r"^</?[a-z]+>", CODE.sub("", text), re.MULTILINE), page


def test_keys_are_those_of_the_configuration() -> None:
    page = PAGES["docs/configuration.md"]
    table = page.split("## Keys", 1)[1].split("\n\n", 2)[1]
    named = set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))
    assert named == set(config_type().model_fields) - {"method"}


def test_families_are_those_that_are_supported() -> None:
    page = PAGES["docs/support.md"]
    table = page.split("<!-- support:", 1)[1].split("<!-- /support -->", 1)[0]
    rows = re.findall(r"^\| Models \| ([^,|]+)", table, flags=re.MULTILINE)
    assert {name.strip() for name in rows} == set(FAMILIES)


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_saved_runs(page: str) -> None:
    assert TABLES["updated"](page, PAGES[page]) == PAGES[page], (
        "a table is not that of its run in benchmarks/results: "
        "run python benchmarks/update_tables.py"
    )


def test_every_table_has_one_place_and_every_place_a_table() -> None:
    named = Counter(
        (page, name)
        for page, text in PAGES.items()
        for name in re.findall(r"<!-- ([\w-]+): benchmarks/", text)
    )
    assert named == Counter((t.page, name) for name, t in TABLES["TABLES"].items())


def test_the_place_of_a_run_that_is_not_saved_says_so() -> None:
    table = TABLES["Table"]("README.md", ("support.json", "gone.json"), "".join)
    assert table.text() == (
        "This run is not saved yet: `benchmarks/results/gone.json` is missing."
    )


def test_every_saved_report_has_a_table() -> None:
    results = REPOSITORY / TABLES["RESULTS"]
    saved = {p.relative_to(results).as_posix() for p in results.rglob("report.json")}
    assert saved, "found the reports"
    assert saved <= {run for table in TABLES["TABLES"].values() for run in table.runs}


class Collected:
    """A plugin of pytest's that keeps what a session would run."""

    items: Sequence[pytest.Item] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


@pytest.fixture(scope="module")
def proofs() -> Sequence[pytest.Item]:
    """The tests that show what is supported."""
    found = Collected()
    quiet = ("--collect-only", "-qqq", "-p", "no:cacheprovider", "-p", "no:warnings")
    pytest.main([*quiet, "-m", "shows", str(REPOSITORY / "tests")], plugins=[found])
    return found.items


@pytest.mark.parametrize(("runner", "mark"), [("V1", "shows"), ("V2", "v2")])
def test_the_support_table_has_what_the_tests_show(
    runner: str, mark: str, proofs: Sequence[pytest.Item]
) -> None:
    claimed = {
        shows.args
        for item in proofs
        if item.get_closest_marker(mark)
        for shows in item.iter_markers("shows")
    }
    assert len(claimed) > 30, "found the tests"
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "support_table.py"))
    saved = script["rows_of"](json.loads(script["OUTPUT"].read_text()), runner)
    if runner == "V1":
        claimed = {row for row in claimed if "in the V2 runner" not in row[1]}
    assert saved == claimed, "the support table is stale: run make support"
