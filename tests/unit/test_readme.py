"""What the README says of files, keys and figures is so."""

import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_selfspec.config import config_type
from vllm_selfspec.plan.families import FAMILIES

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()


def test_the_list_of_files_is_what_their_docstrings_say() -> None:
    script = runpy.run_path(str(REPOSITORY / "docs" / "update_file_list.py"))
    page = script["PAGE"].read_text()
    assert script["updated"](page) == page, "run python docs/update_file_list.py"


def test_the_map_names_every_folder_and_nothing_else() -> None:
    block = README.split("## Files", 1)[1].split("```")[1]
    named = {line.split()[0] for line in block.strip().splitlines()}
    gone = {name for name in named if not (REPOSITORY / name).exists()}
    assert not gone, f"in the README, but not in the repository: {sorted(gone)}"
    folders = {f"{p.name}/" for p in REPOSITORY.iterdir() if p.is_dir()}
    folders |= {f"vllm_selfspec/{p.parent.name}/" for p in PACKAGES}
    missing = {f for f in folders if not f.startswith((".", "_"))} - named - MADE
    assert not missing, f"missing in the README: {sorted(missing)}"


PACKAGES = [*(REPOSITORY / "vllm_selfspec").glob("*/__init__.py")]
# By setuptools.
MADE = {"build/", "vllm_selfspec.egg-info/"}


def test_keys_are_those_of_the_configuration() -> None:
    table = README.split("## Keys", 1)[1].split("\n\n", 2)[1]
    named = set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE))
    assert named == set(config_type().model_fields) - {"method"}


def test_families_are_those_that_are_supported() -> None:
    table = README.split("<!-- support:", 1)[1].split("<!-- /support -->", 1)[0]
    rows = re.findall(r"^\| Models \| ([^,|]+)", table, flags=re.MULTILINE)
    assert {name.strip() for name in rows} == set(FAMILIES)


def test_figures_are_those_of_the_saved_runs() -> None:
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "update_readme.py"))
    assert script["updated"](README) == README, (
        "the README's numbers are not those of benchmarks/results: "
        "run python benchmarks/update_readme.py"
    )


def test_every_saved_run_has_its_table() -> None:
    script = runpy.run_path(str(REPOSITORY / "benchmarks" / "update_readme.py"))
    for name, (path, _) in script["TABLES"].items():
        start, end = f"<!-- {name}: benchmarks/results/{path} -->", f"<!-- /{name} -->"
        assert README.count(start) == README.count(end) == 1, name
        assert README.index(start) < README.index(end)


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
