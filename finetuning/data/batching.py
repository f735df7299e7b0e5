"""Padded batches of token ids, and the order in which they come."""

from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Dataset

from finetuning.data.tokenization import EncodedReviews

MEGA_BATCH_MULT = 50  # batches within which reviews are sorted by length, as in Transformers' group_by_length
NUM_BUCKETS = 2  # padded lengths of a compiled model, which is recompiled for each


class Batch(NamedTuple):
    """Reviews padded to one length."""

    input_ids: torch.Tensor  # (batch, tokens) int64; or hidden states (batch, tokens, width) float32
    attention_mask: torch.Tensor | None  # (batch, tokens) int64, 1 at non-padding tokens; None: no mask
    lengths: torch.Tensor  # (batch,) int64, non-padding tokens of each review
    labels: torch.Tensor  # (batch,) int64

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device; the copy to a GPU is asynchronous."""
        if device.type == "cpu":
            return self
        is_cuda = device.type == "cuda"

        def move(tensor):
            return (tensor.pin_memory() if is_cuda else tensor).to(device, non_blocking=is_cuda)

        mask = None if self.attention_mask is None else move(self.attention_mask)
        return Batch(move(self.input_ids), mask, move(self.lengths), move(self.labels))


class IMDbDataset(Dataset):
    """Tokenized reviews with their labels.

    Parameters
    ----------
    reviews : token ids, or hidden states (tokens, width) float32 in their place
    pad_token_id : fills the padding
    pad_to : length that batches are padded to; several (buckets): the shortest that fits; None: the longest review's
    use_attention_mask : whether the padding is masked; batches without padding have no mask, except with buckets
    padding_side : "right" or "left"
    """

    def __init__(
        self,
        reviews: EncodedReviews,
        pad_token_id: int,
        pad_to: int | tuple[int, ...] | None = None,
        use_attention_mask: bool = False,
        padding_side: str = "right",
    ):
        self.token_ids, self.lengths, self.labels = reviews
        self.num_rows = self.lengths  # rows of `token_ids` per review; cached hidden states may include padding
        self.offsets = np.cumsum(self.num_rows) - self.num_rows
        self.pad_token_id = pad_token_id
        self.pad_to = pad_to
        self.use_attention_mask = use_attention_mask
        self.padding_side = padding_side
        self.cached_sample: IMDbDataset | None = None  # the first reviews as cached hidden states

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return one review: (token ids int64, label)."""
        ids = self.token_ids[self.offsets[index] : self.offsets[index] + self.lengths[index]]
        return torch.from_numpy(ids.astype(np.int64)), int(self.labels[index])

    def computed_lengths(self) -> np.ndarray:
        """Return how many tokens of each review affect its logits: with its padding if `pad_to` is one length."""
        return np.full_like(self.lengths, self.pad_to) if isinstance(self.pad_to, int) else self.lengths

    def padded_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Return the padded lengths of batches whose longest reviews have these lengths."""
        if self.pad_to is None:
            return lengths
        buckets = np.atleast_1d(self.pad_to)
        return buckets[np.searchsorted(buckets, lengths)]

    def head(self, count: int) -> "IMDbDataset":
        """Return the first `count` reviews as a dataset that shares this one's memory."""
        if self.cached_sample is not None and count <= len(self.cached_sample):
            return self.cached_sample.head(count)
        part = copy(self)
        for name in ("lengths", "num_rows", "offsets", "labels"):
            setattr(part, name, getattr(self, name)[:count])
        return part

    def with_cached_sample(self, cached_sample: "IMDbDataset") -> "IMDbDataset":
        """Return the dataset whose `head` returns reviews as cached hidden states."""
        part = copy(self)
        part.cached_sample = cached_sample
        return part

    def with_hidden_states(self, states: np.ndarray, num_rows: np.ndarray) -> "IMDbDataset":
        """Return the dataset with hidden states (rows, width) in place of token ids, `num_rows` of each review."""
        part = copy(self)
        part.token_ids, part.num_rows, part.offsets = states, num_rows, np.cumsum(num_rows) - num_rows
        part.pad_token_id = 0
        return part

    def collate(self, indices: ArrayLike) -> Batch:
        """Return the reviews at `indices` as one padded batch."""
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        dtype = np.int64 if self.token_ids.ndim == 1 else self.token_ids.dtype
        shape = len(indices), self.padded_lengths(lengths.max()), *self.token_ids.shape[1:]
        input_ids = np.full(shape, self.pad_token_id, dtype)
        first = shape[1] - lengths if self.padding_side == "left" else np.zeros_like(lengths)
        spans = zip(first, self.offsets[indices], self.num_rows[indices], strict=True)
        for row, (start, offset, num_rows) in enumerate(spans):
            input_ids[row, start : start + num_rows] = self.token_ids[offset : offset + num_rows]
        positions = np.arange(shape[1]) - first[:, None]
        not_padding = (positions >= 0) & (positions < lengths[:, None])
        # Fused attention kernels are faster without a mask, but a model compiled for each bucket would be recompiled
        # for the few batches without padding.
        has_buckets = isinstance(self.pad_to, tuple)
        has_mask = self.use_attention_mask and (has_buckets or not not_padding.all())
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(not_padding.astype(np.int64)) if has_mask else None,
            torch.from_numpy(lengths),
            torch.from_numpy(self.labels[indices]),
        )


def shuffled_batches(num_reviews: int, batch_size: int) -> torch.Tensor:
    """Draw one epoch's batches, (steps, batch_size) indices, without the last partial batch.

    A DataLoader draws them, so that from the same random state they are those of the published
    `DataLoader(shuffle=True, drop_last=True)`.
    """
    indices: Any = range(num_reviews)  # DataLoader takes any sequence
    loader = DataLoader(indices, batch_size=batch_size, shuffle=True, drop_last=True)
    return torch.stack([*loader])


def length_grouped_batches(lengths: np.ndarray, batch_size: int) -> torch.Tensor:
    """Draw one epoch's batches like `shuffled_batches`, but of reviews of similar length.

    Shuffled reviews are sorted by length within mega-batches of MEGA_BATCH_MULT batches, then the
    batches are shuffled: less padding than at random, more mixing than after sorting everything.
    """
    order = shuffled_batches(len(lengths), batch_size).flatten()
    mega_batches = [
        indices[torch.as_tensor(lengths)[indices].argsort(stable=True)]
        for indices in order.split(MEGA_BATCH_MULT * batch_size)
    ]
    batches = torch.cat(mega_batches).view(-1, batch_size)
    return batches[torch.randperm(len(batches))]


def length_buckets(longest: int) -> tuple[int, ...]:
    """Return NUM_BUCKETS lengths to pad to, the last of them `longest`."""
    return tuple(-(-longest * part // NUM_BUCKETS) for part in range(1, NUM_BUCKETS + 1))


def batches_by_token_budget(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield all reviews as arrays of indices, longest first, each of at most `max_tokens` padded tokens.

    `lengths` are the padded lengths. Predictions do not depend on the order, and reviews of similar
    length need little padding.
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(by_length):
        count = max(1, max_tokens // max(1, int(lengths[by_length[start]])))
        yield by_length[start : start + count]
        start += count
