import copy
import math
import re
import weakref

import pytest
import torch
from conftest import TINY_CONFIGS, WORDS, reviews, tiny_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification

import train_bert_hf
import train_gpt
from benchmarks import reference
from finetuning.batches import IMDbDataset
from finetuning.errors import UserError
from finetuning.gpt_classifier import GPTClassifier
from finetuning.layers import set_trainable
from finetuning.loop import (
    EVALUATION_TOKENS,
    Classifier,
    calc_accuracy_loader,
    calc_gradients,
    calc_loss_batch,
    calc_loss_loader,
    evaluate_model,
    has_unused_parameters,
    predict,
    train_classifier_simple,
)
from finetuning.optimizers import build_optimizer
from finetuning.tokens import flatten
from previous_chapters import GPTModel

CPU = torch.device("cpu")
LENGTH = 24
ENCODE = train_bert_hf.wrap(tiny_tokenizer()).encode


def book_gpt():
    torch.manual_seed(123)
    model = GPTModel({"vocab_size": 5 + len(WORDS), "context_length": LENGTH, "emb_dim": 16, "n_heads": 2,
                      "n_layers": 2, "drop_rate": 0.0, "qkv_bias": True})
    return model, train_gpt.replace_head(model, seed=123)


def gpt():
    model, layers = book_gpt()
    return GPTClassifier(model), layers


def gpt_dataset(frame):
    return IMDbDataset(flatten(ENCODE(frame["text"].tolist(), LENGTH), frame["label"]), pad_token_id=0, pad_to=LENGTH)


def encoder_dataset(frame):
    tokens = flatten(ENCODE(frame["text"].tolist(), LENGTH), frame["label"])
    return IMDbDataset(tokens, pad_token_id=0, use_attention_mask=True)


def train(model, head, read_logits, dataset, validation=None, seed=123, **settings):
    """The project's own loop with the published settings; returns its Progress."""
    classifier = Classifier(model, read_logits, CPU)
    torch.manual_seed(seed)
    optimizer = build_optimizer("adamw", model, learning_rate=1e-3)
    settings = {"num_epochs": 2, "batch_size": 8} | settings
    return train_classifier_simple(classifier, optimizer, dataset, validation or dataset, **settings)


@pytest.mark.parametrize("mode", ["all", "last_block", "last_layer"])
@pytest.mark.parametrize(("position", "read_logits"), [
    ("last", train_gpt.TOKEN_POSITIONS["last"]), ("first", train_gpt.TOKEN_POSITIONS["first"]),
    ("average", train_gpt.AVERAGES["last"])])
