"""What this project computes itself on a CPU because PyTorch's own functions take longer.

Dropout, in any precision: PyTorch decides the fate of each element on the CPU one number after another;
here 16 random bits decide, four elements from one number of PyTorch's own generator. The chance of being
dropped is right to 1/65536, and which elements are dropped differs from what PyTorch would have drawn.

Attention in training, with dropout or in bf16: as matrix products, review by review, so that one review's
attention weights stay in the CPU's cache. On a CPU PyTorch's fused kernel knows no dropout, and in bf16 its
way back takes twice as long. In evaluation it stays.

The tanh approximation of GELU, in bf16: by the function itself, of which it is within 0.0005 and which takes a
quarter of the time. bf16 rounds by up to 16 times that: the error of the result grows by 1%.

Linear layers in evaluation, in bf16: with weights laid out once as the matrix products want them, which changes
no bit of the result and takes a tenth less time.

In the contexts `quick_cpu` and `packed_weights` any model's calls of PyTorch's functions come here. Together this saves
half of the training step of a small encoder and a tenth of GPT-2's.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # of what is computed here
QUICK_DTYPE = torch.bfloat16  # in which attention without dropout gains by being done here
# PyTorch's compiler lays out weights with these operators, which are not public; not every build has them.
CAN_PACK = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
LONGEST = 512  # tokens up to which bf16 attention is quicker here than in PyTorch's fused kernel


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


class Attention(torch.autograd.Function):
    """Softmax attention, one review at a time, whose weights are dropped with probability `p`.

    query, key, value (batch, heads, tokens, width); `mask` broadcasts to (batch, heads, tokens, tokens),
    True where a token may be looked at, or is None. Keys behind the last one that a review may look at
    are left out. The gradients are those of Dao et al. (2022, FlashAttention, appendix B).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, p, scale):
        output, saved = torch.empty(query.shape, dtype=query.dtype), []
        seen = what_is_seen(mask, key)
        # Scores may be large numbers of which small differences count: they stay exact until the softmax.
        exact = torch.promote_types(query.dtype, torch.float32)
        for review in range(len(query)):
            bias, length = seen[review if len(seen) > 1 else 0]
            scores = query[review].to(exact) * scale @ key[review, :, :length].to(exact).mT
            if bias is not None:
                scores += bias
            weights = dropped = torch.softmax(scores, dim=-1, out=scores).to(query.dtype)
            if p:
                drawn = draw(weights.shape)
                dropped = kept(drawn, p, weights.dtype).mul_(weights)
            torch.bmm(dropped, value[review, :, :length], out=output[review])
            if any(ctx.needs_input_grad):
                saved += [weights, drawn] if p else [weights]
        if p:
            output.mul_(1 / (1 - p))
        ctx.save_for_backward(query, key, value, output, *saved)
        ctx.p, ctx.scale = p, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, output, *saved = ctx.saved_tensors
        grads = d_query, d_key, d_value = [torch.empty(tensor.shape, dtype=tensor.dtype)
                                           for tensor in (query, key, value)]
        # Of the softmax's gradient: the weighted mean of the weights' gradients, which is the same as this.
        means = (grad.to(torch.promote_types(grad.dtype, torch.float32)) * output).sum(dim=-1, keepdim=True)
        if ctx.p:
            grad = grad * (1 / (1 - ctx.p))
        each = len(saved) // len(query)
        for review in range(len(query)):
            weights, *drawn = saved[each * review:each * (review + 1)]
            length = weights.shape[-1]
            d_weights = grad[review] @ value[review, :, :length].mT
            dropped = weights
            if ctx.p:
                keep = kept(*drawn, ctx.p, weights.dtype)
                d_weights.mul_(keep)
                dropped = keep.mul_(weights)
            d_scores = d_weights.sub_(means[review]).mul_(weights).mul_(ctx.scale)
            torch.bmm(d_scores, key[review, :, :length], out=d_query[review])
            for gradient, left, right in ((d_key, d_scores, query), (d_value, dropped, grad)):
                gradient[review, :, :length] = left.mT @ right[review]
                gradient[review, :, length:] = 0
        return *grads, None, None, None


