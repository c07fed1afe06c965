"""Tiny random models, and the trained one of the repository."""

from pathlib import Path
from typing import Any

from helpers.environment import REPOSITORY

DEMO_MODEL = REPOSITORY / "benchmarks" / "demo_model"
NUM_LAYERS = 4
VOCAB_SIZE = 128

# Wide enough that a random model's next token is not a near-tie in float32, where the
# order of summation differs between one row and several.
INITIALIZER_RANGE = 0.2

TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def build_tiny_model(family: str, directory: Path, **overrides: Any) -> Path:
    """Saves a random model of `family` and a one-token-per-letter tokenizer.

    None leaves a key of `TINY` out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    extra = {"sliding_window": 48} if family == "mistral" else {}
    keys = {**TINY, **extra, **overrides}
    keys = {key: value for key, value in keys.items() if value is not None}
    config = AutoConfig.for_model(family, **keys)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones otherwise, which would hide a lost norm
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    path = directory / family
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def build_tokenizer() -> Any:
    """Token i is the character i, so any text of ASCII is a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(i): i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=chr(1)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=chr(0),
        bos_token=chr(0),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