def test_gpt_learns_as_in_the_textbook_loop(mode, position, read_logits):
    """Loss for loss within 1e-5, over two epochs, the last partial batch dropped."""
    frame = reviews(52)
    model, layers = gpt()
    set_trainable(model, mode, layers)
    textbook, textbook_layers = book_gpt()
    set_trainable(textbook, mode, textbook_layers)
    reference.spell_out(textbook)
    expected, _ = reference.train(textbook, reference.gpt_logits(position), reference.ReferenceDataset(
        frame, ENCODE, LENGTH, pad_token_id=0), num_epochs=2, learning_rate=1e-3)
    progress = train(model, layers.head, read_logits, gpt_dataset(frame), eval_freq=3, eval_iter=1)
    assert len(expected) == 12
    assert [loss.item() for loss in progress.losses] == pytest.approx(expected, abs=1e-5)
    assert expected[0] != expected[-1]


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_an_encoder_learns_as_in_the_textbook_loop(name):
    """Padding to each batch's longest review changes nothing; with dropout off, the random draws are the same."""
    config = copy.deepcopy(TINY_CONFIGS[name])
    for key in ("dropout", "attention_dropout", "seq_classif_dropout", "hidden_dropout_prob",
                "attention_probs_dropout_prob", "embedding_dropout", "mlp_dropout", "classifier_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    torch.manual_seed(123)
    model = AutoModelForSequenceClassification.from_config(config)
    textbook = copy.deepcopy(model)
    frame, tokenizer = reviews(40), tiny_tokenizer(config.pad_token_id)
    encode = train_bert_hf.wrap(tokenizer).encode
    expected, _ = reference.train(textbook, reference.encoder_logits, reference.ReferenceDataset(
        frame, encode, LENGTH, tokenizer.pad_token_id), num_epochs=2, learning_rate=1e-3)
    dataset = IMDbDataset(flatten(encode(frame["text"].tolist(), LENGTH), frame["label"]), tokenizer.pad_token_id,
                          use_attention_mask=True)
    head = train_bert_hf.output_layers(name, model).head
    progress = train(model, head, train_bert_hf.read_logits, dataset)
    assert [loss.item() for loss in progress.losses] == pytest.approx(expected, abs=1e-5)


def test_how_often_one_evaluates_does_not_change_what_is_learned():
    """With dropout on, where a single random number drawn by the evaluation would show."""
    frame = reviews(40)
    dataset = encoder_dataset(frame)
    losses = []
    for eval_freq in (1, 100):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["bert"])
        progress = train(model, model.classifier, train_bert_hf.read_logits, dataset, eval_freq=eval_freq)
        losses.append([loss.item() for loss in progress.losses])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_a_batch_in_parts_teaches_the_same(accumulate):
    """8 reviews in parts of 4 and 4, of 3, 3 and 2, and one by one; dropout is off."""
    frame, progress = reviews(40), []
    for parts in (1, accumulate):
        model, layers = gpt()
        progress.append(train(model, layers.head, train_gpt.average_real, gpt_dataset(frame), accumulate=parts,
                              eval_freq=1))
    whole, in_parts = ([loss.item() for loss in one.losses] for one in progress)
    assert in_parts == pytest.approx(whole, abs=1e-6)
    assert len(set(whole)) == 10
    for row, expected in zip(progress[1].curve, progress[0].curve, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


def test_gradients_of_uneven_parts_are_those_of_the_whole_batch():
    model, _ = gpt()
    dataset, classifier = gpt_dataset(reviews(7)), Classifier(model, train_gpt.read_last, CPU)
    calc_loss_batch(dataset.batch(range(7)), classifier).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    calc_gradients(dataset, torch.arange(7), classifier, accumulate=3)
    assert seen == [3, 2, 2]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_draws_nothing_and_puts_the_mode_back(training):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["distilbert"]).train(training)
    frame = reviews(20)
    dataset = encoder_dataset(frame)
    classifier = Classifier(model, train_bert_hf.read_logits, CPU)
    state = torch.get_rng_state()
    first, second = predict(dataset, classifier), predict(dataset, classifier)
    assert torch.equal(first, second)  # dropout was off
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


class FirstToken(nn.Module):
    """Says "positive" with a logit equal to the review's first token, "negative" with 5."""

    def forward(self, input_ids):
        first = input_ids[:, 0].float()
        return torch.stack([torch.full_like(first, 5.0), first], dim=1)


def first_token_classifier():
    return Classifier(FirstToken(), lambda model, batch: model(batch.input_ids), CPU)


def test_loss_and_accuracy_by_hand():
    dataset = IMDbDataset(flatten([[9], [4, 1], [5 + 1, 1, 1], [2]], [1, 0, 0, 1]), pad_token_id=0)
    classifier = first_token_classifier()
    assert predict(dataset, classifier).tolist() == [[5, 9], [5, 4], [5, 6], [5, 2]]  # in the dataset's order
    assert calc_accuracy_loader(dataset, classifier) == 0.5
    # -log of the softmax at the label: the other logit exceeds it by -4, -1, 1 and 3.
    expected = sum(math.log1p(math.exp(excess)) for excess in (-4, -1, 1, 3)) / 4
    assert calc_loss_loader(dataset, classifier) == pytest.approx(expected)
    assert calc_loss_batch(dataset.batch([0, 1, 2, 3]), classifier).item() == pytest.approx(expected)
    assert evaluate_model(classifier, dataset, dataset.first(1)) == pytest.approx(
        (expected, math.log1p(math.exp(-4))), rel=1e-5)


