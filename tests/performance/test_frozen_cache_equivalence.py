from argparse import Namespace

import pytest
import torch
from helpers import make_reviews
from tiny_models import CPU, MAX_LENGTH, gpt_dataset, make_gpt_classifier

import train_gpt
from finetuning.optimizers import build_optimizers
from finetuning.performance import frozen_cache
from finetuning.performance.frozen_cache import cache_frozen_outputs
from finetuning.performance.inference import Classifier
from finetuning.trainable_layers import set_trainable
from finetuning.training import TrainConfig, train_classifier

CONFIG = TrainConfig(num_epochs=2, batch_size=8, eval_freq=4, eval_iter=2, group_by_length=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainable_layers", ["last_layer", "last_block"])
@pytest.mark.parametrize(("token_pos", "average"), train_gpt.POOLING)
def test_caching_frozen_outputs_changes_no_loss(token_pos, average, trainable_layers, precision, monkeypatch):
    """Training and validation losses, in batches grouped by length, equal those without a cache."""
    monkeypatch.setattr(frozen_cache, "available_memory", lambda: 10**9)
    expected, cached = (
        losses(token_pos, average, trainable_layers, precision, use_cache=use_cache) for use_cache in (False, True)
    )
    # The mean over non-padding tokens is taken over each batch's own padding, where bf16 rounds by batch.
    averages_padded_batches = (token_pos, average) == ("flexible", True)
    tolerance = {"fp32": 1e-5, "bf16": 5e-3 if averages_padded_batches else 1e-3}[precision]
    assert cached == pytest.approx(expected, abs=tolerance)
    assert max(expected) - min(expected) > 0.1


def losses(token_pos, average, trainable_layers, precision, use_cache):
    """Train a tiny GPT; return the training losses, then the validation losses of the log lines."""
    model, layers = make_gpt_classifier()
    torch.manual_seed(0)
    for parameter in model.parameters():  # large weights make differences in GELU and rounding visible
        torch.nn.init.normal_(parameter, std=0.5)
    set_trainable(model, trainable_layers, layers)
    classifier = Classifier(model, train_gpt.POOLING[token_pos, average], CPU, precision)
    datasets = [gpt_dataset(make_reviews(100, seed)) for seed in range(2)]
    for dataset in datasets:
        dataset.pad_to = train_gpt.padded_length(token_pos, average, MAX_LENGTH)
    if use_cache:
        args = Namespace(trainable_layers=trainable_layers, num_epochs=2, eval_iter=2, batch_size=8)
        classifier, datasets = cache_frozen_outputs(args, classifier, layers.head, *datasets)
        assert datasets[0].collate([0])[0].is_floating_point()  # vectors, not token ids
    torch.manual_seed(123)
    optimizers = build_optimizers("adamw", classifier.model, learning_rate=1e-3)
    state = train_classifier(classifier, optimizers, *datasets, CONFIG)
    return [*map(float, state.losses), *(point["validation_loss"] for point in state.eval_history)]
