"""Dropout that a CPU computes as fast as the rest of a training step.

PyTorch decides the fate of each element on the CPU one number after another, and without a fused
kernel for attention with dropout it keeps several copies of all attention weights: together half of
the training step of a small encoder. In the context `quick_dropout` 16 random bits decide for an
element, four elements from one number of PyTorch's own generator, and attention goes review by
review. The chance of being dropped is right to 1/65536, and which elements are dropped differs from
what PyTorch would have drawn.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def draw(shape):
    """16 random bits for each element, as an int16 tensor on the CPU, from PyTorch's generator."""
    count = torch.Size(shape).numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-2**63, None)  # the full range of 64 bits
    return numbers.view(torch.int16)[:count].view(shape)


def kept(drawn, p, dtype):
    """1 where an element is kept and 0 where it is dropped, the latter with probability `p`."""
    # Written as numbers: multiplying by them is several times as fast as choosing by a bool tensor.
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    return torch.ge(drawn, threshold, out=torch.empty(drawn.shape, dtype=dtype))


class Dropout(torch.autograd.Function):
    """`torch.nn.functional.dropout` in training mode: (any shape) -> (same shape)."""

    @staticmethod
    def forward(ctx, x, p):
        drawn = draw(x.shape)
        ctx.save_for_backward(drawn)
        ctx.p = p
        return kept(drawn, p, x.dtype).mul_(x).mul_(1 / (1 - p))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        drawn, = ctx.saved_tensors
        return kept(drawn, ctx.p, grad.dtype).mul_(grad).mul_(1 / (1 - ctx.p)), None


class AttentionWithDropout(torch.autograd.Function):
    """Softmax attention whose weights are dropped with probability `p`, one review at a time.

    query, key, value (batch, heads, tokens, width); `mask` broadcasts to (batch, heads, tokens, tokens),
    True where a token may be looked at, or is None. Keys behind the last one that a review may look at
    are left out. The gradients are those of Dao et al. (2022, FlashAttention, appendix B).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, p, scale):
        outputs, saved = [], []
        for review in range(len(query)):
            seen = None if mask is None else mask[review if len(mask) > 1 else 0]
            length = key.shape[2] if seen is None else int(seen.any(dim=(0, 1)).nonzero()[-1]) + 1
            scores = query[review] * scale @ key[review, :, :length].mT
            if seen is not None and not (seen := seen[..., :length]).all():
                scores.masked_fill_(~seen, -torch.inf)
            weights = scores.softmax(dim=-1)
            drawn = draw(weights.shape)
            outputs.append(kept(drawn, p, weights.dtype).mul_(weights) @ value[review, :, :length])
            saved += [weights, drawn]
        output = torch.stack(outputs).mul_(1 / (1 - p))
        ctx.save_for_backward(query, key, value, output, *saved)
        ctx.p, ctx.scale = p, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, output, *saved = ctx.saved_tensors
        grads = d_query, d_key, d_value = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        # Of the softmax's gradient: the weighted mean of the weights' gradients, which is the same as this.
        means = (grad * output).sum(dim=-1, keepdim=True)
        grad = grad * (1 / (1 - ctx.p))
        for review, (weights, drawn) in enumerate(zip(saved[::2], saved[1::2], strict=True)):
            length = weights.shape[-1]
            keep = kept(drawn, ctx.p, weights.dtype)
            d_weights = (grad[review] @ value[review, :, :length].mT).mul_(keep)
            d_scores = d_weights.sub_(means[review]).mul_(weights).mul_(ctx.scale)
            d_query[review] = d_scores @ key[review, :, :length]
            d_key[review, :, :length] = d_scores.mT @ query[review]
            d_value[review, :, :length] = keep.mul_(weights).mT @ grad[review]
        return *grads, None, None, None


class quick_dropout(TorchFunctionMode):  # noqa: N801, a context like torch.no_grad
    """Within this context the dropout of any model on the CPU is computed as above."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        replace = REPLACED.get(function)
        result = replace(*args, **kwargs) if replace else None
        return function(*args, **kwargs) if result is None else result


def dropout(input, p=0.5, training=True, inplace=False):
    """As `torch.nn.functional.dropout`; None where PyTorch's own should do it."""
    if not training or not 0 < p < 1 or inplace or input.device.type != "cpu":
        return None
    return Dropout.apply(input, p)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """As `torch.nn.functional.scaled_dot_product_attention`; None where PyTorch's own should do it."""
    if not 0 < dropout_p < 1 or is_causal or enable_gqa or query.dim() != 4 or query.device.type != "cpu":
        return None
    if attn_mask is not None and (attn_mask.dim() != 4 or attn_mask.dtype != torch.bool
                                  or not attn_mask.any(dim=-1).all()):
        return None
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    return AttentionWithDropout.apply(query, key, value, attn_mask, dropout_p, scale or query.shape[-1] ** -0.5)


REPLACED = {F.dropout: dropout, F.scaled_dot_product_attention: attention}
