import copy
import math
import re

import pytest
import torch
from helpers import make_reviews
from tiny_models import (
    CPU,
    TINY_CONFIGS,
    encoder_dataset,
    first_token_classifier,
    gpt_dataset,
    make_gpt_classifier,
    train_with_adamw,
)
from torch import nn
from transformers import AutoModelForSequenceClassification

import train_bert_hf
import train_gpt
from finetuning.data.batching import IMDbDataset
from finetuning.data.tokenization import concatenate
from finetuning.optimizers import build_optimizers
from finetuning.performance.inference import Classifier, predict_logits
from finetuning.system.errors import UserError
from finetuning.trainable_layers import set_trainable
from finetuning.training import (
    TrainConfig,
    TrainState,
    accuracy,
    batch_loss,
    forward_backward,
    has_unused_parameters,
    mean_loss,
    train_classifier,
)


def test_losses_do_not_depend_on_eval_freq():
    """Dropout is on, so that a random number drawn by an evaluation would change the losses."""
    frame = make_reviews(40)
    dataset = encoder_dataset(frame)
    losses = []
    for eval_freq in (1, 100):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["bert"])
        state = train_with_adamw(model, train_bert_hf.class_logits, dataset, eval_freq=eval_freq)
        losses.append([loss.item() for loss in state.losses])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("micro_batch_size", [4, 3, 1])
