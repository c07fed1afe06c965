"""Trains the models of the benchmarks: three small Llamas on the same text.

- demo: with redundant layers, as a big model's are; what a draft view is good at.
- plain: its twin without any of that, the hard case.
- small: two layers, the second model that vLLM's `draft_model` needs.

Recipe of the first: LayerSkip (arXiv 2404.16710): stochastic depth that rises with the
layer, and an early-exit loss through the shared final norm and LM head. Two things
differ, both so that a short CPU run is enough: attention and MLP are dropped
independently, because the draft skips sublayers and not layers, and the exits also
learn the full model's distribution. Of all three, matrices are trained with Muon, the
rest with AdamW. The learning rate is constant and then falls linearly to zero over the
last quarter, so a run can be resumed with another `--steps` at any time before that.

    python benchmarks/train_demo_model.py -o benchmarks/demo_model --steps 1000
    python benchmarks/train_demo_model.py --recipe plain -o benchmarks/plain_model \
        --tokenizer benchmarks/demo_model --steps 1000

Ctrl-C writes a checkpoint; the same command goes on from it.
"""

import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import texts

from vllm_selfspec.bench.provenance import command_line, provenance

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
END_OF_TEXT = "<|endoftext|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, written to the card."""

    num_layers: int = 12
    hidden_size: int = 256
    intermediate_size: int = 640
    num_heads: int = 8
    num_kv_heads: int = 4
    vocab_size: int = 4096
    seq_len: int = 512
    batch_size: int = 8
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 40
    decay_fraction: float = 0.25
    max_layer_dropout: float = 0.25
    exit_layer: int = 3
    exit_layer_share: float = 0.6  # of the steps; a random other depth otherwise
    exit_weight: float = 1.5  # 0: no exit is trained
    exit_label_weight: float = 0.3  # the rest learns the full model's distribution
    seed: int = 1


RECIPES = {
    "demo": Recipe(),
    "plain": Recipe(max_layer_dropout=0, exit_weight=0),
    "small": Recipe(num_layers=2, max_layer_dropout=0, exit_weight=0),
}
WHAT = {
    "demo": "demo model of vllm_selfspec: LayerSkip recipe on Python's stdlib",
    "plain": "twin of the demo model, trained plainly on the same text",
    "small": "draft model for the demo model and its twin, trained on the same text",
}


class Data:
    """Token ids of the training and held-out text. Owns the tokenizer."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        from transformers import AutoTokenizer

        if not (directory / "tokenizer.json").exists():
            train_tokenizer(recipe.vocab_size).save_pretrained(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.train = self._encode(False)
        self.held_out = self._encode(True)

    def _encode(self, held_out: bool) -> np.ndarray:
        end = self.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        ids: list[int] = []
        for _, text in texts(held_out):
            ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids.append(end)
        return np.array(ids, dtype=np.int32)

    def batch(self, rng: np.random.Generator, rows: int, seq_len: int) -> torch.Tensor:
        starts = rng.integers(0, len(self.train) - seq_len - 1, size=rows)
        # [rows, seq_len + 1]
        return torch.from_numpy(
            np.stack([self.train[s : s + seq_len + 1] for s in starts]).astype(np.int64)
        )


def train_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with a small chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for _, text in texts(False)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe) -> Any:
    """A randomly initialised Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def block(
    layer: Any, hidden: torch.Tensor, rope: Any, keep_attn: bool, keep_mlp: bool
) -> torch.Tensor:
    """One decoder layer, either sublayer left out. `hidden` is [rows, seq, width]."""
    if keep_attn:
        normed = layer.input_layernorm(hidden)
        hidden = (
            hidden
            + layer.self_attn(normed, position_embeddings=rope, attention_mask=None)[0]
        )
    if keep_mlp:
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden


def exit_loss(
    draft: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, label_weight: float
) -> torch.Tensor:
    """Cross-entropy of an early exit against the text and the full model, mixed.

    `draft` and `target` are logits, [tokens, vocab]; `labels` is [tokens].
    """
    log_probs = draft.log_softmax(-1)
    to_target = -(target.detach().softmax(-1) * log_probs).sum(-1).mean()
    to_labels = F.nll_loss(log_probs, labels)
    return label_weight * to_labels + (1 - label_weight) * to_target


