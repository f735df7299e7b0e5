"""Faster CPU implementations of dropout, attention and GELU.

- Dropout: PyTorch draws one random number per element; here each element takes 16 random bits, four
  elements per number of PyTorch's generator. The dropout probability is exact to 1/65536; which
  elements are dropped differs from PyTorch's choice for the same seed.
- Attention in training, with dropout or in bf16: matrix products per review, whose attention weights
  then stay in the CPU's cache. PyTorch's fused CPU kernel does not support dropout, and its bf16
  backward is twice as slow. Evaluation uses PyTorch's kernel.
- GELU's tanh approximation in bf16: replaced by exact GELU, which is within 0.0005 of it and takes a
  quarter of the time. bf16 rounds by up to 16 times as much; the total error grows by 1%.

They apply to any model that runs in the context `fast_cpu_ops`. Together they halve the training step
of a small encoder and save a tenth of GPT-2's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # supported here
FAST_DTYPE = torch.bfloat16  # the dtype in which attention without dropout is faster here
MAX_TOKENS = 512  # sequence length up to which bf16 attention is faster here than PyTorch's fused kernel
# oneDNN compiles and keeps a kernel for each shape of a matrix, which takes time and memory: few shapes are used.
ROW_MULTIPLE = 64  # of tokens in a linear layer
KEY_MULTIPLE = 32  # of keys in the attention of a review, and of queries in causal attention


def num_filler(size: int, multiple: int, limit: int) -> int:
    """Return how many unused rows or keys, at most `limit`, complete `size` to a multiple."""
    return min(-size % multiple, limit)


def random_bits(shape: Sequence[int]) -> torch.Tensor:
    """Draw 16 random bits per element from PyTorch's CPU generator, as an int16 tensor."""
    count = torch.Size(shape).numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # the full range of 64 bits
    return numbers.view(torch.int16)[:count].view(shape)


