"""Text from images and audio is drafted for, losslessly, after a prompt of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engines import Engines, greedy, run, token_ids
from helpers.environment import IS_SHORT, IS_V2
from helpers.models import NUM_LAYERS, TINY, build_tokenizer
from vllm_selfspec.plan.cost import ModelWeights, read_headers, weight_files
from vllm_selfspec.plan.families import FAMILIES
from vllm_selfspec.plan.target_model import TargetModel

# As deep as the text model, so that the draft view must tell them apart.
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
IMAGE_SIZE, PATCH_SIZE = 28, 14
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
TEXTS = ("what is this", "and what is that over there", "say it in a word")
SAMPLING_RATE = 16000
NUM_DRAFTS = 3


def save(model: Any, processor: Any, directory: Path, old: str, new: str) -> None:
    """As published checkpoints are, in which the tensors of `old` are in `new`."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {k.replace(old, new): tensor for k, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def build_paligemma(directory: Path) -> None:
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = build_tokenizer()
    images = SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    images.image_seq_length = NUM_PATCHES
    processor = PaliGemmaProcessor(images, tokenizer)  # it adds tokens
    text = {
        **TINY,
        "model_type": "gemma2",
        "vocab_size": len(tokenizer),
        "sliding_window": 48,
        "tie_word_embeddings": True,
        # The embeddings, which Gemma makes large, would drown the layers otherwise.
        "initializer_range": 0.05,
    }
    vision = {
        **TOWER,
        "model_type": "siglip_vision_model",
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "num_image_tokens": NUM_PATCHES,
        "projection_dim": TINY["hidden_size"],
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=processor.image_token_id,
        projection_dim=TINY["hidden_size"],
    )
    model = PaliGemmaForConditionalGeneration(config)
    towers = ("vision_tower.", "vision_tower.vision_model.")
    save(model, processor, directory, *towers)


def build_qwen2_audio(directory: Path) -> None:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = build_tokenizer()
    marks = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    features = WhisperFeatureExtractor(feature_size=16)
    text = {**TINY, "model_type": "qwen2", "vocab_size": len(tokenizer)}
    audio = {
        "num_mel_bins": features.feature_size,
        "encoder_layers": NUM_LAYERS,
        "encoder_attention_heads": TOWER["num_attention_heads"],
        "encoder_ffn_dim": TOWER["intermediate_size"],
        "d_model": TOWER["hidden_size"],
        "max_source_positions": features.nb_max_frames // 2,
        "initializer_range": TOWER["initializer_range"],
    }
    config = Qwen2AudioConfig(
        text_config=text,
        audio_config=audio,
        audio_token_index=tokenizer.convert_tokens_to_ids(marks[0]),
    )
    model = Qwen2AudioForConditionalGeneration(config)
    processor = Qwen2AudioProcessor(features, tokenizer)
    save(model, processor, directory, "model.model.", "model.")


def images() -> list[dict[str, Any]]:
    """A prompt with a random image for each text."""
    from PIL import Image

    rng = np.random.default_rng(0)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    pixels = [rng.integers(256, size=shape, dtype=np.uint8) for _ in TEXTS]
    return [
        {"prompt": text, "multi_modal_data": {"image": Image.fromarray(array)}}
        for text, array in zip(TEXTS, pixels, strict=True)
    ]


def clips() -> list[dict[str, Any]]:
    """A prompt with noise of another length for each text."""
    rng = np.random.default_rng(0)
    mark = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    return [
        {
            "prompt": mark + text,
            "multi_modal_data": {"audio": [(rng.normal(size=size), SAMPLING_RATE)]},
        }
        for text, size in zip(TEXTS, (4000, 9000, 15000), strict=True)
    ]


MODELS: dict[str, tuple[Callable[[Path], None], Callable[[], list[dict[str, Any]]]]] = {
    "PaliGemmaForConditionalGeneration, images": (build_paligemma, images),
    "Qwen2AudioForConditionalGeneration, audio": (build_qwen2_audio, clips),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model of each family."""
    found = {}
    for name, (build, _) in MODELS.items():
        directory = tmp_path_factory.mktemp("multimodal")
        torch.manual_seed(0)
        build(directory)
        found[name] = str(directory)
    return found


@pytest.fixture(autouse=True)
def no_pixtral(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's PaliGemma asks whether its tower is Pixtral's, whose module wants
    torchvision, which has no build for CPUs."""
    from vllm.model_executor.models import paligemma
    from vllm.model_executor.models.siglip import SiglipEncoderInfo

    monkeypatch.setattr(paligemma, "get_vision_encoder_info", SiglipEncoderInfo)


@pytest.mark.v2
@pytest.mark.skipif(IS_V2 and IS_SHORT, reason="long there: make test-all")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.shows("Models", n)) for n in MODELS]
)
def test_a_multimodal_family_drafts_losslessly(
    name: str, paths: dict[str, str], engines: Engines
) -> None:
    """With images or audio in a prompt and without, in one batch; after them drafts
    start from tokens of text, on the KV of both."""
    with_data = MODELS[name][1]()
    prompts = [*with_data, *({"prompt": text} for text in TEXTS)]
    expected, _ = run(engines.get(paths[name]), prompts, greedy(24))
    texts = token_ids(expected)
    assert len({str(text) for text in texts}) == len(prompts), "the data is seen"
    for skip_layers in ({}, {"attention": [1, 3], "mlp": [2]}):
        spec = {"skip_layers": skip_layers, "num_speculative_tokens": NUM_DRAFTS}
        llm = engines.get(paths[name], spec)
        for part in (slice(None), slice(len(TEXTS)), slice(len(TEXTS), None)):
            found, counts = run(llm, prompts[part], greedy(24))
            assert token_ids(found) == texts[part]
            assert counts.draft_tokens
            assert (counts.acceptance == 1) is (not skip_layers)


@pytest.mark.parametrize("name", MODELS)
def test_a_multimodal_model_is_known_by_its_text_model(
    name: str, paths: dict[str, str]
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_selfspec.engine.vllm_args import target_of

    target = TargetModel.read(Path(paths[name]), paths[name])
    assert target.class_name == name.partition(",")[0]
    assert target.class_name in FAMILIES
    assert target.num_layers == NUM_LAYERS
    assert target.architecture["hidden_size"] == TINY["hidden_size"]
    assert target_of(EngineArgs(paths[name]).create_model_config()) == target
    weights = ModelWeights.from_checkpoint(Path(paths[name]))
    assert weights.num_layers == NUM_LAYERS
    text_model = sum(
        header.num_bytes
        for tensor, header in read_headers(weight_files(Path(paths[name]))).items()
        if tensor.startswith("language_model.")
    )
    embedding = TINY["hidden_size"] * 4 * target.architecture["vocab_size"]
    assert weights.streamed in (text_model, text_model - embedding)
