"""`vllm-selfspec` shows a plan without loading the model, and errors in one line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from helpers.models import NUM_LAYERS, build_tiny_model
from vllm_selfspec import __version__
from vllm_selfspec.chosen_plan import resolve_plan
from vllm_selfspec.cli import main as cli
from vllm_selfspec.config import SelfSpecConfig
from vllm_selfspec.engine import versions
from vllm_selfspec.plan import cost
from vllm_selfspec.plan.cost import ModelWeights, bound, expected_tokens
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel

SKIP = '{"attention": [1, 2], "mlp": [2]}'


def invoke(*arguments: str) -> Result:
    # NO_COLOR and a fixed width, whatever the terminal that runs the tests.
    env = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner(env=env).invoke(cli.app, list(arguments))


def shown(*arguments: str) -> str:
    result = invoke("show", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def shown_json(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(*arguments, "--json"))
    return found


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and error, of which there must be one line and nothing else."""
    result = invoke("show", *arguments)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_model("llama", tmp_path_factory.mktemp("cli")))


def write_headers(directory: Path, num_layers: int, **config: Any) -> str:
    """A model of any depth, of which only config.json and a header exist."""
    names = [
        f"model.layers.{i}.{part}.weight"
        for i in range(num_layers)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    header = {name: {"data_offsets": [0, 1000]} for name in [*names, "lm_head.weight"]}
    data = json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(data).to_bytes(8, "little") + data)
    keys = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": num_layers}
    (directory / "config.json").write_text(json.dumps({**keys, **config}))
    return str(directory)


def map_of(text: str) -> dict[str, str]:
    """Symbols of the two sublayers, without the gaps between groups."""
    rows = {"attention": "", "mlp": ""}
    for line in text.splitlines():
        name, *marks = line.split() or [""]
        if name in rows and marks and set("".join(marks)) <= set("\u2588\u00b7"):
            rows[name] += "".join(marks)
    return rows


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ((), {}),
        (("--skip-layers", "auto"), {"skip_layers": "auto"}),
        (("--skip-layers", SKIP), {"skip_layers": json.loads(SKIP)}),
        (("--exit-layer", "2"), {"exit_layer": 2}),
    ],
)
def test_json_shows_the_plan_that_vllm_would_draft_with(
    model: str, arguments: tuple[str, ...], keys: dict[str, Any]
) -> None:
    found = shown_json(model, *arguments)
    chosen = resolve_plan(SelfSpecConfig.parse(keys), TargetModel(NUM_LAYERS))
    assert found["plan"] == {"source": chosen.source, **chosen.plan.to_dict()}
    weights = ModelWeights.from_checkpoint(Path(model))
    c = chosen.plan.share(weights.step)
    assert found["draft_share"] == c
    assert found["ceiling"] == 1 / c
    assert len(found["speed_up_bound"]) == 16
    for row in found["speed_up_bound"]:
        k, acceptance = row["num_speculative_tokens"], row["acceptance"]
        assert row["bound"] == bound(expected_tokens(acceptance, k), k, c)


def test_parts_add_up_to_the_total(model: str) -> None:
    *parts, total = shown_json(model, "--skip-layers", SKIP)["streamed_bytes"].values()
    for step in ("target", "draft"):
        assert sum(part[step] for part in parts) == total[step]


def test_text_shows_the_same_as_json(model: str) -> None:
    text = shown(model, "--skip-layers", SKIP)
    found = shown_json(model, "--skip-layers", SKIP)
    assert "LlamaForCausalLM, 4 layers" in text
    assert "self_attn and mlp of every layer" in text
    assert f"{found['draft_share']:.1%}  = c" in text
    assert f"1/c = {found['ceiling']:.2f}x" in text
    for row in found["speed_up_bound"]:
        assert f"{row['bound']:.2f}x" in text
    assert found["command"] in text.replace("\n", "")


@pytest.mark.parametrize("num_layers", (4, 60, 61, 126))
def test_map_marks_every_sublayer_and_fits_80_columns(
    tmp_path: Path, num_layers: int
) -> None:
    path = write_headers(tmp_path, num_layers)
    text = shown(path)
    skip_set = SkipSet.evenly_spread(num_layers)
    for sublayer, marks in map_of(text).items():
        holes = getattr(skip_set, sublayer)
        expected = ["\u00b7" if i in holes else "\u2588" for i in range(num_layers)]
        assert marks == "".join(expected)
    *lines, command = text.splitlines()
    assert max(map(len, lines)) <= 80, "the command alone may be longer, to be copied"
    assert path in command


def test_map_numbers_stand_above_their_layers(tmp_path: Path) -> None:
    lines = shown(write_headers(tmp_path, 75), "--exit-layer", "70").splitlines()
    rulers = [i for i, line in enumerate(lines) if line.split()[:1] == ["layer"]]
    tens = []
    for ruler in rulers:
        numbers = lines[ruler].split()[1:]
        tens += numbers
        # No mark of a group lies to the left of its number, and a gap lies before it.
        for column in (lines[ruler].index(f" {n}") for n in numbers):
            assert lines[ruler + 1][column] == " " != lines[ruler + 1][column + 1]
    assert tens == [str(n) for n in range(0, 75, 10)]


def test_map_is_plain_ascii_where_the_terminal_is(model: str) -> None:
    code = f"from vllm_selfspec.cli.main import app; app(['show', {model!r}])"
    text = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
    ).stdout.decode("ascii")
    assert "  attention  #..#" in text and "  mlp        #..#" in text


