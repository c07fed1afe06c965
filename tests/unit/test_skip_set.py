"""A `SkipSet` that exists is valid for its number of layers."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_selfspec.plan.skip_set import DEFAULT_SKIP_RATIO, SkipSet, SkipSetError

# The same examples on every run; and no clock decides, for the machine may be busy.
SEEDED = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)
DEPTHS = (1, 2, 3, 4, 5, 12, 24, 32, 40, 80)


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
@pytest.mark.parametrize("layer", [4, 40, -1])
def test_a_layer_the_model_lacks_is_refused(sublayer: str, layer: int) -> None:
    with pytest.raises(SkipSetError) as error:
        SkipSet.of(4, **{sublayer: [1, layer]})
    message = str(error.value)
    assert f"{sublayer} of layer {layer}" in message, "the value found"
    assert "the model has 4 layers (0 to 3)" in message, "the rule"
    assert f"remove [{layer}] from '{sublayer}'" in message, "the fix, and only that"


def test_skipping_everything_is_refused() -> None:
    with pytest.raises(SkipSetError) as error:
        SkipSet.of(4, range(4), range(4))
    message = str(error.value)
    assert "must run at least one sublayer" in message, "the rule"
    assert "names all 8" in message, "the value found"
    assert "keep one, for example attention and mlp of layer 3" in message, "the fix"


def test_one_sublayer_left_is_enough() -> None:
    skip_set = SkipSet.of(4, range(4), range(3))
    assert skip_set.num_skipped == 7


@pytest.mark.parametrize(
    ("exit_layer", "fix"), [(0, "use 1"), (-3, "use 1"), (5, "use 4"), (99, "use 4")]
)
def test_an_exit_layer_out_of_range_is_refused(exit_layer: int, fix: str) -> None:
    with pytest.raises(SkipSetError) as error:
        SkipSet.early_exit(4, exit_layer)
    message = str(error.value)
    assert "exit_layer is the number of layers a draft runs, 1 to 4" in message, "rule"
    assert f"but it is {exit_layer}:" in message, "the value found"
    assert message.endswith(fix), "the fix is the nearest allowed number"


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_an_early_exit_skips_exactly_the_layers_from_it_on(num_layers: int) -> None:
    for exit_layer in range(1, num_layers + 1):
        skip_set = SkipSet.early_exit(num_layers, exit_layer)
        skipped = frozenset(range(exit_layer, num_layers))
        assert skip_set.attention == skip_set.mlp == skipped
        if exit_layer < num_layers:
            assert skip_set.exit_layer == exit_layer
        else:
            assert skip_set.exit_layer is None, "nothing skipped is no early exit"


def test_a_set_that_is_no_early_exit_says_so() -> None:
    assert SkipSet.of(4, [1], [1]).exit_layer is None, "layer 2 and 3 run"
    assert SkipSet.of(4, [2, 3], [3]).exit_layer is None, "layer 2's MLP runs"


@pytest.mark.parametrize("num_layers", DEPTHS)
def test_the_default_keeps_first_and_last_layer_and_skips_its_share(
    num_layers: int,
) -> None:
    skip_set = SkipSet.evenly_spread(num_layers)
    kept = {0, num_layers - 1}
    assert not kept & skip_set.attention and not kept & skip_set.mlp
    wanted = min(round(DEFAULT_SKIP_RATIO * 2 * num_layers), 2 * max(num_layers - 2, 0))
    assert skip_set.num_skipped == wanted, (
        f"{DEFAULT_SKIP_RATIO} of {2 * num_layers} sublayers, but {skip_set}"
    )


@pytest.mark.parametrize("num_layers", [12, 24, 32, 40, 80])
@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.6])
def test_evenly_spread_leaves_no_long_stretch_and_no_crowd(
    num_layers: int, ratio: float
) -> None:
    skip_set = SkipSet.evenly_spread(num_layers, ratio)
    for layers in (skip_set.attention, skip_set.mlp):
        order = sorted(layers)
        gaps = [b - a for a, b in zip(order, order[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1, f"equal distances, but {order}"


@given(
    num_layers=st.integers(1, 100),
    ratio=st.floats(0, 1, allow_nan=False),
)
@SEEDED
def test_any_ratio_gives_a_valid_set(num_layers: int, ratio: float) -> None:
    skip_set = SkipSet.evenly_spread(num_layers, ratio)
    assert skip_set.num_skipped <= round(ratio * 2 * num_layers)


@given(
    num_layers=st.integers(1, 40),
    attention=st.sets(st.integers(0, 39)),
    mlp=st.sets(st.integers(0, 39)),
)
@SEEDED
def test_a_valid_set_survives_the_trip_to_a_dict_and_back(
    num_layers: int, attention: set[int], mlp: set[int]
) -> None:
    try:
        skip_set = SkipSet.of(num_layers, attention, mlp)
    except SkipSetError:
        too_deep = {i for i in attention | mlp if i >= num_layers}
        full = len(attention) + len(mlp) == 2 * num_layers
        assert too_deep or full, "only these two are reasons to refuse"
        return
    assert SkipSet.from_dict(num_layers, skip_set.to_dict()) == skip_set
    assert hash(SkipSet.from_dict(num_layers, skip_set.to_dict())) == hash(skip_set)


def test_a_dict_may_leave_a_sublayer_out() -> None:
    assert SkipSet.from_dict(4, {"mlp": [2]}) == SkipSet.of(4, mlp=[2])
    assert SkipSet.from_dict(4, {}) == SkipSet.of(4)


def test_a_skip_set_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SkipSet.of(4).attention = frozenset({1})  # type: ignore[misc]


@pytest.mark.parametrize(
    ("skip_set", "text"),
    [
        (SkipSet.of(4), "nothing skipped"),
        (SkipSet.early_exit(4, 2), "exit after layer 1 of 4"),
        (
            SkipSet.of(9, [1, 2, 3, 7], []),
            "skips attention 1-3,7; mlp none (of 9 layers)",
        ),
    ],
)
def test_it_reads_as_a_person_would_say_it(skip_set: SkipSet, text: str) -> None:
    assert str(skip_set) == text
