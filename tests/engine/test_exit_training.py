"""An exit layer learns what the target says, and what is saved fits nobody else."""

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engines import Engines, greedy, prompts_of, token_ids
from helpers.full_disk import full_disk
from helpers.models import DEMO_MODEL, NUM_LAYERS, VOCAB_SIZE, build_tiny_model
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.exit_card import (
    CARD_FILE,
    TENSORS_FILE,
    ExitCard,
    ExitLayerError,
    read_exit_card,
    write_exit_layer,
)
from vllm_selfspec.plan.families import UnsupportedModelError
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel, weights_fingerprint
from vllm_selfspec.training.agreement import Agreement, draft_cost, num_right, score
from vllm_selfspec.training.batch import Batch, pieces
from vllm_selfspec.training.errors import TrainError
from vllm_selfspec.training.loss import kl_to_top
from vllm_selfspec.training.student import Student
from vllm_selfspec.training.texts import Continuation, Texts, write_shard
from vllm_selfspec.training.train_exit import candidates
from vllm_selfspec.training.trainer import (
    CHECKPOINT,
    Job,
    Recipe,
    Trainer,
    answers,
    train,
)
from vllm_selfspec.training.workers import Alone, run_by_ray
from vllm_selfspec.whole_file import WriteError

EXIT_LAYER = 2
TOP_K = 8
EXIT_LAYERS = DEMO_MODEL.parent / "exit_layers"


# ---- The card


def write_head(directory: Path, model: Path, **keys: Any) -> ExitCard:
    target = TargetModel.read(model, "a/model")
    card = {
        "exit_layer": EXIT_LAYER,
        "num_layers": target.num_layers,
        "model": target.name,
        "architecture": dict(target.architecture),
        "weights": weights_fingerprint(model),
        "num_parameters": 7,
    }
    return write_exit_layer(directory, {**card, **keys}, b"some tensors")


