"""Linear layers over the non-padding tokens of a batch only.

A training batch of eight reviews holds about 84% non-padding tokens, and linear layers are most of
an encoder's arithmetic. The result is exact for models whose attention masks the padding and whose
pooling uses no padding position: what a layer returns there is never used.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from finetuning.performance import cpu_kernels


class GatherRows(torch.autograd.Function):
    """Select unique rows of x (rows, width); the gradient of the others is zero."""

    @staticmethod
    def forward(ctx, x, index):
        """Return x[index]: (len(index), width)."""
        ctx.save_for_backward(index)
        ctx.num_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x."""
        (index,) = ctx.saved_tensors
        # The indices are unique, so that copying replaces the slow accumulation of index_select's own backward.
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, index, grad), None


class ScatterRows(torch.autograd.Function):
    """Place the rows of x at unique indices of a zero matrix; the inverse of GatherRows."""

    @staticmethod
    def forward(ctx, x, index, num_rows):
        """Return (num_rows, width) with x at `index`."""
        ctx.save_for_backward(index)
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x."""
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class unpadded_linear(TorchFunctionMode):  # noqa: N801, a context like torch.no_grad
    """Context in which linear layers skip the padding of inputs (batch, tokens, width) of `attention_mask`'s shape.

    `attention_mask` (batch, tokens) is 1 at non-padding tokens. Some padding is computed to reach a multiple of
    `cpu_kernels.ROW_MULTIPLE` rows.
    """

    def __init__(self, attention_mask: torch.Tensor):
        super().__init__()
        self.shape = attention_mask.shape
        mask = attention_mask.flatten()
        count = int(mask.sum())
        count += cpu_kernels.num_filler(count, cpu_kernels.ROW_MULTIPLE, limit=len(mask) - count)
        self.index = mask.argsort(descending=True, stable=True)[:count]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Replace F.linear."""
        kwargs = kwargs or {}
        if function is not F.linear or args[0].dim() != 3 or args[0].shape[:2] != self.shape:
            return function(*args, **kwargs)
        x, *parameters = args
        rows = function(GatherRows.apply(x.flatten(0, 1), self.index), *parameters, **kwargs)
        return ScatterRows.apply(rows, self.index, self.shape.numel()).unflatten(0, self.shape)