def test_evaluation_covers_every_review_whatever_the_batches(monkeypatch):
    dataset = IMDbDataset(flatten([[i % 7] * (i % 5 + 1) for i in range(103)], [0] * 103), pad_token_id=0)
    whole = predict(dataset, first_token_classifier())
    monkeypatch.setitem(EVALUATION_TOKENS, "cpu", 11)
    assert torch.equal(predict(dataset, first_token_classifier()), whole)
    assert whole[:, 1].tolist() == [i % 7 for i in range(103)]


@pytest.mark.parametrize(("max_steps", "updates", "epochs"), [(1, 1, 1), (5, 5, 1), (6, 6, 1), (9, 9, 2), (99, 12, 2)])
def test_max_steps_is_exact(max_steps, updates, epochs):
    model, layers = gpt()
    classifier = Classifier(model, train_gpt.read_last, CPU)
    optimizer = build_optimizer("adamw", model, 1e-3)
    calls = []
    step = optimizer.step
    optimizer.step = lambda: (calls.append(1), step())
    dataset = gpt_dataset(reviews(50))
    progress = train_classifier_simple(classifier, optimizer, dataset, dataset, num_epochs=2, batch_size=8,
                                       max_steps=max_steps)
    assert (len(calls), progress.step, len(progress.losses), len(progress.epochs)) == (
        updates, updates, updates, epochs)


def test_the_published_console_format(capsys):
    model, layers = gpt()
    train(model, layers.head, train_gpt.read_last, gpt_dataset(reviews(50)), eval_freq=5)
    lines = capsys.readouterr().out.splitlines()
    patterns = [r"Ep 1 \(Step 000000\)", r"Ep 1 \(Step 000005\)", "accuracy", r"Ep 2 \(Step 000010\)", "accuracy"]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        full = (r"Training accuracy: \d+\.\d\d% \| Validation accuracy: \d+\.\d\d%" if pattern == "accuracy"
                else pattern + r": Train loss \d+\.\d{3}, Val loss \d+\.\d{3}")
        assert re.fullmatch(full, line), line


@pytest.mark.parametrize(("broken", "named"), [(0, 0), (3, 3), (7, 7), (9, 9)])
def test_a_loss_that_is_no_number_is_noticed_at_the_next_log_line(broken, named, capsys):
    model, layers = gpt()
    calls = []

    def read(model, batch):
        if model.training:
            calls.append(1)
        return train_gpt.read_last(model, batch) * (float("nan") if len(calls) == broken + 1 else 1)
    with pytest.raises(UserError, match=f"the training loss is nan at step {named}; try " + (
            "--precision fp32, or another model: no weight has changed yet$" if named == 0 else "a smaller --learn")):
        train(model, layers.head, read, gpt_dataset(reviews(40)), eval_freq=3)
    assert "nan" not in capsys.readouterr().out


def test_a_log_line_looks_at_eval_iter_batches_of_each_set():
    model, layers = gpt()
    dataset, validation = gpt_dataset(reviews(50)), gpt_dataset(reviews(40, seed=1))
    progress = train(model, layers.head, train_gpt.read_last, dataset, validation, eval_iter=2, num_epochs=1)
    classifier = Classifier(model, train_gpt.read_last, CPU)
    assert progress.epochs[0]["train_accuracy"] == calc_accuracy_loader(dataset.first(16), classifier)
    assert progress.epochs[0]["validation_accuracy"] == calc_accuracy_loader(validation.first(16), classifier)