def keep_mask(bits: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask that is 0 with probability `p`, to drop an element, and otherwise 1."""
    # Multiplying by a float mask is several times as fast as masking by a bool tensor.
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    return torch.ge(bits, threshold, out=torch.empty(bits.shape, dtype=dtype))


class Dropout(torch.autograd.Function):
    """`torch.nn.functional.dropout` in training mode: (any shape) -> (same shape)."""

    @staticmethod
    def forward(ctx, x, p):
        """Return x with a fraction `p` dropped and the rest scaled by 1 / (1 - p)."""
        bits = random_bits(x.shape)
        ctx.save_for_backward(bits)
        ctx.p = p
        return keep_mask(bits, p, x.dtype).mul_(x).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x."""
        (bits,) = ctx.saved_tensors
        return keep_mask(bits, ctx.p, grad.dtype).mul_(grad).mul_(1 / (1 - ctx.p)), None


class Attention(torch.autograd.Function):
    """Softmax attention, one review at a time, whose weights are dropped with probability `p`.

    query: (batch, heads, tokens, head_dim); key, value: (batch, heads, keys, head_dim); `mask`, None or bool,
    broadcasts to (batch, heads, tokens, keys) and is True where a query may attend to a key. Trailing keys that
    are masked for all queries of a review are skipped, except those that complete a multiple of KEY_MULTIPLE.
    The gradients are those of Dao et al. (2022, FlashAttention, appendix B).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, p, scale):
        """Return the attention output (batch, heads, tokens, head_dim)."""
        output, saved = torch.empty(query.shape, dtype=query.dtype), []
        biases = attention_bias_and_length(mask, key)
        # Keep scores in float32 until the softmax: bf16 would cancel small differences between large scores.
        score_dtype = torch.promote_types(query.dtype, torch.float32)
        for review in range(len(query)):
            bias, length = biases[review if len(biases) > 1 else 0]
            scores = query[review].to(score_dtype) * scale @ key[review, :, :length].to(score_dtype).mT
            if bias is not None:
                scores += bias
            weights = dropped = torch.softmax(scores, dim=-1, out=scores).to(query.dtype)
            if p:
                bits = random_bits(weights.shape)
                dropped = keep_mask(bits, p, weights.dtype).mul_(weights)
            torch.bmm(dropped, value[review, :, :length], out=output[review])
            if any(ctx.needs_input_grad):
                saved += [weights, bits] if p else [weights]
        if p:
            output.mul_(1 / (1 - p))
        ctx.save_for_backward(query, key, value, output, *saved)
        ctx.p, ctx.scale = p, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradients of query, key and value."""
        query, key, value, output, *saved = ctx.saved_tensors
        grads = d_query, d_key, d_value = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        # The softmax's gradient needs the mean of the weights' gradients, weighted by the weights; it equals this sum.
        delta = (grad.to(torch.promote_types(grad.dtype, torch.float32)) * output).sum(dim=-1, keepdim=True)
        if ctx.p:
            grad = grad * (1 / (1 - ctx.p))
        saved_per_review = len(saved) // len(query)
        for review in range(len(query)):
            weights, *bits = saved[saved_per_review * review : saved_per_review * (review + 1)]
            length = weights.shape[-1]
            d_weights = grad[review] @ value[review, :, :length].mT
            dropped = weights
            if ctx.p:
                keep = keep_mask(*bits, ctx.p, weights.dtype)
                d_weights.mul_(keep)
                dropped = keep.mul_(weights)
            d_scores = d_weights.sub_(delta[review]).mul_(weights).mul_(ctx.scale)
            torch.bmm(d_scores, key[review, :, :length], out=d_query[review])
            for gradient, left, right in ((d_key, d_scores, query), (d_value, dropped, grad)):
                gradient[review, :, :length] = left.mT @ right[review]
                gradient[review, :, length:] = 0
        return *grads, None, None, None


class fast_cpu_ops(TorchFunctionMode):  # noqa: N801, a context like torch.no_grad
    """Context in which any model's dropout, attention and GELU on the CPU use the implementations of this module."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the override of a function, or the function itself if the override returns None."""
        kwargs = kwargs or {}
        override = OVERRIDES.get(function)
        result = override(*args, **kwargs) if override and not may_be_recomputed() else None
        return function(*args, **kwargs) if result is None else result


def may_be_recomputed() -> bool:
    """Return whether activation checkpointing may recompute this call in the backward pass.

    The recomputation runs outside of `fast_cpu_ops` and would drop other elements than the forward pass.
    `torch.utils.checkpoint` runs the forward pass without gradients, or with hooks on saved tensors.
    """
    return (
        torch._C._current_graph_task_id() != -1  # in a backward pass
        or (not torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor | None:
    """Compute `torch.nn.functional.dropout`; return None for arguments that are left to PyTorch."""
    if not training or not 0 < p < 1 or inplace or input.device.type != "cpu" or input.dtype not in DTYPES:
        return None
    return Dropout.apply(input, p)


def attention_bias_and_length(mask: torch.Tensor | None, key: torch.Tensor) -> list[tuple[torch.Tensor | None, int]]:
    """Return (bias, length) for each review, or a single pair if there is no mask.

    The bias, None or 0 and -inf, is added to the scores of the first `length` keys; later keys are masked.
    `length` is a multiple of KEY_MULTIPLE or the number of all keys.
    """
    if mask is None:
        return [(None, key.shape[2])]
    biases = []
    for allowed in mask:
        length = int(allowed.any(dim=(0, 1)).nonzero()[-1]) + 1
        length += num_filler(length, KEY_MULTIPLE, limit=allowed.shape[-1] - length)
        allowed = allowed[..., :length]
        bias = None if allowed.all() else torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        biases.append((bias, length))
    return biases


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """Compute `torch.nn.functional.scaled_dot_product_attention`; return None for arguments left to PyTorch."""
    if not 0 <= dropout_p < 1 or enable_gqa or (is_causal and attn_mask is not None):
        return None
    tensors = [query, key, value]
    if torch.is_autocast_enabled("cpu"):  # autocast does not convert float64
        dtype = torch.get_autocast_dtype("cpu")
        tensors = [x if x.dtype == torch.float64 or x.device.type != "cpu" else x.to(dtype) for x in tensors]
    if not are_supported(*tensors):
        return None
    num_tokens, num_keys = query.shape[2], key.shape[2]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not dropout_p and not (trains and tensors[0].dtype == FAST_DTYPE and 1 < num_tokens == num_keys <= MAX_TOKENS):
        return None
    if is_causal:
        # Filler comes last, so no token attends to filler keys; the outputs of filler queries are cut off below.
        if num_tokens == num_keys and (filler := -num_tokens % KEY_MULTIPLE):
            tensors = [F.pad(x, (0, 0, 0, filler)) for x in tensors]
        attn_mask = torch.ones(1, 1, tensors[0].shape[2], tensors[1].shape[2], dtype=torch.bool).tril()
    elif attn_mask is not None and not is_supported_mask(attn_mask, query, num_keys):
        return None
    with torch.autocast("cpu", enabled=False):  # it would round the scores
        scale = query.shape[3] ** -0.5 if scale is None else scale
        output = Attention.apply(*tensors, attn_mask, dropout_p, scale)
    return output if output.shape[2] == num_tokens else output[:, :, :num_tokens]


def are_supported(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether query, key and value are non-empty CPU tensors of one dtype and of fitting shapes."""
    return (
        all(x.device.type == "cpu" and x.dim() == 4 and x.dtype == query.dtype for x in (query, key, value))
        and query.dtype in DTYPES
        and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        and query.numel() > 0
        and key.numel() > 0
    )


def is_supported_mask(mask: torch.Tensor, query: torch.Tensor, num_keys: int) -> bool:
    """Return whether a bool mask covers every key and lets each query attend to at least one."""
    return (
        mask.dim() == 4
        and mask.dtype == torch.bool
        and mask.device.type == "cpu"
        and mask.shape[3] == num_keys
        and all(size in (1, wanted) for size, wanted in zip(mask.shape[:3], query.shape[:3], strict=True))
        and bool(mask.any(dim=-1).all())
    )


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor | None:
    """Compute `torch.nn.functional.gelu`; return None for arguments that are left to PyTorch."""
    if approximate != "tanh" or input.dtype != torch.bfloat16 or input.device.type != "cpu":
        return None
    return F.gelu(input)


OVERRIDES = {F.dropout: dropout, F.scaled_dot_product_attention: attention, F.gelu: gelu}
