import numpy as np
import torch
from torch.utils.data import DataLoader

from finetuning.batches import IMDbDataset, evaluation_order, few_lengths, grouped_order, training_order
from finetuning.tokens import Tokens, flatten

REVIEWS = [[5, 6, 7], [8], [9, 10]]


def test_padding_to_the_longest_and_its_mask():
    batch = IMDbDataset(flatten(REVIEWS, [1, 0, 1]), pad_token_id=0, use_attention_mask=True).batch([2, 0])
    assert batch.input_ids.tolist() == [[9, 10, 0], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.labels.tolist() == [1, 1]


def test_padding_to_a_fixed_length_without_a_mask():
    batch = IMDbDataset(flatten(REVIEWS, [1, 0, 1]), pad_token_id=50256, pad_to=4).batch(torch.tensor([1]))
    assert batch.input_ids.tolist() == [[8, 50256, 50256, 50256]]
    assert batch.attention_mask is None


def test_padding_to_the_least_of_a_few_lengths():
    dataset = IMDbDataset(flatten(REVIEWS, [1, 0, 1]), pad_token_id=0, pad_to=(2, 4))
    assert dataset.batch([1]).input_ids.tolist() == [[8, 0]]
    assert dataset.batch([2, 0]).input_ids.tolist() == [[9, 10, 0, 0], [5, 6, 7, 0]]
    assert dataset.padded(dataset.lengths).tolist() == [4, 2, 2]
    assert few_lengths(256) == (64, 128, 192, 256)
    assert few_lengths(30) == (8, 15, 23, 30)


def test_hidden_states_in_place_of_token_ids():
    states = np.arange(8, dtype=np.float32).reshape(4, 2)
    batch = IMDbDataset(Tokens(states, np.array([1, 3]), np.array([0, 1])), pad_token_id=0).batch([1, 0])
    assert batch.input_ids.dtype == torch.float32
    assert batch.input_ids.tolist() == [[[2, 3], [4, 5], [6, 7]], [[0, 1], [0, 0], [0, 0]]]


def test_a_batch_without_padding_carries_no_mask():
    dataset = IMDbDataset(flatten([[1, 2], [3, 4], [5]], [0, 1, 0]), pad_token_id=0, use_attention_mask=True)
    assert dataset.batch([0, 1]).attention_mask is None
    assert dataset.batch([0, 2]).attention_mask is not None


def test_a_single_review_and_the_first_few():
    dataset = IMDbDataset(flatten(REVIEWS, [1, 0, 1]), pad_token_id=0)
    ids, label = dataset[2]
    assert (ids.tolist(), label) == ([9, 10], 1)
    assert len(dataset.first(2)) == 2
    assert dataset.first(2).batch([1]).input_ids.tolist() == [[8]]
    assert len(dataset.first(9)) == 3
    assert len(dataset) == 3


def test_the_training_order_is_that_of_a_shuffling_dataloader():
    torch.manual_seed(123)
    expected = [batch.tolist() for batch in DataLoader(torch.arange(22), batch_size=4, shuffle=True, drop_last=True)]
    after = torch.get_rng_state()
    torch.manual_seed(123)
    assert training_order(22, 4).tolist() == expected
    assert torch.equal(torch.get_rng_state(), after)
    assert len(expected) == 5  # the last two reviews are dropped


def test_grouped_batches_hold_each_review_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 257, 500)
    torch.manual_seed(0)
    grouped, shuffled = grouped_order(lengths, 8), training_order(500, 8)
    assert grouped.shape == shuffled.shape == (62, 8)
    assert len(set(grouped.flatten().tolist())) == 496

    def padding(order):
        return sum(lengths[batch].max() * 8 - lengths[batch].sum() for batch in order.numpy())
    assert padding(grouped) < 0.2 * padding(shuffled)
    assert not torch.equal(grouped, grouped_order(lengths, 8))  # another epoch, other batches
    longest = torch.as_tensor(lengths)[grouped].amax(dim=1).tolist()
    assert longest != sorted(longest)  # and not from short to long


def test_the_evaluation_order_takes_each_review_once_longest_first_within_the_budget():
    lengths = np.array([3, 10, 1, 4, 4, 2])
    order = [indices.tolist() for indices in evaluation_order(lengths, tokens=8)]
    # 10 tokens exceed the budget and stand alone; 8 // 4 = 2 reviews; 8 // 3 = 2 reviews; the rest.
    assert order == [[1], [3, 4], [0, 5], [2]]


def test_padding_on_the_left():
    dataset = IMDbDataset(flatten([[5, 6, 7], [8]], [1, 0]), pad_token_id=9, pad_to=4, use_attention_mask=True,
                          padding_side="left")
    batch = dataset.batch([0, 1])
    assert batch.input_ids.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
