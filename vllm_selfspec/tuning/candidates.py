"""Plans worth a try before any search: what is published, and what follows from single
sublayers."""

from collections.abc import Iterator, Mapping, Sequence

from vllm_selfspec.plan.skip_set import SUBLAYERS, SkipSet, SkipSetError

# SWIFT's 0.45 and around it.
SPREAD_RATIOS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)

Sublayer = tuple[int, str]


def simple_plans(num_layers: int) -> Iterator[SkipSet]:
    """Evenly spread sets, and an exit after every layer."""
    for ratio in SPREAD_RATIOS:
        yield SkipSet.evenly_spread(num_layers, ratio)
    for exit_layer in range(1, num_layers):
        yield SkipSet.early_exit(num_layers, exit_layer)


def single_plans(num_layers: int) -> dict[Sublayer, SkipSet]:
    """What skips one sublayer alone, by sublayer."""
    return {
        (layer, sublayer): skipping(num_layers, [(layer, sublayer)])
        for layer in range(num_layers)
        for sublayer in SUBLAYERS
    }


def greedy_path(num_layers: int, loss_of: Mapping[Sublayer, float]) -> list[SkipSet]:
    """Skips one sublayer more each time, the one that is missed least first.

    Args:
        num_layers: Of the model.
        loss_of: What skipping a sublayer alone loses, per cost that it saves.
    """
    order = sorted(loss_of, key=lambda which: loss_of[which])
    return [skipping(num_layers, order[:count]) for count in range(1, len(order))]


def neighbours(plan: SkipSet) -> Iterator[SkipSet]:
    """What differs from a plan in one sublayer."""
    for sublayer in SUBLAYERS:
        for layer in range(plan.num_layers):
            neighbour = switched(plan, [(layer, sublayer)])
            if neighbour is not None:
                yield neighbour


def switched(plan: SkipSet, which: Sequence[Sublayer]) -> SkipSet | None:
    """The plan with some sublayers skipped that ran, and run that were skipped; None
    where nothing would be left."""
    lists = {
        sublayer: getattr(plan, sublayer)
        ^ {layer for layer, name in which if name == sublayer}
        for sublayer in SUBLAYERS
    }
    try:
        return SkipSet.of(plan.num_layers, **lists)
    except SkipSetError:
        return None


def skipping(num_layers: int, which: list[Sublayer]) -> SkipSet:
    """The skip set of some sublayers."""
    lists = {
        sublayer: [layer for layer, name in which if name == sublayer]
        for sublayer in SUBLAYERS
    }
    return SkipSet.of(num_layers, **lists)
