"""The frozen part of a model as a fixed function of the review: run once, its answers kept."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from finetuning.loop import Classifier, predict
from finetuning.runtime import random_state


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
