"""The book's GPT model without computation that the logits do not depend on, and its pooling functions.

Three savings, each equal to `GPTModel.forward` up to rounding:

- Logits at selected positions only: the last block's queries, its feed-forward layers and the head
  run for the tokens whose logits are requested, while keys and values still come from all tokens.
- Packed sequences: the texts of a batch are concatenated without padding, and each attends to itself.
- Cached hidden states: the blocks below the last one can be run once if they are frozen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from finetuning.data.batching import Batch
from finetuning.performance import cpu_kernels
from finetuning.performance.device import is_compiled


class GPTClassifier(nn.Module):
    """A view of a `GPTModel` that shares its modules, and so its parameters and state dict."""

    tok_emb: nn.Module
    pos_emb: nn.Module
    drop_emb: nn.Module
    trf_blocks: nn.Sequential
    final_norm: nn.Module
    out_head: nn.Module

    def __init__(self, gpt: nn.Module):
        super().__init__()
        for name, module in gpt.named_children():
            self.add_module(name, module)

    def forward(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor | None = None,
        lengths: list[int] | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits (batch, tokens, classes), or (batch, n, classes) at `positions` (batch, n).

        `inputs` are token ids (batch, tokens), or what `hidden_states` returned for them. With
        `lengths`, a list, they are the packed ids (1, tokens) of texts of these lengths, and
        `positions` (1, texts) may only be the last token of each text. With `token_weights` (batch, tokens),
        return the weighted mean of the logits (batch, classes): the head is linear, so it is applied to the mean.
        """
        x = inputs if inputs.is_floating_point() else self.hidden_states(inputs, lengths)
        x = self.final_norm(block_forward(self.trf_blocks[-1], x, positions, lengths))
        if token_weights is not None:
            x = (x.float() * token_weights[..., None]).sum(dim=1) / token_weights.sum(dim=1, keepdim=True)
        return self.out_head(x)

    def hidden_states(self, input_ids: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        """Return the input of the last block: token ids (batch, tokens) -> (batch, tokens, emb_dim)."""
        positions = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths or input_ids.shape[1:]])
        x = self.drop_emb(self.tok_emb(input_ids) + self.pos_emb(positions))
        for block in list(self.trf_blocks)[:-1]:
            x = block_forward(block, x, lengths=lengths)
        return x


def block_forward(
    block: Any, x: torch.Tensor, positions: torch.Tensor | None = None, lengths: list[int] | None = None
) -> torch.Tensor:
    """Run a `TransformerBlock`: (batch, tokens, emb_dim) -> (batch, tokens or n, emb_dim)."""
    attended = attention_forward(block.att, block.norm1(x), positions, lengths)
    x = select_positions(x, positions) + block.drop_resid(attended)
    return x + block.drop_resid(block.ff(block.norm2(x)))


def attention_forward(
    att: Any, x: torch.Tensor, positions: torch.Tensor | None = None, lengths: list[int] | None = None
) -> torch.Tensor:
    """Run a `MultiHeadAttention`: (batch, tokens, d_in) -> (batch, tokens or n, d_out)."""
    queries = att.split_heads(att.W_query(select_positions(x, positions)))
    keys, values = att.split_heads(att.W_key(x)), att.split_heads(att.W_value(x))
    dropout = att.dropout.p if att.training else 0.0
    if lengths is None:
        context = causal_attention(queries, keys, values, positions, dropout)
    else:
        texts = zip(
            queries.split(lengths if positions is None else 1, dim=2),
            keys.split(lengths, dim=2),
            values.split(lengths, dim=2),
            strict=True,
        )
        context = torch.cat([causal_attention(*text, positions=None, dropout=dropout) for text in texts], dim=2)
    return att.out_proj(context.transpose(1, 2).flatten(2))


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Attend to the same and earlier tokens; each argument (batch, heads, tokens, head_dim).

    The queries are those of all tokens, of the last token, or of the tokens at `positions` (batch, n).
    """
    if positions is None:
        is_causal = queries.shape[2] > 1  # the last token may attend to all tokens
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=is_causal)
    mask = torch.arange(keys.shape[2], device=keys.device) <= positions[..., None]
    return F.scaled_dot_product_attention(queries, keys, values, mask[:, None], dropout_p=dropout)


def select_positions(x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return x (batch, tokens, width) at positions (batch, n) as (batch, n, width), or all of x if that is None."""
    return x if positions is None else x[torch.arange(len(x), device=x.device)[:, None], positions]


def first_token_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits of each review's first token, which attends to itself only: (batch, classes)."""
    return model(batch.input_ids, positions=torch.zeros_like(batch.lengths[:, None]))[:, 0]


def last_token_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits of the last token of each padded review, as published: (batch, classes)."""
    last = torch.full_like(batch.lengths[:, None], batch.input_ids.shape[1] - 1)
    return model(batch.input_ids, positions=last)[:, 0]


def last_non_padding_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits of each review's last non-padding token: (batch, classes)."""
    if batch.input_ids.device.type != "cpu" or is_compiled(model):
        return model(batch.input_ids, positions=batch.lengths[:, None] - 1)[:, 0]
    # Packing is faster on a CPU; a GPU prefers few large operations, and a compiled model few shapes.
    longest = batch.input_ids.shape[1]
    not_padding = torch.arange(longest) < batch.lengths[:, None]
    packed, lengths = batch.input_ids[not_padding], batch.lengths.tolist()
    if filler := cpu_kernels.num_filler(len(packed), cpu_kernels.ROW_MULTIPLE, limit=longest):  # as one more text
        packed = torch.cat([packed, packed.new_zeros(filler, *packed.shape[1:])])
        lengths.append(filler)
    last_tokens = torch.tensor([lengths]).cumsum(dim=1) - 1
    return model(packed[None], positions=last_tokens, lengths=lengths)[0, : len(batch.lengths)]


def mean_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean of the logits over each padded review, as published: (batch, classes)."""
    shape = batch.input_ids.shape[:2]
    return model(batch.input_ids, token_weights=torch.ones(shape, device=batch.input_ids.device))


def masked_mean_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean of the logits over the non-padding tokens: (batch, classes)."""
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return model(batch.input_ids, token_weights=(positions < batch.lengths[:, None]).float())
