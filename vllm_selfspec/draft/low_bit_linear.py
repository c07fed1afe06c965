"""`low_bit_copy`: a linear layer or LM head of vLLM's with its weight in 8 or 4 bits.

One rule: kernels are vLLM's, chosen as vLLM chooses them for a checkpoint of
compressed-tensors, but those for few rows first. Weights are rounded to the nearest; of
a group of four-bit weights the largest are clipped where that makes the error smaller.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from torch import nn
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.workspace import (
    current_workspace_manager,
    is_workspace_manager_initialized,
)

from vllm_selfspec.plan.axis_draft_weights import GROUP_SIZE, INT8

# Of the scale with which the largest weight of a group is just not clipped.
CLIPPINGS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
MAX_INT8, MAX_INT4 = 127, 7
ZERO = 8  # what a four-bit weight of 0 is stored as
GROUP_SIZES = (GROUP_SIZE, 64, 32)
CHUNK = 1 << 18  # weights that are rounded at once: as many as a core's cache holds
# As AWQ orders the columns that share an int32.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
EIGHTS = -0x77777778  # eight four-bit zero points of 8


# vLLM's names: of layers whose weights have fewer bits than activations; of kernels.
MIXED, FEW_ROWS = "mixed_precision", "marlin"


class NoKernelError(ValueError):
    """No kernel of vLLM's takes a weight of this shape."""


