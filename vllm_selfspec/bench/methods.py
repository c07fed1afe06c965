"""`Method`: one way to generate that is compared with the others.

One rule: a peer runs as its documentation recommends, on the same vLLM, model, dtype
and KV cache as ours; where its documentation leaves a choice, a small grid is run and
every point of it is reported.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_selfspec.chosen_plan import Known, resolve_plan
from vllm_selfspec.config import METHOD, SelfSpecConfig
from vllm_selfspec.plan.cost import ModelWeights
from vllm_selfspec.plan.draft_plan import DraftPlan
from vllm_selfspec.plan.skip_set import SkipSet
from vllm_selfspec.plan.target_model import TargetModel

PLAIN = "plain vLLM"
HUGGING_FACE = "Hugging Face"

# vLLM's documentation of n-gram matching proposes up to 5 tokens after matches of up to
# 4 (docs/features/speculative_decoding/n_gram.md); 3 is the cautious half.
NGRAM = {"method": "ngram", "prompt_lookup_max": 4}
# Suffix decoding sets its own lengths; 32 is its documented maximum.
SUFFIX = {"method": "suffix", "num_speculative_tokens": 32}
# Where the target samples, drafts drawn from a distribution are accepted more often.
DRAWN = {"draft_sample_method": "probabilistic"}
MOST_DRAFTS = 8  # that a controller of ours chooses from
# Of plans that are compared with each other, only what the model drafts.
MODEL_ALONE = {"draft_source": "model"}


@dataclass(frozen=True)
class Method:
    """One way to generate.

    Attributes:
        name: As in the report.
        group: The name to choose it by: `plain`, `selfspec`, `ngram`, `suffix`,
            `draft_model`, `hf`.
        speculative_config: vLLM's; None for plain vLLM.
        plan: How ours drafts; None for the others.
        extra_bytes: Weights that are read beside the target's.
        generate: Keyword arguments of Hugging Face's `generate`.
    """

    name: str
    group: str
    speculative_config: dict[str, Any] | None = None
    plan: DraftPlan | None = None
    extra_bytes: int = 0
    generate: dict[str, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """The most tokens drafted a step; 0 where nothing is."""
        return int((self.speculative_config or {}).get("num_speculative_tokens", 0))

    @property
    def has_one_length(self) -> bool:
        """Whether all its drafts have `k` tokens, so that v is the cost of one number
        of rows."""
        config = self.speculative_config or {}
        is_free = config.get("method") == METHOD and "draft_source" not in config
        return not is_free and config.get("draft_length", "fixed") == "fixed"


GROUPS = ("plain", "selfspec", "ngram", "suffix", "draft_model", "hf")


def methods_of(
    model: Path,
    draft_model: Path | None,
    groups: list[str],
    lengths: list[int],
    configs: Sequence[Mapping[str, Any]] = (),
    is_short: bool = False,
) -> list[Method]:
    """The methods of `groups`, plain vLLM first.

    Args:
        model: The target's checkpoint directory.
        draft_model: That of a second model; without it `draft_model` has no method.
        groups: Some of `GROUPS`.
        lengths: Draft lengths of the grids, the best known one first: the methods that
            are no grid take that.
        configs: Configurations of ours, in place of the usual ones.
        is_short: Whether of ours a few are enough.

    Raises:
        ConfigError, PlanError, ProfileError: If one of `configs` is
            not allowed, or does not fit the model.
    """
    weights = ModelWeights.from_checkpoint(model)
    found = [Method(PLAIN, "plain")]
    if "selfspec" in groups:
        target = TargetModel.read(model, str(model))
        known = Known(step=weights.step)
        found += _named_apart(_configured(keys, target, known) for keys in configs)
        usual = _few_of_ours if is_short else _ours
        found += [] if configs else usual(target, lengths)
    if "ngram" in groups:
        found += [
            _peer("ngram", {**NGRAM, "num_speculative_tokens": k}) for k in (3, 5)
        ]
    if "suffix" in groups:
        found.append(Method("vLLM suffix", "suffix", SUFFIX))
    if "draft_model" in groups and draft_model is not None:
        extra = ModelWeights.from_checkpoint(draft_model).streamed
        config = {"method": "draft_model", "model": str(draft_model), **DRAWN}
        found += [
            _peer("draft_model", {**config, "num_speculative_tokens": k}, extra)
            for k in lengths
        ]
    if "hf" in groups:
        found.append(Method(f"{HUGGING_FACE} generate", "hf"))
        exit_layer = weights.num_layers // 4
        found.append(
            Method(
                f"{HUGGING_FACE} early exit {exit_layer}",
                "hf",
                generate={"assistant_early_exit": exit_layer},
            )
        )
    return found


def _few_of_ours(target: TargetModel, lengths: list[int]) -> list[Method]:
    """The bare flag, and early exits after a quarter and a sixth of the layers."""
    exits = (_exits(target, part, lengths[:1]) for part in (4, 6))
    return [_bare_flag(target), *(method for methods in exits for method in methods)]


def _ours(target: TargetModel, lengths: list[int]) -> list[Method]:
    """The bare flag, and copies alone; then what the model alone drafts: by `auto`, and
    by early exits after a quarter and a sixth of the layers, at fixed lengths, the
    second at all of them; the first two with goodput lengths, too."""
    bare = _bare_flag(target)
    copies = {"method": METHOD, "draft_source": "context"}
    assert bare.plan is not None
    return [
        bare,
        Method("selfspec, copies alone", "selfspec", copies),
        _own("auto", {}, bare.plan, lengths[0]),
        _own("auto", {}, bare.plan),
        *_exits(target, 4, [*lengths, None]),
        *_exits(target, 6, lengths[:1]),
    ]


def _bare_flag(target: TargetModel) -> Method:
    plan = resolve_plan(SelfSpecConfig.parse({}), target).plan
    return Method("selfspec", "selfspec", {"method": METHOD}, plan)


def _exits(
    target: TargetModel, part: int, lengths: Sequence[int | None]
) -> Iterator[Method]:
    """An exit after a part of the layers, at every length; None is goodput's."""
    exit_layer = target.num_layers // part
    if not exit_layer:
        return
    plan = DraftPlan.skipping(SkipSet.early_exit(target.num_layers, exit_layer))
    for k in lengths:
        name = f"exit_layer {exit_layer}"
        yield _own(name, {"exit_layer": exit_layer}, plan, k)


