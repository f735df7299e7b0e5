"""Cached outputs of frozen layers, which are the same in every epoch and log line."""

import argparse
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from finetuning.data.batching import Batch, IMDbDataset, batches_by_token_budget
from finetuning.performance import distributed
from finetuning.performance.device import get_rng_state
from finetuning.performance.inference import Classifier, inference_context, predict_logits, retry_in_smaller_batches
from finetuning.system.console import print_status
from finetuning.system.environment import available_memory

MAX_MEMORY_FRACTION = 0.5  # of the free memory, for cached hidden states


def cache_frozen_outputs(
    args: argparse.Namespace, classifier: Classifier, head: nn.Module, *datasets: IMDbDataset
) -> tuple[Classifier, list]:
    """Return `(classifier, datasets)` that start from cached outputs of the frozen layers, if that saves time.

    The results of training stay the same up to rounding.
    """
    model = classifier.model
    train = datasets[0]
    # A head of several layers may read more than one vector per review, and is trained as it is.
    if args.trainable_layers == "last_layer" and isinstance(head, nn.Linear) and is_deterministic(classifier, train):
        print_status("All layers below the head are frozen: caching their outputs")
        return extract_features(classifier, head, *datasets)
    can_cache = args.trainable_layers == "last_block" and hasattr(model, "hidden_states")
    if not can_cache or not is_deterministic(classifier, train):
        return classifier, [*datasets]
    # A single epoch needs each output once, and the hidden states of all tokens are large.
    if args.num_epochs > 1 and fits_in_memory(model, datasets):
        print_status("All layers below the last block are frozen: caching their outputs")
        return classifier, [cache_hidden_states(classifier, dataset) for dataset in datasets]
    samples = [dataset.head(args.eval_iter * args.batch_size) for dataset in datasets]
    if fits_in_memory(model, samples):
        print_status("All layers below the last block are frozen: caching their outputs for the log lines")
        samples = [cache_hidden_states(classifier, sample) for sample in samples]
        cached = zip(datasets, samples, strict=True)
        return classifier, [dataset.with_cached_sample(sample) for dataset, sample in cached]
    return classifier, [*datasets]


class FeatureDataset:
    """Extracted features, the inputs of the head (reviews, width) float32, with the interface of IMDbDataset."""

    def __init__(self, features: torch.Tensor, lengths: np.ndarray, labels: np.ndarray):
        self.features = features
        self.lengths = lengths  # in tokens, by which batches can be grouped
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def padded_lengths(lengths: np.ndarray) -> np.ndarray:
        """Return ones: each review is a single vector."""
        return np.ones_like(lengths)

    def head(self, count: int) -> "FeatureDataset":
        """Return the first `count` reviews."""
        return FeatureDataset(self.features[:count], self.lengths[:count], self.labels[:count])

    def collate(self, indices: ArrayLike) -> Batch:
        """Return the reviews at `indices`, their vectors (batch, width) in place of token ids."""
        indices = np.asarray(indices)
        lengths, labels = torch.from_numpy(self.lengths[indices]), torch.from_numpy(self.labels[indices])
        return Batch(self.features[indices], None, lengths, labels)


def is_deterministic(classifier: Classifier, dataset: IMDbDataset) -> bool:
    """Return whether a forward pass in training mode draws no random numbers, that is, has no dropout."""
    before = get_rng_state(classifier.device)
    was_training = classifier.model.training
    classifier.model.train()
    with torch.no_grad():
        classifier(dataset.collate([0]).to(classifier.device))
    classifier.model.train(was_training)
    after = get_rng_state(classifier.device)
    return all(torch.equal(before[kind], after[kind]) for kind in before)


def extract_features(
    classifier: Classifier, head: nn.Module, *datasets: IMDbDataset
) -> tuple[Classifier, list["FeatureDataset"]]:
    """Return a classifier of the head alone and the datasets as the vectors that the head reads.

    With the head replaced by the identity, the pooled outputs are the head's inputs. This holds for
    averages over tokens as well, since the head is linear.
    """
    path = next(path for path, module in classifier.model.named_modules() if module is head)
    classifier.model.set_submodule(path, nn.Identity())
    try:
        features = [predict_logits(dataset, classifier) for dataset in datasets]
    finally:
        classifier.model.set_submodule(path, head)
    head_only = Classifier(head, lambda head, batch: head(batch.input_ids), classifier.device, classifier.precision)
    return head_only, [
        FeatureDataset(vectors, dataset.lengths, dataset.labels)
        for vectors, dataset in zip(features, datasets, strict=True)
    ]


def cache_hidden_states(classifier: Classifier, dataset: IMDbDataset) -> IMDbDataset:
    """Return the dataset with the inputs of the last block in place of token ids; `GPTClassifier` takes either."""
    model: Any = classifier.model  # a GPTClassifier
    num_rows = dataset.computed_lengths()
    states = np.empty((num_rows.sum(), model.tok_emb.embedding_dim), dtype=np.float32)
    offsets = np.cumsum(num_rows) - num_rows
    padded = dataset.padded_lengths(dataset.lengths)
    # Record the states in a forward pass, so that kernels and packing are those of training and prediction.
    recording: Any = copy(model)  # a copy is not compiled
    recorder, recorded = replace(classifier, model=recording), []

    def hidden_states(input_ids, lengths=None):
        recorded.append(model.hidden_states(input_ids, lengths))
        return recorded[-1]

    recording.hidden_states = hidden_states

    def compute(indices):
        recorded.clear()
        recorder(dataset.collate(indices).to(classifier.device))
        hidden = recorded.pop().float().cpu().numpy()
        is_packed = len(hidden) < len(indices)
        return np.split(hidden[0], np.cumsum(num_rows[indices])[:-1]) if is_packed else hidden

    with inference_context(recorder):
        batches = batches_by_token_budget(padded, classifier.eval_tokens)
        for indices, hidden in retry_in_smaller_batches(compute, batches, padded, classifier):
            for rows, index in zip(hidden, indices, strict=True):
                states[offsets[index] : offsets[index] + num_rows[index]] = rows[: num_rows[index]]
    return dataset.with_hidden_states(states, num_rows)


def fits_in_memory(model: Any, datasets: Iterable[IMDbDataset]) -> bool:
    """Return whether the hidden states of all datasets may be cached; the machine's processes share its memory."""
    tokens = sum(int(dataset.computed_lengths().sum()) for dataset in datasets)
    num_bytes = tokens * model.tok_emb.embedding_dim * np.dtype(np.float32).itemsize
    return num_bytes < MAX_MEMORY_FRACTION * available_memory() / distributed.local_world_size()