class LowBitMethod(ABC):
    """Stands for a layer's `quant_method`.

    Attributes:
        dtype: Of what the kernel computes with.
        num_bytes: Of what `pack` made.
        may_compile: Whether compiled code does the same as eager code.
    """

    num_bytes: int

    def __init__(self, dtype: torch.dtype) -> None:
        # The kernels take activations of half the bits of a float32.
        self.dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        # Of queries and keys that were cast after a kernel, compiled code accepts
        # hardly a token (vLLM 0.32, torch 2.13): vLLM turns them in place, and what a
        # cast makes need not be in one.
        self.may_compile = dtype == self.dtype

    @abstractmethod
    def pack(self, layer: Any, weight: torch.Tensor) -> None:
        """Gives a layer without a weight, but with its bias, the parameters that the
        kernel reads, of `weight` `[output_size, input_size]`."""

    @property
    @abstractmethod
    def kernel(self) -> str:
        """vLLM's name of the kernel that computes."""

    @abstractmethod
    def run(self, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        """Calls the kernel."""

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        """What vLLM's layers call. Where there is a bias it is the layer's own."""
        if bias is not None:
            bias = layer.bias
        return self.run(layer, x.to(self.dtype), bias).to(x.dtype)


class OfScheme(LowBitMethod):
    """By a scheme of compressed-tensors', which chooses a kernel for the platform."""

    def __init__(self, dtype: torch.dtype, scheme: Any) -> None:
        super().__init__(dtype)
        self.scheme = scheme

    def pack(self, layer: Any, weight: torch.Tensor) -> None:
        output_size, input_size = weight.shape
        with set_default_torch_dtype(self.dtype), weight.device:
            self.scheme.create_weights(
                layer=layer,
                input_size=input_size,
                output_size=output_size,
                input_size_per_partition=input_size,
                output_partition_sizes=[output_size],
                params_dtype=self.dtype,
                weight_loader=None,
            )
            self.fill(layer, weight)
            self.scheme.process_weights_after_loading(layer)

    @property
    def kernel(self) -> str:
        return type(getattr(self.scheme, "kernel", self.scheme)).__name__

    @abstractmethod
    def fill(self, layer: Any, weight: torch.Tensor) -> None:
        """Writes the rounded weight where the scheme expects it."""

    def run(self, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        result: torch.Tensor = self.scheme.apply_weights(layer, x, bias)
        return result


class Int8(OfScheme):
    """With a scale for each output channel; activations are rounded by token."""

    def __init__(self, dtype: torch.dtype) -> None:
        scheme = CompressedTensorsW8A8Int8(
            QuantizationStrategy.CHANNEL,
            is_static_input_scheme=False,
            input_symmetric=True,
        )
        super().__init__(dtype, scheme)

    def fill(self, layer: Any, weight: torch.Tensor) -> None:
        rounded, scales = rounded_to(weight, MAX_INT8, weight.shape[1], CLIPPINGS[:1])
        layer.weight.copy_(rounded)
        layer.weight_scale.copy_(scales)


class Int4(OfScheme):
    """With a scale for each group; activations as they are."""

    def __init__(self, dtype: torch.dtype, group_size: int) -> None:
        scheme = CompressedTensorsWNA16(QuantizationStrategy.GROUP, 4, group_size)
        super().__init__(dtype, scheme)
        self.group_size = group_size
        # Marlin's locks are there, and CUDA graphs know them by address. vLLM lets go
        # of it when another engine starts in the process.
        self._workspace = (
            current_workspace_manager() if is_workspace_manager_initialized() else None
        )

    def fill(self, layer: Any, weight: torch.Tensor) -> None:
        rounded, scales = rounded_to(weight, MAX_INT4, self.group_size)
        packed = pack_quantized_values_into_int32(
            rounded.int() + ZERO, scalar_types.uint4b8, packed_dim=1
        )
        layer.weight_packed.copy_(packed)
        layer.weight_scale.copy_(scales)

    def pack(self, layer: Any, weight: torch.Tensor) -> None:
        with for_few_rows() as is_preferred:
            if is_preferred:
                try:
                    return super().pack(layer, weight)
                except ValueError:  # not of this shape
                    pass
        super().pack(layer, weight)


@contextmanager
def for_few_rows() -> Iterator[bool]:
    """Has vLLM choose the four-bit kernel of CUDA devices that is better for few rows,
    as drafts have them, before the one for many; whether it does. What the user chose
    by `linear_backend` stays.

    On an H200, of a model of 7 B parameters, a verification and four drafts took 18 ms
    by Machete, which vLLM takes there, and 15 ms by Marlin.
    """
    config = get_current_vllm_config_or_none()
    if config is None or not current_platform.is_cuda():
        yield False
        return
    kernels = config.kernel_config
    before = kernels.linear_backend_per_quant
    if kernels.linear_backend != "auto" or MIXED in (before or {}):
        yield False
        return
    kernels.linear_backend_per_quant = {**(before or {}), MIXED: FEW_ROWS}
    try:
        yield True
    finally:
        kernels.linear_backend_per_quant = before


class CPUInt4(LowBitMethod):
    """The same with activations rounded by token, in vLLM's kernel for x86.

    vLLM takes it for checkpoints on CPUs with AMX alone. It runs on AVX-512 VNNI, too,
    some times faster for a row than the kernel that vLLM takes there.
    """

    def __init__(self, dtype: torch.dtype, group_size: int) -> None:
        super().__init__(dtype)
        self.group_size = group_size

    @property
    def kernel(self) -> str:
        return "int4_scaled_mm_cpu"

    @staticmethod
    def is_supported(output_size: int) -> bool:
        """Whether this CPU has it, and it takes so many output channels."""
        return (
            current_platform.is_cpu()
            and hasattr(torch.ops._C, "int4_scaled_mm_cpu")
            and bool(torch.cpu.get_capabilities().get("avx512_vnni"))
            and output_size % 32 == 0
        )

    def pack(self, layer: Any, weight: torch.Tensor) -> None:
        rounded, scales = rounded_to(weight, MAX_INT4, self.group_size)
        output_size, input_size = weight.shape
        num_groups = input_size // self.group_size
        columns = (rounded.t().int() + ZERO).view(input_size, output_size // 8, 8)
        packed = pack_quantized_values_into_int32(
            columns[:, :, AWQ_ORDER].reshape(input_size, output_size),
            scalar_types.uint4,
            packed_dim=1,
        )
        zeros = torch.full((num_groups, output_size // 8), EIGHTS, dtype=torch.int32)
        kept = ops.convert_weight_packed_scale_zp(
            packed.contiguous(), zeros, scales.t().contiguous(), ops.CPUQuantAlgo.AWQ
        )
        for name, tensor in zip(("w_q", "w_zp", "w_s"), kept, strict=True):
            layer.register_parameter(name, _frozen(tensor))
        if layer.bias is not None:
            layer.bias = _frozen(layer.bias.float())

    def run(self, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        result: torch.Tensor = ops.int4_scaled_mm_cpu(
            x, layer.w_q, layer.w_zp, layer.w_s, bias
        )
        return result


def low_bit_copy(layer: Any, word: str) -> Any:
    """A copy of a linear layer or LM head, with a `LowBitMethod`.

    Args:
        layer: vLLM's, loaded and not processed yet.
        word: "int8" or "int4".

    Raises:
        NoKernelError: If there is no kernel for it.
    """
    weight = layer.weight.detach()
    method = _method(weight, word)
    clone = copy.copy(layer)
    clone._parameters, clone.quant_method = {}, method
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias = _frozen(bias.detach().to(method.dtype, copy=True))
    clone.register_parameter("bias", bias)
    try:
        method.pack(clone, weight)
    except ValueError as error:  # vLLM's choosers find none
        raise NoKernelError(f"layers of {_shape(weight)}") from error
    method.num_bytes = _num_bytes(clone)
    return clone


def _method(weight: torch.Tensor, word: str) -> LowBitMethod:
    if word == INT8:
        return Int8(weight.dtype)
    sizes = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
    if not sizes:
        raise NoKernelError(f"layers of {_shape(weight)}")
    if CPUInt4.is_supported(weight.shape[0]):
        return CPUInt4(weight.dtype, sizes[0])
    return Int4(weight.dtype, sizes[0])


def _shape(weight: torch.Tensor) -> str:
    return f"{weight.shape[0]} outputs of {weight.shape[1]} inputs"


def _num_bytes(layer: Any) -> int:
    kept: int = sum(p.numel() * p.element_size() for p in layer.parameters())
    kernel = getattr(getattr(layer.quant_method, "scheme", None), "kernel", None)
    handler = getattr(kernel, "dnnl_handler", None)  # oneDNN keeps int8 to itself
    return kept if handler is None else kept + int(handler.n * handler.k)


def rounded_to(
    weight: torch.Tensor,
    most: int,
    group_size: int,
    clippings: tuple[float, ...] = CLIPPINGS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weights to whole multiples of a scale of their group.

    Args:
        weight: `[output_size, input_size]`.
        most: The largest multiple; the smallest is `-most - 1`, which is used only by
            weights that are clipped.
        group_size: Weights in a row that share a scale.
        clippings: What to try; of each group the one with the least squared error is
            taken, the first of equals.

    Returns:
        The multiples, int8 `[output_size, input_size]`, and the scales, float32
        `[output_size, input_size / group_size]`.
    """
    output_size, input_size = weight.shape
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(output_size, input_size // group_size, device=weight.device)
    num_rows = max(1, CHUNK // input_size)
    for start in range(0, output_size, num_rows):
        rows = slice(start, start + num_rows)
        groups = weight[rows].float().view(-1, group_size)
        scale = _scales(groups, most, clippings)
        multiples = (groups / scale).round_().clamp_(-most - 1, most)
        rounded[rows] = multiples.view(-1, input_size)
        scales[rows] = scale.view(-1, input_size // group_size)
    return rounded, scales


def _scales(
    groups: torch.Tensor, most: int, clippings: tuple[float, ...]
) -> torch.Tensor:
    """The best scale of each row, `[num_groups, 1]`."""
    # A group of zeros has a scale, too, which no division by it minds.
    largest = groups.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12) / most
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for clipping in clippings if len(clippings) > 1 else ():
        scale = largest * clipping
        error = (groups / scale).round_().clamp_(-most - 1, most).mul_(scale)
        error = torch.linalg.vector_norm(error.sub_(groups), dim=1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
