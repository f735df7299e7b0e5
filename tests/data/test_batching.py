import numpy as np
import torch
from torch.utils.data import DataLoader

from finetuning.data.batching import (
    IMDbDataset,
    batches_by_token_budget,
    length_buckets,
    length_grouped_batches,
    shuffled_batches,
)
from finetuning.data.tokenization import EncodedReviews, concatenate

REVIEWS = [[5, 6, 7], [8], [9, 10]]


def test_collate_pads_to_the_longest_review_and_masks_the_padding():
    batch = IMDbDataset(concatenate(REVIEWS, [1, 0, 1]), pad_token_id=0, use_attention_mask=True).collate([2, 0])
    assert batch.input_ids.tolist() == [[9, 10, 0], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.labels.tolist() == [1, 1]


def test_collate_pads_to_a_fixed_length_without_a_mask():
    batch = IMDbDataset(concatenate(REVIEWS, [1, 0, 1]), pad_token_id=50256, pad_to=4).collate(torch.tensor([1]))
    assert batch.input_ids.tolist() == [[8, 50256, 50256, 50256]]
    assert batch.attention_mask is None


def test_collate_pads_to_the_shortest_bucket_that_fits():
    dataset = IMDbDataset(concatenate(REVIEWS, [1, 0, 1]), pad_token_id=0, pad_to=(2, 4))
    assert dataset.collate([1]).input_ids.tolist() == [[8, 0]]
    assert dataset.collate([2, 0]).input_ids.tolist() == [[9, 10, 0, 0], [5, 6, 7, 0]]
    assert dataset.padded_lengths(dataset.lengths).tolist() == [4, 2, 2]
    assert length_buckets(256) == (128, 256)
    assert length_buckets(30) == (15, 30)


def test_collate_pads_hidden_states():
    states = np.arange(8, dtype=np.float32).reshape(4, 2)
    batch = IMDbDataset(EncodedReviews(states, np.array([1, 3]), np.array([0, 1])), pad_token_id=0).collate([1, 0])
    assert batch.input_ids.dtype == torch.float32
    assert batch.input_ids.tolist() == [[[2, 3], [4, 5], [6, 7]], [[0, 1], [0, 0], [0, 0]]]


def test_collate_omits_the_mask_of_a_batch_without_padding():
    dataset = IMDbDataset(concatenate([[1, 2], [3, 4], [5]], [0, 1, 0]), pad_token_id=0, use_attention_mask=True)
    assert dataset.collate([0, 1]).attention_mask is None
    assert dataset.collate([0, 2]).attention_mask is not None
    dataset.pad_to = (1, 2)  # of a compiled model, which is compiled for batches with a mask
    assert dataset.collate([0, 1]).attention_mask.tolist() == [[1, 1], [1, 1]]


def test_dataset_indexing_and_head():
    dataset = IMDbDataset(concatenate(REVIEWS, [1, 0, 1]), pad_token_id=0)
    ids, label = dataset[2]
    assert (ids.tolist(), label) == ([9, 10], 1)
    assert len(dataset.head(2)) == 2
    assert dataset.head(2).collate([1]).input_ids.tolist() == [[8]]
    assert len(dataset.head(9)) == 3
    assert len(dataset) == 3


def test_shuffled_batches_equal_those_of_a_shuffling_dataloader():
    torch.manual_seed(123)
    expected = [batch.tolist() for batch in DataLoader(torch.arange(22), batch_size=4, shuffle=True, drop_last=True)]
    after = torch.get_rng_state()
    torch.manual_seed(123)
    assert shuffled_batches(22, 4).tolist() == expected
    assert torch.equal(torch.get_rng_state(), after)
    assert len(expected) == 5  # the last two reviews are dropped


def test_length_grouped_batches_hold_each_review_once_with_little_padding():
    lengths = np.random.default_rng(0).integers(1, 257, 500)
    torch.manual_seed(0)
    grouped, shuffled = length_grouped_batches(lengths, 8), shuffled_batches(500, 8)
    assert grouped.shape == shuffled.shape == (62, 8)
    assert len(set(grouped.flatten().tolist())) == 496

    def padding(order):
        return sum(lengths[batch].max() * 8 - lengths[batch].sum() for batch in order.numpy())

    assert padding(grouped) < 0.2 * padding(shuffled)
    assert not torch.equal(grouped, length_grouped_batches(lengths, 8))  # batches differ between epochs
    longest = torch.as_tensor(lengths)[grouped].amax(dim=1).tolist()
    assert longest != sorted(longest)  # batches are not sorted by length


def test_batches_by_token_budget_are_sorted_by_length_and_within_the_budget():
    lengths = np.array([3, 10, 1, 4, 4, 2])
    order = [indices.tolist() for indices in batches_by_token_budget(lengths, max_tokens=8)]
    # The review of 10 tokens exceeds the budget and gets its own batch; then 8 // 4 and 8 // 3 = 2 reviews; the rest.
    assert order == [[1], [3, 4], [0, 5], [2]]


def test_collate_pads_on_the_left():
    dataset = IMDbDataset(
        concatenate([[5, 6, 7], [8]], [1, 0]), pad_token_id=9, pad_to=4, use_attention_mask=True, padding_side="left"
    )
    batch = dataset.collate([0, 1])
    assert batch.input_ids.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