def test_micro_batches_give_the_losses_of_the_whole_batch(micro_batch_size):
    """Batches of 8 without dropout, as 4 + 4, 3 + 3 + 2 or one review at a time."""
    frame, states = make_reviews(40), []
    for size in (None, micro_batch_size):
        model, _layers = make_gpt_classifier()
        states.append(
            train_with_adamw(
                model, train_gpt.masked_mean_logits, gpt_dataset(frame), micro_batch_size=size, eval_freq=1
            )
        )
    whole, micro_batches = ([loss.item() for loss in state.losses] for state in states)
    assert micro_batches == pytest.approx(whole, abs=1e-6)
    assert len(set(whole)) == 10
    for row, expected in zip(states[1].eval_history, states[0].eval_history, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


def test_gradients_of_uneven_micro_batches_equal_those_of_the_whole_batch():
    model, _ = make_gpt_classifier()
    dataset, classifier = gpt_dataset(make_reviews(7)), Classifier(model, train_gpt.last_token_logits, CPU)
    batch_loss(dataset.collate(range(7)), classifier).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    forward_backward(dataset, torch.arange(7), classifier, micro_batch_size=3)
    assert sizes == [3, 3, 1]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_loss_and_accuracy_equal_values_computed_by_hand():
    dataset = IMDbDataset(concatenate([[9], [4, 1], [5 + 1, 1, 1], [2]], [1, 0, 0, 1]), pad_token_id=0)
    classifier = first_token_classifier()
    assert predict_logits(dataset, classifier).tolist() == [[5, 9], [5, 4], [5, 6], [5, 2]]  # in the dataset's order
    assert accuracy(predict_logits(dataset, classifier), dataset.labels) == 0.5
    # -log of the softmax at the label: the other logit exceeds it by -4, -1, 1 and 3.
    expected = sum(math.log1p(math.exp(excess)) for excess in (-4, -1, 1, 3)) / 4
    assert mean_loss(dataset, classifier) == pytest.approx(expected)
    assert batch_loss(dataset.collate([0, 1, 2, 3]), classifier).item() == pytest.approx(expected)
    assert mean_loss(dataset.head(1), classifier) == pytest.approx(math.log1p(math.exp(-4)), rel=1e-5)


@pytest.mark.parametrize(("max_steps", "steps", "epochs"), [(1, 1, 1), (5, 5, 1), (6, 6, 1), (9, 9, 2), (99, 12, 2)])
def test_training_stops_after_exactly_max_steps(max_steps, steps, epochs):
    model, _layers = make_gpt_classifier()
    classifier = Classifier(model, train_gpt.last_token_logits, CPU)
    (optimizer,) = build_optimizers("adamw", model, 1e-3)
    calls = []
    step = optimizer.step
    optimizer.step = lambda: (calls.append(1), step())
    dataset = gpt_dataset(make_reviews(50))
    config = TrainConfig(num_epochs=2, batch_size=8, max_steps=max_steps)
    state = train_classifier(classifier, [optimizer], dataset, dataset, config)
    assert (len(calls), state.step, len(state.losses), len(state.epoch_metrics)) == (steps, steps, steps, epochs)


def test_resumed_run_without_its_last_line_prints_it_and_calls_the_callbacks(capsys):
    model, _layers = make_gpt_classifier()
    classifier = Classifier(model, train_gpt.last_token_logits, CPU)
    optimizers, dataset = build_optimizers("adamw", model, 1e-3), gpt_dataset(make_reviews(16))
    config, seen = TrainConfig(batch_size=8, eval_freq=1), []

    def train(state=None):
        callbacks = [lambda state: seen.append((len(state.eval_history), len(state.epoch_metrics), state.seconds > 0))]
        return train_classifier(classifier, optimizers, dataset, dataset, config, state, callbacks)

    state = train()
    *_, losses, accuracies = capsys.readouterr().out.splitlines()
    assert seen == [(1, 0, True), (2, 1, True)]
    train(state)
    assert len(seen) == 2  # nothing was due
    state.epoch_metrics.pop()
    train(state)
    state.epoch_metrics.pop()
    state.eval_history.pop()
    state.seconds = 0.0
    train(state)
    assert seen[2:] == [(2, 1, True)] * 2
    assert capsys.readouterr().out.splitlines() == [accuracies, losses, accuracies]


def test_training_log_has_the_published_format(capsys):
    model, _layers = make_gpt_classifier()
    train_with_adamw(model, train_gpt.last_token_logits, gpt_dataset(make_reviews(50)), eval_freq=5)
    lines = capsys.readouterr().out.splitlines()
    patterns = [r"Ep 1 \(Step 000000\)", r"Ep 1 \(Step 000005\)", "accuracy", r"Ep 2 \(Step 000010\)", "accuracy"]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        expected = (
            r"Training accuracy: \d+\.\d\d% \| Validation accuracy: \d+\.\d\d%"
            if pattern == "accuracy"
            else pattern + r": Train loss \d+\.\d{3}, Val loss \d+\.\d{3}"
        )
        assert re.fullmatch(expected, line), line


@pytest.mark.parametrize(("nan_step", "named_step"), [(0, 0), (3, 3), (7, 7), (9, 9)])
def test_nan_loss_is_reported_at_the_next_log_line(nan_step, named_step, capsys):
    model, _layers = make_gpt_classifier()
    calls = []

    def pooling(model, batch):
        if model.training:
            calls.append(1)
        return train_gpt.last_token_logits(model, batch) * (float("nan") if len(calls) == nan_step + 1 else 1)

    with pytest.raises(
        UserError,
        match=f"the training loss is nan at step {named_step}; "
        + (
            "use --precision fp32 or another model: no weight has changed yet$"
            if named_step == 0
            else "start again with a lower --learning_rate"
        ),
    ):
        train_with_adamw(model, pooling, gpt_dataset(make_reviews(40)), eval_freq=3)
    assert "nan" not in capsys.readouterr().out


def test_log_line_evaluates_eval_iter_batches_of_each_set():
    model, _layers = make_gpt_classifier()
    dataset, validation = gpt_dataset(make_reviews(50)), gpt_dataset(make_reviews(40, seed=1))
    state = train_with_adamw(model, train_gpt.last_token_logits, dataset, validation, eval_iter=2, num_epochs=1)
    classifier = Classifier(model, train_gpt.last_token_logits, CPU)
    assert state.epoch_metrics[0]["train_accuracy"] == accuracy(
        predict_logits(dataset.head(16), classifier), dataset.head(16).labels
    )
    assert state.epoch_metrics[0]["validation_accuracy"] == accuracy(
        predict_logits(validation.head(16), classifier), validation.head(16).labels
    )


def test_training_only_the_last_layer_of_distilbert_lowers_the_loss_and_changes_only_its_head():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["distilbert"])
    layers = train_bert_hf.MODELS["distilbert"].finetune_layers(model)
    set_trainable(model, "last_layer", layers)
    before = copy.deepcopy(model.state_dict())
    frame = make_reviews(80)
    frame["label"] = 1  # even a head on random features can predict a constant
    dataset = encoder_dataset(frame)
    state = train_with_adamw(model, train_bert_hf.class_logits, dataset, num_epochs=10)
    assert state.eval_history[-1]["train_loss"] < 0.9 * state.eval_history[0]["train_loss"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_training_lowers_the_loss():
    model, _layers = make_gpt_classifier()
    state = train_with_adamw(model, train_gpt.masked_mean_logits, gpt_dataset(make_reviews(200)), num_epochs=8)
    assert state.eval_history[-1]["train_loss"] < 0.9 * state.eval_history[0]["train_loss"]


def test_has_unused_parameters_leaves_no_side_effects():
    model, _ = make_gpt_classifier()
    dataset = gpt_dataset(make_reviews(4))
    classifier = Classifier(model.train(), train_gpt.last_token_logits, CPU)
    state = torch.get_rng_state()
    assert not has_unused_parameters(classifier, dataset.collate([0]))
    model.unused = nn.Parameter(torch.ones(2))
    assert has_unused_parameters(classifier, dataset.collate([0]))
    model.unused.requires_grad_(False)
    assert not has_unused_parameters(classifier, dataset.collate([0]))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_history_holds_numbers_rounded_to_six_digits():
    row = {"step": 50, "train_loss": 0.69314718, "validation_loss": 0.5}
    state = TrainState(losses=[torch.tensor(0.25), 1.23456789], eval_history=[row])
    assert state.history() == {
        "losses": [0.25, 1.234568],
        "eval_history": [{"step": 50, "train_loss": 0.693147, "validation_loss": 0.5}],
        "epoch_metrics": [],
    }