class Trainer:
    """Owns the model, the optimizers and the random state of one run."""

    def __init__(self, recipe: Recipe, data: Data, steps: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.data, self.steps = recipe, data, steps
        self.model = build_model(recipe)
        self.block = torch.compile(block)
        self.exit_loss = torch.compile(exit_loss)
        self.cross_entropy = torch.compile(F.cross_entropy)
        self.rng = np.random.default_rng(recipe.seed)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        layers = self.model.model.layers
        matrices = [p for p in layers.parameters() if p.ndim == 2]
        others = [p for p in layers.parameters() if p.ndim != 2]
        others += [self.model.model.embed_tokens.weight, self.model.model.norm.weight]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=recipe.muon_lr,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="original",
            ),
            torch.optim.AdamW(
                others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0
            ),
        ]
        self.base_lrs = [recipe.muon_lr, recipe.adam_lr]

    def lr_scale(self) -> float:
        """Warm-up, constant, then linear to zero."""
        decay_steps = self.recipe.decay_fraction * self.steps
        return min(
            (self.step + 1) / self.recipe.warmup_steps,
            1.0,
            (self.steps - self.step) / decay_steps,
        )

    def dropped(self, layer: int) -> bool:
        """LayerSkip, equation 2: `p_max * (exp(l ln 2 / (L - 1)) - 1)`."""
        last = self.recipe.num_layers - 1
        p = self.recipe.max_layer_dropout * (math.exp(layer * math.log(2) / last) - 1)
        return bool(self.rng.random() < p)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.model.norm(hidden)).flatten(0, 1)

    def losses(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of the full depth and of this step's early exit."""
        recipe = self.recipe
        inputs, labels = batch[:, :-1], batch[:, 1:].flatten()
        exit_layer = recipe.exit_layer
        if self.rng.random() >= recipe.exit_layer_share:
            exit_layer = int(self.rng.integers(1, recipe.num_layers))
        hidden = self.model.model.embed_tokens(inputs)
        rope = self.model.model.rotary_emb(hidden, torch.arange(inputs.shape[1])[None])
        for index, layer in enumerate(self.model.model.layers):
            keep_attn, keep_mlp = not self.dropped(index), not self.dropped(index)
            hidden = self.block(layer, hidden, rope, keep_attn, keep_mlp)
            if index + 1 == exit_layer and recipe.exit_weight:
                draft = self.logits(hidden)
        target = self.logits(hidden)
        losses = {"loss": self.cross_entropy(target, labels)}
        if recipe.exit_weight:
            losses["exit"] = self.exit_loss(
                draft, target, labels, recipe.exit_label_weight
            )
        return losses

    def train_step(self) -> dict[str, float]:
        recipe = self.recipe
        batch = self.data.batch(self.rng, recipe.batch_size, recipe.seq_len)
        losses = self.losses(batch)
        (losses["loss"] + recipe.exit_weight * losses.get("exit", 0)).backward()
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * self.lr_scale()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    def agreement(self, rows: int = 48) -> dict[str, Any]:
        """Share of held-out tokens where exit N names the full model's next token."""
        length = self.recipe.seq_len
        held = self.data.held_out
        starts = np.linspace(0, len(held) - length - 2, rows).astype(int)
        same = np.zeros(self.recipe.num_layers)
        loss = 0.0
        for start in starts:
            ids = torch.from_numpy(held[start : start + length + 1].astype(np.int64))
            hidden = self.model.model.embed_tokens(ids[None, :-1])
            rope = self.model.model.rotary_emb(hidden, torch.arange(length)[None])
            picks = []
            for layer in self.model.model.layers:
                hidden = block(layer, hidden, rope, True, True)
                logits = self.logits(hidden)
                picks.append(logits.argmax(-1))
            loss += float(F.cross_entropy(logits, ids[1:]))
            same += [float((p == picks[-1]).float().mean()) for p in picks]
        by_layer = {str(i + 1): round(v / rows, 4) for i, v in enumerate(same)}
        return {"held_out_loss": round(loss / rows, 4), "agreement": by_layer}

    def save_checkpoint(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.bit_generator.state,
            "step": self.step,
            "curve": self.curve,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load_checkpoint(self, path: Path) -> None:
        state = torch.load(path, weights_only=False)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.bit_generator.state = state["rng"]
        self.step, self.curve = state["step"], state["curve"]


def export(trainer: Trainer, output: Path, what: str, seconds: float) -> None:
    """Writes the bf16 checkpoint and its card."""
    import transformers

    report = trainer.agreement()
    trainer.model.to(torch.bfloat16).save_pretrained(output)
    tokens = trainer.step * trainer.recipe.batch_size * trainer.recipe.seq_len
    card = {
        "what": what,
        **provenance(command_line()),
        "transformers": transformers.__version__,
        "steps": trainer.step,
        "tokens": tokens,
        "seconds_of_this_run": round(seconds),
        "recipe": asdict(trainer.recipe),
        "train_tokens_available": len(trainer.data.train),
        "held_out_tokens": len(trainer.data.held_out),
        **report,
        "curve": trainer.curve,
    }
    (output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps({k: v for k, v in card.items() if k != "curve"}))


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Model directory.")],
    name: Annotated[
        str, typer.Option("--recipe", help=f"One of {', '.join(RECIPES)}.")
    ] = "demo",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory of a model whose tokenizer is taken over."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 1800,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.")] = 20,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
) -> None:
    """Train a model, or go on training it from its last checkpoint."""
    if name not in RECIPES:
        raise typer.BadParameter(
            f"--recipe is one of {', '.join(RECIPES)}, but it is {name}"
        )
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        for file in [*tokenizer.glob("tokenizer*"), *tokenizer.glob("chat_template*")]:
            shutil.copy(file, output / file.name)
    recipe = RECIPES[name]
    data = Data(output, recipe)
    print(f"{len(data.train)} training and {len(data.held_out)} held-out tokens")
    trainer = Trainer(recipe, data, steps)
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load_checkpoint(checkpoint)
        print(f"resumed at step {trainer.step}")
    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    started = time.monotonic()
    while trainer.step < steps and not interrupted:
        losses = trainer.train_step()
        if trainer.step % log_every == 0:
            trainer.curve.append({"step": trainer.step, **losses})
            rounded = {name: round(value, 3) for name, value in losses.items()}
            took = time.monotonic() - started
            print(f"{trainer.step}/{steps} {rounded} {took:.0f}s", flush=True)
        if trainer.step % save_every == 0:
            trainer.save_checkpoint(checkpoint)
    trainer.save_checkpoint(checkpoint)
    if interrupted:
        print(f"stopped at step {trainer.step}; the same command goes on from there")
        return
    export(trainer, output, WHAT[name], time.monotonic() - started)


if __name__ == "__main__":
    typer.run(main)
