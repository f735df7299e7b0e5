"""FLOPs of training steps and evaluations, and the matrix multiplication throughput of a device."""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetuning.data.batching import Batch
from finetuning.performance.device import synchronize

FIT_LENGTH = 8  # tokens; FLOPs are counted at 1, 2 and 4 times this length


class FlopModel(NamedTuple):
    """FLOPs of the matrix products of a batch, which are quadratic in the length of each review."""

    per_batch: int  # such as DeBERTa's projections of the relative positions
    per_position: int  # of the longest review, such as rotary embeddings that all reviews share
    per_review: int
    per_token: int
    per_token_squared: int

    def __call__(self, lengths: Iterable[int]) -> int:
        """Return the FLOPs of one batch of reviews of these lengths, without padding."""
        counts = [int(length) for length in lengths]
        shared = self.per_batch + self.per_position * max(counts)
        return shared + sum(self.per_review + self.per_token * n + self.per_token_squared * n**2 for n in counts)


class Flops(NamedTuple):
    """The FLOPs of a model's forward pass, and of its forward and backward pass."""

    evaluation: FlopModel
    training: FlopModel


def count_flops(model: nn.Module, pooling: Callable[[nn.Module, Batch], torch.Tensor], longest: int) -> Flops:
    """Count the FLOPs of batches of reviews of up to `longest` tokens.

    Frozen layers have no weight gradient. Attention counts in full, whether causal or not. The model
    is not changed, and no memory is taken.
    """
    meta_model = copy_to_meta(model)
    return Flops(
        evaluation=fit_flops(partial(count_batch, meta_model, pooling, train=False), longest),
        training=fit_flops(partial(count_batch, meta_model, pooling, train=True), longest),
    )


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, its attention made of plain matrix products."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    meta_model: Any = copy.deepcopy(model, tensors)
    if hasattr(meta_model, "set_attn_implementation"):
        meta_model.set_attn_implementation("eager")
        meta_model.config.pad_token_id = (
            None  # else Transformers would search the ids for padding, and meta tensors have no values
        )
    return meta_model


def count_batch(meta_model: nn.Module, pooling: Callable, batch_size: int, length: int, train: bool) -> int:
    """Count the FLOPs of a batch of reviews of one length."""
    with torch.device("meta"):
        lengths = torch.full((batch_size,), length)
        batch = Batch(torch.zeros(batch_size, length, dtype=torch.long), None, lengths, labels=lengths)
    # The counter does not know the fused attention of every device; this backend is made of matrix products.
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train), sdpa_kernel(SDPBackend.MATH):
        logits = pooling(meta_model, batch)
        if train:
            logits.sum().backward()
    return counter.get_total_flops()


def fit_flops(count: Callable[[int, int], int], longest: int) -> FlopModel:
    """Return the exact FlopModel through `count(batch_size, length)` at five points, checked at a sixth."""
    n = FIT_LENGTH
    once, twice, four_times = (count(1, k * n) for k in (1, 2, 4))
    per_token_squared = (four_times - 3 * twice + 2 * once) // (6 * n**2)
    linear = (twice - once - 3 * per_token_squared * n**2) // n
    shared, shared_of_twice = 2 * once - count(2, n), 2 * twice - count(2, 2 * n)
    per_position = (shared_of_twice - shared) // n
    per_batch = shared - per_position * n
    per_review = once - per_batch - linear * n - per_token_squared * n**2
    model = FlopModel(per_batch, per_position, per_review, linear - per_position, per_token_squared)
    if model([longest] * 2) != count(2, longest):
        raise ValueError(f"the FLOPs are not quadratic in the length: {model} does not fit at {longest} tokens")
    return model


def linear_shapes(model: nn.Module, head: nn.Module) -> Counter:
    """Return the shapes (out, in) of a model's linear layers and how often each occurs; without the output layer."""
    head_layers = set(head.modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in head_layers]
    return Counter(tuple(module.weight.shape) for module in linear)


def matmul_throughput(
    shapes: Counter, num_tokens: int, precision: str, device: torch.device, repeats: int = 5
) -> float:
    """Return the FLOP/s of F.linear on inputs (num_tokens, in), over layers of these shapes (out, in)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    seconds = flops = 0
    for (width_out, width_in), count in shapes.items():
        x, weight = (torch.randn(rows, width_in, device=device, dtype=dtype) for rows in (num_tokens, width_out))
        F.linear(x, weight)
        seconds += count * statistics.median(time_linear(x, weight) for _ in range(repeats))
        flops += count * 2 * num_tokens * width_in * width_out
    return flops / seconds


def time_linear(x: torch.Tensor, weight: torch.Tensor, calls: int = 10) -> float:
    """Return the seconds of one call, as the mean of several, which hides the launch of a GPU's kernels."""
    synchronize(x.device)
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(calls):
            F.linear(x, weight)
    synchronize(x.device)
    return (time.perf_counter() - started) / calls