def test_command_serves_what_was_shown(model: str) -> None:
    import shlex

    for arguments, expected in (
        ((), "selfspec"),
        (("--exit-layer", "2"), {"method": "selfspec", "exit_layer": 2}),
        (
            ("--skip-layers", SKIP),
            {"method": "selfspec", "skip_layers": json.loads(SKIP)},
        ),
    ):
        words = shlex.split(shown_json(model, *arguments)["command"])
        assert words[:4] == ["vllm", "serve", model, "--speculative-config"]
        config = words[4] if expected == "selfspec" else json.loads(words[4])
        assert config == expected


def test_profile_is_read(model: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"skip_layers": json.loads(SKIP)}))
    plan = shown_json(model, "--skip-layers", str(profile))["plan"]
    assert plan["source"] == f"profile {profile}"
    assert plan["skip_layers"] == json.loads(SKIP)


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (("--exit-layer", "9"), "1 to 4 for this model, but it is 9"),
        (("--exit-layer", "0"), "exit_layer"),
        (("--exit-layer", "1", "--skip-layers", "auto"), "exclude each other"),
        (("--skip-layers", '{"mlp": [4]}'), "mlp of layer 4, but the model has 4"),
        (("--skip-layers", '{"norm": [1]}'), "norm"),
        (("--skip-layers", "{attention: [1]}"), "is not JSON"),
        (("--skip-layers", "[1]"), "skip_layers"),
        (("--skip-layers", "nowhere.json"), "'nowhere.json' cannot be read"),
    ],
)
def test_wrong_words_exit_with_2(
    model: str, arguments: tuple[str, ...], finding: str
) -> None:
    code, message = refused(model, *arguments)
    assert code == 2
    assert finding in message


def test_unsupported_architecture_exits_with_1(tmp_path: Path) -> None:
    path = write_headers(tmp_path, 2, architectures=["MambaForCausalLM"])
    code, message = refused(path)
    assert code == 1
    assert "this model is a MambaForCausalLM" in message


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"architectures": []}', "IndexError"),
        ('{"architectures": null}', "TypeError"),
        ('{"architectures": ["LlamaForCausalLM"]}', "'num_hidden_layers'"),
    ],
)
def test_directory_without_a_model_exits_with_1(
    tmp_path: Path, config: str | None, finding: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    code, message = refused(str(tmp_path))
    assert code == 1
    assert "num_hidden_layers" in message and finding in message


def test_weights_of_another_depth_than_the_config_exit_with_1(tmp_path: Path) -> None:
    code, message = refused(write_headers(tmp_path, 3, num_hidden_layers=4))
    assert code == 1
    assert "4 layers in one and 3 in the other" in message


def test_unknown_model_exits_with_1() -> None:
    code, message = refused("nobody/nothing")
    assert code == 1
    assert "check the name" in message


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("0.32.1", "supported"), ("0.31.0", "not supported: install 0.32.x or 0.33.x")],
)
def test_version_says_whether_vllm_fits(
    monkeypatch: pytest.MonkeyPatch, found: str, verdict: str
) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: found)
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"vllm-selfspec {__version__}",
        f"vLLM {found}, {verdict}",
    ]


@pytest.mark.parametrize("command", ((), ("show",), ("demo",)))
def test_help_teaches_with_an_example(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: {' '.join(('vllm-selfspec', *command))}" in result.stdout


class FakeDemo(ModuleType):
    """Stands for `vllm_selfspec.bench.demo`, which starts engines."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("vllm_selfspec.bench.demo")
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def run_demo(self, **arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error:
            raise self.error


def test_demo_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDemo()
    monkeypatch.setitem(sys.modules, "vllm_selfspec.bench.demo", fake)
    assert invoke("demo").exit_code == 0
    options = ["--max-tokens", "9", "--num-speculative-tokens", "2"]
    options += ["--repeats", "5", "--output", "figures"]
    assert invoke("demo", "a/model", *options).exit_code == 0
    assert fake.calls == [
        {
            "model": None,
            "max_tokens": 64,
            "num_speculative_tokens": 4,
            "repeats": 1,
            "output": None,
        },
        {
            "model": "a/model",
            "max_tokens": 9,
            "num_speculative_tokens": 2,
            "repeats": 5,
            "output": Path("figures"),
        },
    ]


def test_demo_reports_a_refusal_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UnsupportedModelError("selfspec:\n  not this one")
    monkeypatch.setitem(sys.modules, "vllm_selfspec.bench.demo", FakeDemo(error))
    result = invoke("demo", "a/model")
    assert (result.exit_code, result.stderr) == (1, "Error: selfspec: not this one\n")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (20_976_640, "21.0 MB"),
        (999_900_000, "1.00 GB"),
        (139_000_000_000, "139 GB"),
    ],
)
def test_sizes_have_three_digits(num_bytes: int, text: str) -> None:
    assert cost.decimal(num_bytes) == text


@pytest.mark.parametrize("use", ("", "; cli.app(['show', sys.argv[1]])"))
def test_neither_import_nor_show_loads_torch_or_vllm(model: str, use: str) -> None:
    code = (
        "import atexit, sys; from vllm_selfspec.cli import main as cli; "
        "heavy = {'torch', 'vllm', 'transformers', 'huggingface_hub'}; "
        "atexit.register(lambda: print(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + use, model],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", ["demo", "bench", "tune", "train-exit"])
def test_a_command_that_runs_a_model_says_that_vllm_is_missing(
    command: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "vllm" else found(name, *args),
    )
    more = ["--prompts", "code", "-o", "out"] if command == "train-exit" else []
    done = invoke(command, model, *more)
    assert done.exit_code == 1
    assert f"{command} runs the model by vLLM, which is not installed" in done.output