def test_a_head_is_read_as_it_was_written(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    model = Path(tiny_models["llama"])
    card = write_head(tmp_path, model, training={"seed": 3})
    assert read_exit_card(tmp_path) == card
    card.check_fits(TargetModel.read(model, "x"), model)
    assert not [*tmp_path.glob("*.partial")]


def test_its_file_and_its_key_are_accepted_by_their_former_names(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    card = write_head(tmp_path, Path(tiny_models["llama"]))
    (tmp_path / TENSORS_FILE).rename(tmp_path / "exit_head.safetensors")
    assert read_exit_card(tmp_path) == card
    parsed = SelfSpecConfig.parse({"exit_head": str(tmp_path)})
    assert parsed.trained_exit_layer == str(tmp_path)
    both = {"exit_head": "a", "trained_exit_layer": "a"}
    with pytest.raises(ConfigError, match="remove exit_head"):
        SelfSpecConfig.parse(both)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / CARD_FILE).unlink(), "has no card.json"),
        (lambda d: (d / TENSORS_FILE).unlink(), "has no exit_layer.safetensors"),
        (lambda d: shutil.rmtree(d), "has no card.json"),
        (lambda d: (d / TENSORS_FILE).write_bytes(b"Some tensors"), "it is damaged"),
        (lambda d: (d / TENSORS_FILE).write_bytes(b"some"), "it is damaged"),
        (lambda d: (d / CARD_FILE).write_text("[" * 10**5), "train it again"),
        (lambda d: (d / CARD_FILE).write_text(" " * 2_000_000), "1000000 bytes"),
        (lambda d: edit(d, exit_layer=0), "exit_layer is 0, but must be at least 1"),
        (lambda d: edit(d, exit_layer=True), "must be a whole number"),
        (lambda d: edit(d, exit_layer=4), "the last of the target's 4 layers"),
        (lambda d: edit(d, tensors=None), "tensors is None, but must be text"),
        (lambda d: edit(d, layer=3), "there is no key 'layer'"),
        (
            lambda d: edit(d, head_rank=8),
            "head_rank is 8, but an exit layer drafts through the target's own LM "
            "head: train it again",
        ),
        (
            lambda d: edit(d, skip_layers={"mlp": [1]}),
            "skip_layers is {'mlp': [1]}, but an exit layer is trained on the target's "
            "first layers whole: train it again",
        ),
    ],
)
def test_a_damaged_head_is_refused(
    damage: Callable[[Path], object],
    message: str,
    tiny_models: dict[str, str],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "head"
    write_head(directory, Path(tiny_models["llama"]))
    damage(directory)
    with pytest.raises(ExitLayerError, match=re.escape(message)):
        read_exit_card(directory)


def test_a_card_of_a_former_version_is_read(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    card = write_head(tmp_path, Path(tiny_models["llama"]))
    edit(tmp_path, head_rank=None, skip_layers=None)
    assert read_exit_card(tmp_path) == card


def edit(directory: Path, **keys: Any) -> None:
    file = directory / CARD_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_foreign_head_is_refused_with_what_differs(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    llama, qwen3 = (Path(tiny_models[family]) for family in ("llama", "qwen3"))
    card = write_head(tmp_path / "head", llama)

    def refusal(model: Path) -> str:
        with pytest.raises(ExitLayerError) as error:
            card.check_fits(TargetModel.read(model, "x"), model)
        return str(error.value)

    assert "Qwen3ForCausalLM in place of LlamaForCausalLM" in refusal(qwen3)
    deeper = build_tiny_model("llama", tmp_path / "deeper", num_hidden_layers=6)
    assert "6 layers in place of 4" in refusal(deeper)
    other = build_tiny_model("llama", tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit of one weight
    (other / "model.safetensors").write_bytes(weights)
    assert f"in place of {card.weights}" in refusal(other)
    (other / "model.safetensors").unlink()
    card.check_fits(TargetModel.read(other, "x"), other)  # nothing to compare


# ---- The loss


def slow_kl(logits: list[float], top_ids: list[int], top: list[float]) -> float:
    """With the other tokens merged into one, by the definition."""
    normaliser = math.fsum(math.exp(x) for x in logits)
    found = [math.exp(x) / normaliser for x in logits]
    pairs = [(math.exp(p), found[i]) for i, p in zip(top_ids, top, strict=True)]
    others = [q for i, q in enumerate(found) if i not in top_ids]
    pairs.append((1 - math.fsum(p for p, _ in pairs), math.fsum(others)))
    return math.fsum(p * math.log(p / q) for p, q in pairs if p > 0)


def test_kl_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    student, target = 3 * torch.randn(2, 40, 50)
    top = target.log_softmax(-1).topk(6)
    found = kl_to_top(student, top.indices, top.values)
    rows = zip(*(x.tolist() for x in (student, top.indices, top.values)), strict=True)
    expected = torch.tensor([slow_kl(*row) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    apart = target.log_softmax(-1) - student.log_softmax(-1)
    whole = (target.softmax(-1) * apart).sum(-1)
    assert (found <= whole + 1e-5).all(), "merging tokens cannot drive them apart"
    every = target.log_softmax(-1).sort(descending=True)
    found = kl_to_top(student, every.indices, every.values)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def test_kl_and_its_gradient_vanish_where_the_student_says_the_same() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(20, 50)).requires_grad_()
    top = logits.detach().log_softmax(-1).topk(6)
    found = kl_to_top(logits, top.indices, top.values)
    found.sum().backward()
    assert logits.grad is not None
    assert found.abs().max() < 1e-5 and logits.grad.abs().max() < 1e-6


def test_a_target_without_doubt_leaves_no_rest() -> None:
    logits = torch.tensor([[2.0, 0.0, -100.0]], requires_grad=True)
    found = kl_to_top(logits, torch.tensor([[0, 1]]), torch.tensor([[0.0, -200.0]]))
    found.sum().backward()
    assert found.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    assert logits.grad is not None and logits.grad.isfinite().all()


# ---- The student

CUT = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"sliding_window": 16, "tie_word_embeddings": True},
    "gpt2": {"n_inner": 96, "head_dim": None, "num_key_value_heads": None},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", CUT)
def test_what_enters_the_exit_layer_is_the_targets_own_state(
    family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = build_tiny_model(family, tmp_path, **CUT[family])
    ids = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.manual_seed(0))
    where = torch.ones_like(ids, dtype=torch.bool)
    target = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = target(ids, output_hidden_states=True)
    for exit_layer in (1, 3):
        student = Student(path, exit_layer)
        with student.recorded_states() as states, torch.no_grad():
            logits = student.logits(ids, where)
        # The same operations in the same order on the same machine.
        assert torch.equal(states[0], expected.hidden_states[exit_layer])
    # After all layers but the last, the untrained exit layer is the last one.
    torch.testing.assert_close(logits, expected.logits.flatten(0, 1))


def test_without_the_exit_layer_it_is_an_early_exit(
    tiny_models: dict[str, str],
) -> None:
    from transformers import AutoModelForCausalLM

    path = Path(tiny_models["qwen3"])
    ids = torch.randint(VOCAB_SIZE, (2, 30), generator=torch.manual_seed(0))
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, 3:], where[1, 20:] = True, True
    target: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    student = Student(path, EXIT_LAYER)
    with torch.no_grad(), student.without_exit_layer():
        found = student.logits(ids, where)
        hidden = target(ids, output_hidden_states=True).hidden_states[EXIT_LAYER]
        expected = target.lm_head(target.model.norm(hidden))[where]
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not torch.equal(student.logits(ids, where), found), "the layer is back"


@pytest.mark.parametrize("family", CUT)
def test_a_head_has_the_names_of_a_checkpoint_of_one_layer(
    family: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    path = build_tiny_model(family, tmp_path, **CUT[family])
    found = Student(path, EXIT_LAYER).tensors(torch.float32)
    whole = load_file(path / "model.safetensors")
    layer = re.compile(rf"(layers|h)\.{NUM_LAYERS - 1}\.")
    last = {
        layer.sub(r"\1.0.", name): tensor
        for name, tensor in whole.items()
        if layer.search(name)
    }
    assert found.keys() == last.keys()
    assert all(torch.equal(found[name], last[name]) for name in last)


def test_what_cannot_be_cut_is_refused(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    path = Path(tiny_models["llama"])
    for exit_layer in (0, NUM_LAYERS):
        with pytest.raises(UnsupportedModelError, match="use 1 to 3"):
            Student(path, exit_layer)
    opt = tmp_path / "opt"
    shutil.copytree(path, opt)
    config = json.loads((opt / "config.json").read_text())
    config["architectures"] = ["OPTForCausalLM"]
    (opt / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="this model is a OPT"):
        Student(opt, 1)


# ---- Exposure


def test_what_enters_the_exit_layer_while_drafting_is_the_targets_own(
    tiny_models: dict[str, str], engines: Engines
) -> None:
    """Of every draft token, right or wrong, to float32 rounding: there is nothing that
    training on the target's text does not show the exit layer."""
    path = tiny_models["llama"]
    spec = {"exit_layer": EXIT_LAYER, "num_speculative_tokens": 4}
    llm = engines.get(path, spec)
    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.model_runner.model
    calls: list[tuple[list[int], torch.Tensor]] = []

    def record(_: Any, args: Any, output: Any) -> None:
        calls.append((args[0].tolist(), (output[0] + output[1]).clone()))

    hook = model.model.layers[EXIT_LAYER - 1].register_forward_hook(record)
    (prompt,) = prompts_of(1, shortest=24)
    try:
        ((text,),) = token_ids(llm.generate([prompt], greedy(40), use_tqdm=False))
    finally:
        hook.remove()
    drafted: dict[int, torch.Tensor] = {}
    verified: dict[int, torch.Tensor] = {}
    num_compared = 0
    for positions, states in calls:
        if len(positions) == 1:  # a draft step of the one request
            drafted[positions[0]] = states[0]
            continue
        verified |= dict(zip(positions, states, strict=True))
        for position in drafted.keys() & {*positions}:
            # Five rows or one: sums in another order. States are of the size of 10.
            torch.testing.assert_close(
                drafted[position], verified[position], rtol=1e-5, atol=1e-4
            )
            num_compared += 1
        drafted.clear()
    assert num_compared > 40, "there must be something to compare"
    ids = torch.tensor([[*prompt["prompt_token_ids"], *text]])
    student = Student(Path(path), EXIT_LAYER)
    with student.recorded_states() as found, torch.no_grad():
        student.logits(ids, torch.ones_like(ids, dtype=torch.bool))
    known = range(ids.shape[1] - 1)  # the newest token was never run
    expected = torch.stack([verified[position] for position in known])
    torch.testing.assert_close(found[0][0, known], expected, rtol=1e-5, atol=1e-4)


# ---- Training


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough for a step to take milliseconds."""
    small = {"hidden_size": 32, "intermediate_size": 48}
    return build_tiny_model("llama", tmp_path_factory.mktemp("target"), **small)


@pytest.fixture(scope="module")
def texts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, with what the target says of them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    rng = np.random.default_rng(0)
    found = []
    for number in range(40):
        ids = rng.integers(2, VOCAB_SIZE, rng.integers(16, 40))
        first = int(rng.integers(1, 12))
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None, :-1]).logits[0, first - 1 :]
        top = logits.log_softmax(-1).topk(TOP_K)
        columns = (top.indices.numpy(), top.values.numpy())
        found.append(Continuation(ids, first, *columns, temperature=number % 2))
    directory = tmp_path_factory.mktemp("texts")
    write_shard(directory / "00000.safetensors", found[:25])
    write_shard(directory / "00001.safetensors", found[25:])
    return directory


@pytest.fixture
def job(target: Path, texts: Path, tmp_path: Path) -> Job:
    recipe = Recipe(epochs=4, batch_size=8)
    numbers = tuple(range(32))
    return Job(target, EXIT_LAYER, texts, numbers, recipe, tmp_path / "out", 3)


def test_texts_are_read_as_they_were_written(tmp_path: Path) -> None:
    one = Continuation(
        np.array([5, 6, 7]), 1, np.array([[6, 1], [7, 2]]), np.zeros((2, 2)) - 1, 0.0
    )
    two = replace(one, token_ids=np.array([8, 9, 1, 2]), first=2, temperature=1.0)
    write_shard(tmp_path / "00000.safetensors", [one, two])
    write_shard(tmp_path / "00001.safetensors", [two])
    (tmp_path / "00002.safetensors.17.partial").write_bytes(b"killed")
    texts = Texts(tmp_path)
    assert len(texts) == 3 and texts.num_tokens == 6
    for found, expected in zip(texts, (one, two, two), strict=True):
        assert found.first == expected.first
        assert found.temperature == expected.temperature
        for name in ("token_ids", "top_ids", "top_logprobs"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_a_batch_asks_where_the_target_answered(texts: Path, target: Path) -> None:
    chosen = [Texts(texts)[number] for number in (0, 3, 4)]
    student = Student(target, 3)  # whose exit layer is still the target's last
    batch = Batch.of(chosen, student.device)
    with torch.no_grad():
        logits = student.logits(batch.token_ids, batch.where)
    assert len(logits) == sum(len(text.top_ids) for text in chosen)
    assert torch.equal(logits.argmax(-1), batch.top_ids[:, 0])
    top = logits.log_softmax(-1).gather(-1, batch.top_ids)
    # Kept in float16, of log-probabilities down to -8.
    torch.testing.assert_close(top, batch.top_logprobs, rtol=0, atol=0.01)
    assert float(kl_to_top(logits, batch.top_ids, batch.top_logprobs).max()) < 1e-3
    each = [[n] for n in range(3)]
    assert [*pieces(chosen, 1 << 25)] == each, "each too large to be with another"
    assert [*pieces(chosen, 1)] == [[0, 1, 2]]


def test_training_teaches_and_leaves_the_target_alone(job: Job) -> None:
    before = job.student()
    job = replace(job, recipe=Recipe(epochs=40, batch_size=8))
    trainer = train(job, Alone())
    assert np.mean(trainer.curve[-8:]) < 0.5 * np.mean(trainer.curve[:8])
    frozen = [
        (a, b)
        for (name, a), b in zip(
            before._model.named_parameters(),
            trainer.student._model.parameters(),
            strict=True,
        )
        if not name.startswith(f"model.layers.{EXIT_LAYER}.")
    ]
    assert len(frozen) > 10 and all(torch.equal(a, b) for a, b in frozen)


def test_a_saved_head_says_what_the_trained_one_says(
    job: Job, target: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save

    trainer = train(job, Alone())
    head = tmp_path / "head"
    tensors = save(trainer.student.tensors(torch.float32))
    model = TargetModel.read(target, "x")
    card = {
        "exit_layer": EXIT_LAYER,
        "num_layers": NUM_LAYERS,
        "model": "x",
        "architecture": dict(model.architecture),
        "weights": weights_fingerprint(target),
        "num_parameters": trainer.student.num_parameters,
    }
    write_exit_layer(head, card, tensors)
    held_out = [*Texts(job.texts)][32:]
    again = Student.read(target, head)
    assert again.num_parameters == trainer.student.num_parameters
    for a, b in zip(
        answers(again, held_out), answers(trainer.student, held_out), strict=True
    ):
        assert a.tolist() == b.tolist()


def test_a_run_is_decided_by_its_seed(job: Job, tmp_path: Path) -> None:
    def curve(name: str, seed: int) -> list[float]:
        recipe = replace(job.recipe, seed=seed)
        return train(replace(job, recipe=recipe, output=tmp_path / name), Alone()).curve

    first = curve("first", 0)
    assert curve("again", 0) == first, "to the last bit"
    assert curve("other", 1) != first


def test_a_run_with_other_settings_is_not_gone_on_with(job: Job) -> None:
    train(job, Alone())
    other = replace(job, recipe=replace(job.recipe, batch_size=4))
    with pytest.raises(TrainError, match="batch_size 8 in place of 4"):
        train(other, Alone())
    file = job.output / CHECKPOINT
    state = torch.load(file, weights_only=True)
    state["settings"]["loss"] = "ce"  # as a former version could be told
    torch.save(state, file)
    with pytest.raises(TrainError, match="loss 'ce' in place of None"):
        train(job, Alone())


def test_ctrl_c_is_heeded_between_two_steps(job: Job, tmp_path: Path) -> None:
    whole = train(replace(job, output=tmp_path / "whole"), Alone()).curve

    def interrupt(trainer: Trainer) -> None:
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(job, Alone(), interrupt)
    steps: list[int] = []
    trainer = train(job, Alone(), lambda trainer: steps.append(trainer.step))
    assert steps[0] == 6 and trainer.curve == whole


def test_a_full_disk_keeps_the_last_checkpoint(job: Job) -> None:
    trainer = train(job, Alone())
    file = job.output / CHECKPOINT
    before = file.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(WriteError, match="make room"):
        trainer.save()
    assert file.read_bytes() == before
    assert [*job.output.iterdir()] == [file], "and nothing beside it"


KILLED = """
import pickle, sys, time
from vllm_selfspec.training.trainer import train
from vllm_selfspec.training.workers import Alone
train(pickle.loads(bytes.fromhex(sys.argv[1])), Alone(), lambda _: time.sleep(0.05))
"""


def test_a_killed_run_goes_on_to_the_same_curve(job: Job, tmp_path: Path) -> None:
    import pickle

    whole = train(replace(job, output=tmp_path / "whole"), Alone())
    argument = pickle.dumps(job).hex()
    process = subprocess.Popen([sys.executable, "-c", KILLED, argument])
    end = time.monotonic() + 60
    while not (job.output / "training.pt").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    steps: list[int] = []
    again = train(job, Alone(), lambda trainer: steps.append(trainer.step))
    assert 1 < steps[0] < len(whole.curve), "it went on in the middle"
    assert again.curve == whole.curve, "to the last bit"
    for name, tensor in whole.student.trained.items():
        assert torch.equal(tensor, again.student.trained[name])


def test_two_workers_take_the_steps_of_one(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    alone = train(replace(job, output=tmp_path / "alone"), Alone())
    run_by_ray(2, job, tmp_path / "ray")
    together = Trainer(job, job.student(), Alone())
    together.load()
    # Gradients are added up in another order.
    assert together.curve == pytest.approx(alone.curve, rel=1e-3)
    for name, tensor in alone.student.trained.items():
        torch.testing.assert_close(
            together.student.trained[name], tensor, rtol=0, atol=2e-4
        )


# ---- What it is worth


def greedy_text(tokens: list[int], first: int) -> Continuation:
    own = np.array(tokens[first:])
    certain = np.zeros((len(own), 1))
    return Continuation(np.array(tokens), first, own[:, None], certain, 0)


def test_right_drafts_in_a_row_are_counted_from_every_position() -> None:
    text = greedy_text([1, 2, 3, 4, 5, 6, 7, 8], first=2)  # own: 3 to 8
    found = np.array([3, 4, 9, 6, 7, 8])  # wrong after token 4 alone
    assert num_right(text, found).tolist() == [1, 0, 3, 2, 1]
    assert num_right(text, found, most=2).tolist() == [1, 0, 2, 2, 1]
    assert num_right(text, np.array([0, *found[1:]])).tolist() == [1, 0, 3, 2, 1], (
        "the first token is sampled before anything is drafted"
    )


def test_agreement_is_by_the_targets_likeliest_token() -> None:
    one = greedy_text([1, 2, 3, 4], 2)
    sampled = replace(one, temperature=1.0, token_ids=np.array([1, 2, 9, 9]))
    found = Agreement.of([one, sampled], [np.array([3, 4]), np.array([3, 9])])
    assert found.all == 0.75
    assert found.by_temperature == {0: 1, 1: 0.5}


def test_a_draft_costs_what_it_reads() -> None:
    weights = ModelWeights((10,) * 4, (20,) * 4, 30)
    plain = DraftPlan.skipping(SkipSet.early_exit(4, 3)).share(weights.step)
    assert draft_cost(weights, 2) == plain, "two layers and one"


def test_a_worth_is_the_tuners() -> None:
    text = greedy_text([*range(62)], 1)
    found = score([text], [text.token_ids[1:]], 0.1)
    assert (found.k, found.walk.acceptance[0]) == (8, 1)
    assert found.speed_up == pytest.approx(60 / 7 / 1.8, rel=0.05)


def test_auto_compares_a_few_exit_layers() -> None:
    assert candidates(12) == [1, 2, 3, 4]
    assert candidates(40) == [3, 5, 7, 10, 13]
    assert candidates(2) == [1]


# ---- The command

PROMPTS = [{"prompt": "for i in range(" + "x" * n} for n in range(14)]
COMMAND = [sys.executable, "-m", "vllm_selfspec.cli", "train-exit"]
SMALL = shlex.split(
    "--max-tokens 12 --top-k 8 --epochs 2 --batch-size 4 --dtype float32"
)


def test_the_command_trains_from_prompts_to_a_head(
    target: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in PROMPTS) + "\n")
    cache, out = tmp_path / "cache", tmp_path / "head"
    paths = ["--prompts", str(prompts), "--cache", str(cache), "-o", str(out)]
    command = [*COMMAND, str(target), *paths, *SMALL]
    done = subprocess.run(
        [*command, "--exit-layer", "auto"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Agreement with the target on held-out text" in done.stdout
    card = read_exit_card(out)
    card.check_fits(TargetModel.read(target, "x"), target)
    assert card.exit_layer in candidates(NUM_LAYERS)
    assert (out / "loss.svg").read_text().count("<svg") == 1
    assert len(json.loads((out / "loss.json").read_text())["by_step"]) == 8
    (directory,) = cache.iterdir()
    texts = Texts(directory)
    assert len(texts) == len(PROMPTS)
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for text in texts:
        ids, own = torch.from_numpy(text.token_ids)[None], text.token_ids[text.first :]
        with torch.no_grad():
            logits = model(ids).logits[0, text.first - 1 : -1].log_softmax(-1)
        if text.temperature == 0:
            assert own.tolist() == text.top_ids[:, 0].tolist()
        top = logits.topk(8)
        # Kept in float16: 11 bits of log-probabilities down to -16.
        np.testing.assert_allclose(text.top_logprobs, top.values, atol=0.01)
    sampled = [text for text in texts if text.temperature == 1]
    assert any((t.token_ids[t.first :] != t.top_ids[:, 0]).any() for t in sampled)


def test_wrong_words_are_refused_in_one_line(target: Path, tmp_path: Path) -> None:
    from vllm_selfspec.cli.options import parse_exit_layer

    assert (parse_exit_layer("auto"), parse_exit_layer("3")) == (None, 3)
    for words in ("-1", "x", "1.5", ""):
        with pytest.raises(ConfigError, match="--exit-layer takes a number"):
            parse_exit_layer(words)
