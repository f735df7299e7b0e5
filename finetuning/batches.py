"""From token ids to padded batches, and the order in which they come."""

from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

POOL = 50  # batches among which reviews of similar length are looked for
FEW = 4  # lengths to pad to where each new one costs a compilation


class Batch(NamedTuple):
    """Reviews padded to one length."""

    input_ids: torch.Tensor  # (batch, tokens) int64; or hidden states (batch, tokens, width) float32
    attention_mask: torch.Tensor | None  # (batch, tokens) int64, 1 on real tokens; None: attend to everything
    lengths: torch.Tensor  # (batch,) int64, real tokens of each review
    labels: torch.Tensor  # (batch,) int64

    def to(self, device):
        """The same batch on another device; the copy to a GPU does not wait for it."""
        if device.type == "cpu":
            return self
        pin = device.type == "cuda"
        return Batch(*(tensor if tensor is None else (tensor.pin_memory() if pin else tensor)
                       .to(device, non_blocking=pin) for tensor in self))


class IMDbDataset(Dataset):
    """Tokenized reviews with their labels, and how a batch of them is padded.

    `tokens` are the reviews as `finetuning.tokens.Tokens`, or with hidden states, (all tokens, width)
    float32, in place of ids. A batch is padded with `pad_token_id` to
    `pad_to` tokens, or where these are several numbers to the least that will do, or where it is
    None to its longest review. `use_attention_mask` says whether the padding is masked; where a
    batch has none, it carries no mask. `padding_side` is "right" or "left".
    """

    def __init__(self, tokens, pad_token_id, pad_to=None, use_attention_mask=False,
                 padding_side="right"):
        self.token_ids, self.lengths, self.labels = tokens
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to
        self.use_attention_mask = use_attention_mask
        self.padding_side = padding_side
        self.sample = None  # the first reviews once more, in a form that is quicker to evaluate

    def padded(self, lengths):
        """What batches whose longest reviews have these `lengths` are padded to."""
        widths = np.atleast_1d(self.pad_to)
        return lengths if self.pad_to is None else widths[np.searchsorted(widths, lengths)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """One review: (token ids, int64; label)"""
        start = self.starts[index]
        ids = self.token_ids[start:start + self.lengths[index]]
        return torch.from_numpy(ids.astype(np.int64)), int(self.labels[index])

    def first(self, count):
        """The first `count` reviews, or all where there are fewer, as a dataset that shares this one's memory."""
        if self.sample is not None and count <= len(self.sample):
            return self.sample.first(count)
        part = copy(self)
        part.lengths, part.starts, part.labels = self.lengths[:count], self.starts[:count], self.labels[:count]
        return part

    def with_sample(self, sample):
        """The same dataset, its first reviews given by the dataset `sample`."""
        part = copy(self)
        part.sample = sample
        return part

    def batch(self, indices):
        """The reviews at `indices` as one padded Batch."""
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        dtype = np.int64 if self.token_ids.ndim == 1 else self.token_ids.dtype  # hidden states stay what they are
        shape = len(indices), self.padded(lengths.max()), *self.token_ids.shape[1:]
        input_ids = np.full(shape, self.pad_token_id, dtype)
        offsets = shape[1] - lengths if self.padding_side == "left" else np.zeros_like(lengths)
        for row, index in enumerate(indices):
            start = self.starts[index]
            input_ids[row, offsets[row]:offsets[row] + lengths[row]] = self.token_ids[start:start + lengths[row]]
        positions = np.arange(shape[1]) - offsets[:, None]
        real = (positions >= 0) & (positions < lengths[:, None])
        # Without padding a mask says nothing, and fused attention kernels are faster without one.
        mask = torch.from_numpy(real.astype(np.int64)) if self.use_attention_mask and not real.all() else None
        return Batch(torch.from_numpy(input_ids), mask, torch.from_numpy(lengths),
                     torch.from_numpy(self.labels[indices]))


def training_order(num_reviews, batch_size):
    """One epoch's batches as (steps, batch_size) indices: shuffled, the last partial batch dropped.

    A DataLoader draws it, so that from the same random state the batches are those of the
    published `DataLoader(shuffle=True, drop_last=True)`.
    """
    order = DataLoader(range(num_reviews), batch_size=batch_size, shuffle=True, drop_last=True)
    return torch.stack(list(order))


def grouped_order(lengths, batch_size):
    """Like `training_order`, but with reviews of similar length in a batch.

    Shuffled reviews are sorted by length within pools of POOL batches, and the batches shuffled
    again: less padding than at random, more mixing than after sorting everything.
    """
    lengths = torch.as_tensor(lengths)
    order = training_order(len(lengths), batch_size).flatten()
    pools = [pool[lengths[pool].argsort(stable=True)] for pool in order.split(POOL * batch_size)]
    batches = torch.cat(pools).view(-1, batch_size)
    return batches[torch.randperm(len(batches))]


def few_lengths(longest):
    """Lengths to pad to, FEW of them, the last `longest`."""
    return tuple(-(-longest * part // FEW) for part in range(1, FEW + 1))


def evaluation_order(lengths, tokens):
    """All reviews as arrays of indices, longest first, each array padding to at most `tokens` tokens.

    `lengths` are what the reviews would be padded to.

    Evaluation does not depend on the order, and reviews of like length need little padding.
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(by_length):
        count = max(1, tokens // max(1, int(lengths[by_length[start]])))
        yield by_length[start:start + count]
        start += count