class quick_cpu(TorchFunctionMode):  # noqa: N801, a context like torch.no_grad
    """Within this context dropout, attention and GELU of any model on the CPU are computed as above."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        replace = REPLACED.get(function)
        result = replace(*args, **kwargs) if replace and not is_checkpointed() else None
        return function(*args, **kwargs) if result is None else result


def is_checkpointed():
    """Return whether this may be gradient checkpointing, which computes the same again during the backward pass.

    That is outside of `quick_cpu`, where other elements would be dropped than in the forward pass.
    `torch.utils.checkpoint` runs the forward pass without gradients, or with hooks on saved tensors.
    """
    return (torch._C._current_graph_task_id() != -1  # in a backward pass
            or not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None)


class packed_weights(TorchFunctionMode):  # noqa: N801
    """Within this context linear layers in bf16 lay out each weight once as the CPU multiplies it, not at every call.

    For evaluation: no gradients, and weights that stay as they are. Weights that never learn are left alone:
    of the others autocast would keep a rounded copy anyway, so that this takes no more memory.
    """

    def __init__(self):
        super().__init__()
        self.packed = {}  # by the weight's id; the weight goes with it, so that no other one gets that id

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (function is not F.linear or kwargs or torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu")
                or torch.get_autocast_dtype("cpu") != torch.bfloat16 or not CAN_PACK):
            return function(*args, **(kwargs or {}))
        x, weight, bias = args if len(args) == 3 else (*args, None)
        if (not weight.requires_grad or weight.dim() != 2 or x.dim() < 2 or not x.numel()
                or any(tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16)
                       for tensor in (x, weight, bias) if tensor is not None)):
            return function(*args)
        if id(weight) not in self.packed:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), x.shape[:-1].numel())
            self.packed[id(weight)] = weight, packed
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed[id(weight)][1],
                                                  None if bias is None else bias.bfloat16(), "none", [], "")


def dropout(input, p=0.5, training=True, inplace=False):
    """As `torch.nn.functional.dropout`; None where PyTorch's own should do it."""
    if not training or not 0 < p < 1 or inplace or input.device.type != "cpu" or input.dtype not in DTYPES:
        return None
    return Dropout.apply(input, p)


def what_is_seen(mask, key):
    """For each review, or once for all: what to add to the scores, 0 or -inf, or None; and how many keys are seen."""
    if mask is None:
        return [(None, key.shape[2])]
    seen = []
    for allowed in mask:
        length = int(allowed.any(dim=(0, 1)).nonzero()[-1]) + 1
        allowed = allowed[..., :length]
        seen.append((None if allowed.all() else
                     torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf), length))
    return seen


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """As `torch.nn.functional.scaled_dot_product_attention`; None where PyTorch's own should do it."""
    tensors = query, key, value
    if (not 0 <= dropout_p < 1 or enable_gqa or (is_causal and attn_mask is not None)
            or any(tensor.device.type != "cpu" or tensor.dim() != 4 for tensor in tensors)):
        return None
    if torch.is_autocast_enabled("cpu"):  # which leaves float64 as it is
        query, key, value = tensors = [tensor if tensor.dtype == torch.float64 else
                                       tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
    batch, heads, tokens, width = query.shape
    keys = key.shape[2]
    if (key.shape != (batch, heads, keys, width) or value.shape != key.shape or not query.numel() or not keys
            or query.dtype not in DTYPES or any(tensor.dtype != query.dtype for tensor in tensors)):
        return None
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not dropout_p and not (learning and query.dtype == QUICK_DTYPE and 1 < tokens == keys <= LONGEST):
        return None
    if is_causal:
        attn_mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool).tril()
    elif attn_mask is not None and not is_known_mask(attn_mask, query, keys):
        return None
    with torch.autocast("cpu", enabled=False):  # it would round the scores
        return Attention.apply(query, key, value, attn_mask, dropout_p, width ** -0.5 if scale is None else scale)


def is_known_mask(mask, query, keys):
    """Return whether a mask tells for every key whether it may be looked at, and lets each query see one."""
    return (mask.dim() == 4 and mask.dtype == torch.bool and mask.device.type == "cpu" and mask.shape[3] == keys
            and all(size in (1, wanted) for size, wanted in zip(mask.shape[:3], query.shape[:3], strict=True))
            and bool(mask.any(dim=-1).all()))


def gelu(input, approximate="none"):
    """As `torch.nn.functional.gelu`; None where PyTorch's own should do it."""
    if approximate != "tanh" or input.dtype != torch.bfloat16 or input.device.type != "cpu":
        return None
    return F.gelu(input)


REPLACED = {F.dropout: dropout, F.scaled_dot_product_attention: attention, F.gelu: gelu}
