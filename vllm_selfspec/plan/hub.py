"""Models by their names on the Hugging Face Hub: whole, or only what describes them.

One rule: what is in the local cache is read there, also without a network.
"""

from pathlib import Path

from vllm_selfspec.plan.cost import (
    CheckpointError,
    ModelWeights,
    TensorHeader,
    read_headers,
    weight_files,
)
from vllm_selfspec.plan.target_model import IN_HUB_CACHE, weights_fingerprint

DESCRIPTION = ["*.json"]
WHOLE = [*DESCRIPTION, "*.safetensors"]


def locate(
    model: str, files: list[str] | None = None, revision: str | None = None
) -> Path:
    """Directory of a model: itself if it is one, else that of its Hub snapshot.

    Args:
        model: A local directory, or the name of a repository on the Hugging Face Hub,
            which is downloaded unless it is in the local cache.
        files: Patterns of the files that are wanted of a repository; the weights and
            what describes them if none are given.
        revision: Of a repository; the newest of its main branch if none is given.

    Raises:
        CheckpointError: If it is neither, or the Hub cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        wanted = files or WHOLE
        found = snapshot_download(model, revision=revision, allow_patterns=wanted)
        return Path(found)
    except (ImportError, OSError) as error:  # the latter: offline, or no such model
        raise _not_found(model, error) from error
    except ValueError as error:
        raise _not_found(model, "it cannot be a name there") from error


def identity_of(model: str, path: Path) -> str | None:
    """What tells the weights of `model` from others, of which `path` holds the
    config.json: a fingerprint of local ones; of those on the Hub, which may not be here
    yet, their commit. None where nothing does: only safetensors have a fingerprint.
    """
    # A snapshot's directory is named for its commit. Offline vLLM takes it for a name.
    if not Path(model).is_dir() or IN_HUB_CACHE.search(f"{path}/"):
        return path.name[:16]
    has_weights = any(path.glob("*.safetensors"))
    return weights_fingerprint(path) if has_weights else None


def read_weights(model: str, path: Path) -> ModelWeights:
    """What a decode step of `model` reads, of which `path` holds the config.json.

    Of weights that lie only on the Hub no more than the headers are downloaded.

    Raises:
        CheckpointError: If there are none, a tensor's part is not known, or the Hub
            cannot be reached.
    """
    try:
        files = weight_files(path)
    except CheckpointError:
        if Path(model).is_dir():
            raise
        return ModelWeights.from_headers(_headers_on_hub(model, path), path)
    return ModelWeights.from_headers(read_headers(files), path)


def _headers_on_hub(model: str, path: Path) -> dict[str, TensorHeader]:
    """By requests for the first bytes of each file of weights, of one revision."""
    import httpx
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        # A snapshot's directory is named for its commit.
        found = get_safetensors_metadata(model, revision=path.name)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(
            f"a model's weights must be safetensors files, but {model!r} has none: "
            "convert them"
        ) from error
    except (OSError, httpx.HTTPError, SafetensorsParsingError) as error:
        raise _not_found(model, error) from error
    return {
        name: TensorHeader.of(vars(tensor))
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def _not_found(model: str, reason: str | Exception) -> CheckpointError:
    told = str(reason).partition("\n")[0] or type(reason).__name__
    return CheckpointError(
        "a model is a local directory or a name on the Hugging Face Hub, but "
        f"{model!r} is no directory and cannot be had from the Hub ({told}): check "
        "the name, or download it where there is a network"
    )
