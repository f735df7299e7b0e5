"""The GPT model of the book's earlier chapters, under the book's names.

The architecture is GPT-2 (Radford et al., 2019). Attention runs through PyTorch's
`scaled_dot_product_attention`; otherwise this computes what the book's code computes, from the
same weights: parameters are created in the book's order, and the book's state dicts load.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import torch
import torch.nn.functional as F
from torch import nn


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al., 2017) over `num_heads` heads of size d_out / num_heads."""

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out ({d_out}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        # The book keeps its causal mask as a buffer; here the mask is a flag of the attention call.
        self.register_load_state_dict_pre_hook(
            lambda module, state_dict, prefix, *_: state_dict.pop(prefix + "mask", None)
        )

    def forward(self, x):
        """Map (batch, tokens, d_in) to (batch, tokens, d_out)."""
        queries, keys, values = (self.split_heads(linear(x)) for linear in (self.W_query, self.W_key, self.W_value))
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        """Map (batch, tokens, d_out) to (batch, num_heads, tokens, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al., 2016) with the book's names for gain and bias."""

    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    """The tanh approximation of GELU (Hendrycks & Gimpel, 2016), with which GPT-2 was trained."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them; the hidden width is 4 * emb_dim."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            GELU(),
            nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention and feed-forward, each with a residual connection."""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_resid = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        """Map (batch, tokens, emb_dim) to (batch, tokens, emb_dim)."""
        x = x + self.drop_resid(self.att(self.norm1(x)))
        return x + self.drop_resid(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2 with a linear output head, by default over the vocabulary.

    `cfg` has the keys vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate and qkv_bias.
    """

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx):
        """Map token ids (batch, tokens) to logits (batch, tokens, vocab_size)."""
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


def load_weights_into_gpt(gpt, params):
    """Copy GPT-2's published weights into a GPTModel with `qkv_bias=True`.

    `params` is the nested dictionary of NumPy arrays that `gpt_download` returns. Raises
    ValueError, before anything is copied, if an array is missing, left over or of another shape.
    """
    arrays = dict(_flatten(params))
    targets = {name: (parameter, transpose) for name, parameter, transpose in _targets(gpt)}
    problems = [f"{name} is missing" for name in targets if name not in arrays]
    problems += [f"{name} has no place in this model" for name in arrays if name not in targets]
    for name in targets.keys() & arrays.keys():
        parameters, transpose = targets[name]
        wanted = _stored_shape(parameters, transpose)
        if arrays[name].shape != wanted:
            problems.append(f"{name} has shape {arrays[name].shape}, not {wanted}")
    if problems:
        raise ValueError("; ".join(sorted(problems)[:5]) + (" ..." if len(problems) > 5 else ""))
    with torch.no_grad():
        for name, (parameters, transpose) in targets.items():
            array = torch.from_numpy(arrays[name])
            for parameter, part in zip(parameters, array.chunk(len(parameters), dim=-1), strict=True):
                parameter.copy_(part.T if transpose else part)
        gpt.out_head.weight.copy_(gpt.tok_emb.weight)  # GPT-2 ties its head to the token embedding


def _targets(gpt):
    """Yield (published name, parameters it fills, whether it is stored transposed).

    The published `c_attn` holds query, key and value side by side, so it fills three parameters.
    """
    yield "wte", [gpt.tok_emb.weight], False
    yield "wpe", [gpt.pos_emb.weight], False
    for i, block in enumerate(gpt.trf_blocks):
        qkv = block.att.W_query, block.att.W_key, block.att.W_value
        linears = {
            "attn/c_attn": qkv,
            "attn/c_proj": [block.att.out_proj],
            "mlp/c_fc": [block.ff.layers[0]],
            "mlp/c_proj": [block.ff.layers[2]],
        }
        for name, layers in linears.items():
            yield f"blocks/{i}/{name}/w", [layer.weight for layer in layers], True
            yield f"blocks/{i}/{name}/b", [layer.bias for layer in layers], False
        for name, norm in (("ln_1", block.norm1), ("ln_2", block.norm2)):
            yield f"blocks/{i}/{name}/g", [norm.scale], False
            yield f"blocks/{i}/{name}/b", [norm.shift], False
    yield "g", [gpt.final_norm.scale], False
    yield "b", [gpt.final_norm.shift], False


def _stored_shape(parameters, transpose):
    """Return the shape of the published array that fills `parameters`, concatenated along the last axis."""
    shape = parameters[0].shape[::-1] if transpose else parameters[0].shape
    return (*shape[:-1], shape[-1] * len(parameters))


def _flatten(params, prefix=""):
    """Yield ("blocks/0/attn/c_attn/w", array) for each array in nested dictionaries and lists."""
    items = enumerate(params) if isinstance(params, list) else params.items()
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


@torch.no_grad()
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Continue the token ids `idx` (batch, tokens) greedily: (batch, tokens + max_new_tokens).

    The model sees the last `context_size` tokens. Put it in eval mode first.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1]
        idx = torch.cat([idx, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return idx
