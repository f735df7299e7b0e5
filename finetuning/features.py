"""The frozen part of a model as a fixed function of the review: run once, its answers kept in memory."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from finetuning.batches import IMDbDataset, evaluation_order
from finetuning.cli import note
from finetuning.distributed import local_size
from finetuning.loop import Classifier, compute_batches, evaluating, predict
from finetuning.machine import available_memory
from finetuning.runtime import random_state
from finetuning.tokens import Tokens

SHARE_OF_MEMORY = 0.5  # of what is free, that may go into keeping hidden states


def compute_once(args, classifier, head, *datasets):
    """Return `(classifier, datasets)` with what never changes in this training computed beforehand, where that pays.

    Training ends in the same numbers, to rounding.
    """
    model = classifier.model
    # A classification head of several layers is trained as it is, since it may read more than one vector a review.
    if args.trainable_layers == "last_layer" and isinstance(head, nn.Linear) and is_fixed(classifier, datasets[0]):
        note("Nothing before the output layer learns or varies: computing what it reads, once")
        return freeze_features(classifier, head, *datasets)
    if (args.trainable_layers != "last_block" or not hasattr(model, "hidden_states")
            or not is_fixed(classifier, datasets[0])):
        return classifier, datasets
    # Only a second epoch would compute it again; hidden states of every token are large.
    if args.num_epochs > 1 and fit_in_memory(model, datasets):
        note("Nothing before the last block learns or varies: computing what it reads, once")
        return classifier, [freeze_hidden_states(classifier, dataset) for dataset in datasets]
    # The reviews that every log line evaluates are few.
    samples = [dataset.first(args.eval_iter * args.batch_size) for dataset in datasets[:2]]
    if fit_in_memory(model, samples):
        note("Nothing before the last block learns or varies: computing what it reads for the log lines, once")
        samples = [freeze_hidden_states(classifier, sample) for sample in samples]
        datasets = [*map(IMDbDataset.with_sample, datasets, samples), *datasets[2:]]
    return classifier, datasets


class FeatureBatch(NamedTuple):
    """What a Batch is to token ids, for vectors that the head reads."""

    features: torch.Tensor  # (batch, width) float32
    labels: torch.Tensor  # (batch,) int64

    def to(self, device):
        return FeatureBatch(*(tensor.to(device) for tensor in self))


class FeatureDataset:
    """Reviews as vectors; stands in for an IMDbDataset in the training loop."""

    def __init__(self, features, labels):
        self.features = features
        self.labels = labels
        self.lengths = np.ones(len(labels), dtype=np.int64)

    def __len__(self):
        return len(self.labels)

    @staticmethod
    def padded(lengths):
        """There is no padding."""
        return lengths

    def first(self, count):
        """The first `count` reviews."""
        return FeatureDataset(self.features[:count], self.labels[:count])

    def batch(self, indices):
        """The reviews at `indices`."""
        indices = torch.as_tensor(indices)
        return FeatureBatch(self.features[indices], torch.from_numpy(self.labels[indices.numpy()]))


def is_fixed(classifier, dataset):
    """Whether the model computes the same in training mode as in evaluation: that no dropout draws random numbers."""
    before = random_state(classifier.device)
    was_training = classifier.model.training
    classifier.model.train()
    with torch.no_grad():
        classifier(dataset.batch([0]).to(classifier.device))
    classifier.model.train(was_training)
    after = random_state(classifier.device)
    return all(torch.equal(before[kind], after[kind]) for kind in before)


def freeze_features(classifier, head, *datasets):
    """A Classifier of the head alone, and each dataset as the vectors that the head reads.

    With the output layer taken out, what a model returns is what that layer reads. Averages over
    tokens are kept: the average of a linear layer's outputs is its output at the average.
    """
    with taken_out(head, classifier.model):
        features = [predict(dataset, classifier) for dataset in datasets]
    head_alone = Classifier(head, lambda head, batch: head(batch.features), classifier.device, classifier.precision)
    return head_alone, [FeatureDataset(x, dataset.labels) for x, dataset in zip(features, datasets, strict=True)]


@contextmanager
def taken_out(layer, model):
    """Let a layer of the model pass its input through."""
    path = next(path for path, module in model.named_modules() if module is layer)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, layer)


def freeze_hidden_states(classifier, dataset):
    """The dataset with what the model's last block reads in place of token ids; `GPTClassifier` takes either."""
    lengths = kept_lengths(dataset)
    states = np.empty((lengths.sum(), classifier.model.tok_emb.embedding_dim), dtype=np.float32)
    starts = np.cumsum(lengths) - lengths
    padded = dataset.padded(dataset.lengths)

    def compute(indices):
        hidden = classifier.model.hidden_states(dataset.batch(indices).to(classifier.device).input_ids)
        return hidden.float().cpu().numpy()
    with evaluating(classifier):
        batches = evaluation_order(padded, classifier.evaluation_tokens)
        for indices, hidden in compute_batches(compute, batches, padded, classifier):
            for row, index in zip(hidden, indices, strict=True):
                states[starts[index]:starts[index] + lengths[index]] = row[:lengths[index]]
    pad_to = None if isinstance(dataset.pad_to, int) else dataset.pad_to
    return IMDbDataset(Tokens(states, lengths, dataset.labels), pad_token_id=0, pad_to=pad_to)


def kept_lengths(dataset):
    """How many hidden states of each review are needed: where all are padded to one length, the padding's, too."""
    return np.full_like(dataset.lengths, dataset.pad_to) if isinstance(dataset.pad_to, int) else dataset.lengths


def fit_in_memory(model, datasets):
    """Whether what `freeze_hidden_states` returns of all of them may be kept."""
    tokens = sum(int(kept_lengths(dataset).sum()) for dataset in datasets)
    needed = tokens * model.tok_emb.embedding_dim * np.dtype(np.float32).itemsize
    return needed < SHARE_OF_MEMORY * available_memory() / local_size()  # each process keeps them