def _own(
    name: str, keys: dict[str, Any], plan: DraftPlan, k: int | None = None
) -> Method:
    """One plan of ours at a fixed length, or with goodput lengths."""
    config = {"method": METHOD, **MODEL_ALONE, **keys, **DRAWN}
    if k is None:
        config |= {"draft_length": "goodput", "num_speculative_tokens": MOST_DRAFTS}
        return Method(f"selfspec {name}, goodput", "selfspec", config, plan)
    config |= {"draft_length": "fixed", "num_speculative_tokens": k}
    return Method(f"selfspec {name}, k {k}", "selfspec", config, plan)


def _named_apart(methods: Iterable[Method]) -> Iterator[Method]:
    """Renames those that have the name of another: runs are kept by name."""
    seen: Counter[str] = Counter()
    for method in methods:
        seen[method.name] += 1
        num = seen[method.name]
        yield method if num == 1 else replace(method, name=f"{method.name} ({num})")


def _configured(keys: Mapping[str, Any], target: TargetModel, known: Known) -> Method:
    """What a user configured, under a name that tells of it."""
    config = SelfSpecConfig.parse(keys)
    chosen = resolve_plan(config, target, known=known)
    k = config.num_speculative_tokens
    if "num_speculative_tokens" not in keys and chosen.num_speculative_tokens:
        k = chosen.num_speculative_tokens
    policy = config.draft_length.policy
    words = [str(chosen.plan)]
    if isinstance(config.skip_layers, str) and chosen.source.startswith("profile"):
        words = [Path(config.skip_layers).stem]
    words.append(f"k {k}" if policy == "fixed" else policy)
    resolved = {**keys, "method": METHOD, "num_speculative_tokens": k}
    resolved |= {"draft_length": policy} if policy in ("fixed", "goodput") else {}
    return Method(f"selfspec {', '.join(words)}", "selfspec", resolved, chosen.plan)


def _peer(method: str, config: dict[str, Any], extra_bytes: int = 0) -> Method:
    name = f"vLLM {method}, k {config['num_speculative_tokens']}"
    return Method(name, method, config, extra_bytes=extra_bytes)