def test_distilberts_head_is_one_that_is_used():
    """With the last layer alone learning, the loss falls and nothing else changes."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["distilbert"])
    layers = train_bert_hf.output_layers("distilbert", model)
    set_trainable(model, "last_layer", layers)
    before = copy.deepcopy(model.state_dict())
    frame = reviews(80)
    frame["label"] = 1  # which even a head on random features can learn
    dataset = encoder_dataset(frame)
    progress = train(model, layers.head, train_bert_hf.read_logits, dataset, num_epochs=10)
    assert progress.curve[-1]["train_loss"] < 0.9 * progress.curve[0]["train_loss"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_the_losses_fall():
    model, layers = gpt()
    progress = train(model, layers.head, train_gpt.average_real, gpt_dataset(reviews(200)), num_epochs=8)
    assert progress.curve[-1]["train_loss"] < 0.9 * progress.curve[0]["train_loss"]


class Small(nn.Module):
    """FirstToken, for which a batch of more than `capacity` tokens is too much; checks that what failed was freed."""

    def __init__(self, capacity, error=None):
        super().__init__()
        self.capacity, self.held, self.batches = capacity, None, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, input_ids):
        assert self.held is None or self.held() is None, "what failed is still there"
        activations = input_ids.float()
        self.batches.append((input_ids.numel(), input_ids[:, 0].tolist()))
        if input_ids.numel() > self.capacity:
            self.held = weakref.ref(activations)
            raise self.error
        return FirstToken()(input_ids)


def small_classifier(*arguments, device=CPU):
    return Classifier(Small(*arguments), lambda model, batch: model(batch.input_ids), device)


@pytest.mark.parametrize("error", [None, RuntimeError("MPS backend out of memory"), MemoryError()])
def test_evaluation_halves_its_batches_until_they_fit(error, monkeypatch, capsys):
    """32 reviews of 1 to 4 tokens: batches of 64 tokens, which do not fit, of 32, which do not, and of at most 16."""
    monkeypatch.setitem(EVALUATION_TOKENS, "cpu", 64)
    dataset = IMDbDataset(flatten([[i] * (i % 4 + 1) for i in range(32)], [0] * 32), pad_token_id=0)
    classifier = small_classifier(20, error)
    assert predict(dataset, classifier)[:, 1].tolist() == list(range(32))  # in order, none left out
    tried, done = [], []
    for tokens, reviews_of_batch in classifier.model.batches:
        (done if tokens <= 20 else tried).append((tokens, reviews_of_batch))
    assert [tokens for tokens, _ in tried] == [64, 32]
    assert sorted(review for _, part in done for review in part) == list(range(32))  # none computed twice
    assert capsys.readouterr().err.splitlines() == [
        "Out of memory with 16 reviews at once; evaluating 32 tokens at a time",
        "Out of memory with 8 reviews at once; evaluating 16 tokens at a time"]
    classifier.model.batches.clear()
    predict(dataset, classifier)  # the next evaluation knows
    assert max(tokens for tokens, _ in classifier.model.batches) == 16
    assert capsys.readouterr().err == ""


def test_what_is_computed_is_not_computed_again_when_memory_runs_out_later(monkeypatch):
    monkeypatch.setitem(EVALUATION_TOKENS, "cpu", 8)
    dataset = IMDbDataset(flatten([[i] for i in range(20)], [0] * 20), pad_token_id=0)
    classifier = small_classifier(8)

    def shrink(model, inputs):
        if len(model.batches) == 1:
            model.capacity = 4
    classifier.model.register_forward_pre_hook(shrink)
    assert predict(dataset, classifier)[:, 1].tolist() == list(range(20))
    assert [len(part) for _, part in classifier.model.batches] == [8, 8, 4, 4, 4]


def test_a_single_review_that_does_not_fit_is_an_error_of_the_users():
    dataset = IMDbDataset(flatten([[1] * 7, [2] * 9], [0, 0]), pad_token_id=0)
    classifier = small_classifier(8)
    with pytest.raises(UserError, match="out of memory for a single review of 9 tokens on cpu"):
        predict(dataset, classifier)
    assert [tokens for tokens, _ in classifier.model.batches] == [18, 9]


def test_other_errors_of_an_evaluation_are_not_tried_again():
    dataset = IMDbDataset(flatten([[1] * 7, [2] * 9], [0, 0]), pad_token_id=0)
    classifier = small_classifier(8, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="assert"):
        predict(dataset, classifier)
    assert len(classifier.model.batches) == 1


def test_unused_parameters_are_found_without_a_trace():
    model, _ = gpt()
    dataset = gpt_dataset(reviews(4))
    classifier = Classifier(model.train(), train_gpt.read_last, CPU)
    state = torch.get_rng_state()
    assert not has_unused_parameters(classifier, dataset.batch([0]))
    model.unused = nn.Parameter(torch.ones(2))
    assert has_unused_parameters(classifier, dataset.batch([0]))
    model.unused.requires_grad_(False)
    assert not has_unused_parameters(classifier, dataset.batch([0]))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
