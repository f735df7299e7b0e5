import copy
from argparse import Namespace

import pytest
import torch
from helpers import make_reviews
from tiny_models import CPU, TINY_CONFIGS, encoder_dataset, gpt_dataset, make_gpt_classifier
from transformers import AutoModelForSequenceClassification

import train_bert_hf
import train_gpt
from finetuning.optimizers import build_optimizers
from finetuning.performance import frozen_cache
from finetuning.performance.frozen_cache import (
    cache_frozen_outputs,
    cache_hidden_states,
    extract_features,
    fits_in_memory,
    is_deterministic,
)
from finetuning.performance.inference import Classifier, predict_logits
from finetuning.reporting import records
from finetuning.trainable_layers import set_trainable
from finetuning.training import TrainConfig, train_classifier


def training_losses(classifier, dataset):
    """Train in float32 for three epochs; return the loss of each step."""
    torch.manual_seed(123)
    optimizers = build_optimizers("adamw", classifier.model, learning_rate=1e-2)
    config = TrainConfig(num_epochs=3, batch_size=8)
    state = train_classifier(classifier, optimizers, dataset, dataset, config)
    return [float(loss) for loss in state.losses]


@pytest.mark.parametrize("pooling", [*train_gpt.POOLING.values()])
def test_gpt_head_trains_equally_from_features(pooling):
    model, layers = make_gpt_classifier()
    set_trainable(model, "last_layer", layers)
    assert_trains_equally(model, layers.head, pooling, gpt_dataset(make_reviews(50)))


def test_modernbert_head_trains_equally_from_features():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["modernbert-base"])
    layers = train_bert_hf.MODELS["modernbert-base"].finetune_layers(model)
    set_trainable(model, "last_layer", layers)
    assert_trains_equally(model, layers.head, train_bert_hf.class_logits, encoder_dataset(make_reviews(50)))


def assert_trains_equally(model, head, pooling, dataset):
    """Compare training the head alone on features with training it in a copy of the model."""
    classifier = Classifier(model, pooling, CPU)
    assert is_deterministic(classifier, dataset)
    before = {name: id(module) for name, module in model.named_modules()}
    expected = training_losses(Classifier(copy.deepcopy(model), pooling, CPU), dataset)
    head_only, (features,) = extract_features(classifier, head, dataset)
    torch.testing.assert_close(predict_logits(features, head_only), predict_logits(dataset, classifier))
    assert training_losses(head_only, features) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(expected)
    assert {name: id(module) for name, module in model.named_modules()} == before  # the head is restored


@pytest.mark.parametrize("name", ["distilbert", "bert", "roberta", "deberta-v3-base"])
def test_encoder_with_dropout_is_not_deterministic(name):
    """Dropout in the frozen layers is part of the published training."""
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name]).eval()
    state = torch.get_rng_state()
    assert not is_deterministic(Classifier(model, train_bert_hf.class_logits, CPU), encoder_dataset(make_reviews(4)))
    assert not model.training
    torch.set_rng_state(state)


def cache_three(args, classifier, head, dataset):
    """Call `cache_frozen_outputs` with one dataset as training, validation and test set."""
    return cache_frozen_outputs(args, classifier, head, dataset, dataset, dataset)


TWO_EPOCHS = Namespace(trainable_layers="last_block", num_epochs=2, eval_iter=2, batch_size=8)


@pytest.mark.parametrize("pooling", [*train_gpt.POOLING.values()])
def test_gpt_last_block_trains_equally_from_hidden_states(pooling, monkeypatch):
    dataset = gpt_dataset(make_reviews(50))
    if pooling in (train_gpt.last_non_padding_logits, train_gpt.masked_mean_logits):
        dataset.pad_to = None
    runs = []
    for free in (0, 10**9):
        monkeypatch.setattr(frozen_cache, "available_memory", lambda free=free: free)
        model, layers = make_gpt_classifier()
        set_trainable(model, "last_block", layers)
        classifier, (states, *_) = cache_three(TWO_EPOCHS, Classifier(model, pooling, CPU), layers.head, dataset)
        assert (states is dataset) == (free == 0)
        runs.append(training_losses(classifier, states))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert len(set(runs[0])) == len(runs[0])


@pytest.mark.parametrize("pooling", [*train_gpt.POOLING.values()])
def test_single_epoch_caches_hidden_states_for_the_log_lines_only(pooling, monkeypatch):
    """The first 16 reviews of both sets are cached; the logged losses are equal and skip the first block."""
    monkeypatch.setattr(frozen_cache, "available_memory", lambda: 10**9)
    curves, runs_first_block = [], []
    for trainable in ("last_block", "all"):  # "all" caches nothing
        model, layers = make_gpt_classifier()
        set_trainable(model, "last_block", layers)
        classifier = Classifier(model, pooling, CPU)
        args = Namespace(trainable_layers=trainable, num_epochs=1, eval_iter=2, batch_size=8)
        datasets = [gpt_dataset(make_reviews(50, seed)) for seed in range(2)]
        if pooling in (train_gpt.last_non_padding_logits, train_gpt.masked_mean_logits):
            for dataset in datasets:
                dataset.pad_to = None
        _, (train, validation) = cache_frozen_outputs(args, classifier, layers.head, *datasets)
        assert train.token_ids.ndim == validation.token_ids.ndim == 1
        assert train.head(16).token_ids.ndim == (2 if trainable == "last_block" else 1)
        assert train.head(17).token_ids.ndim == 1
        torch.manual_seed(123)
        optimizers = build_optimizers("adamw", model, learning_rate=1e-2)
        config = TrainConfig(num_epochs=1, batch_size=8, eval_freq=1, eval_iter=2)
        state = train_classifier(classifier, optimizers, train, validation, config)
        curves.append([point["validation_loss"] for point in state.eval_history])
        calls = []
        model.trf_blocks[0].ff.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        predict_logits(train.head(16), classifier)
        runs_first_block.append(len(calls) > 0)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert len(set(curves[0])) == 6
    assert runs_first_block == [False, True]


def test_cache_hidden_states_retries_in_smaller_batches(capsys):
    """1,200 tokens need too much memory; the states equal those computed without that limit."""
    dataset, states = gpt_dataset(make_reviews(50)), []
    for capacity in (10**9, 300):
        model, _ = make_gpt_classifier()
        embed, sizes = model.tok_emb.forward, []

        def forward(ids, capacity=capacity, embed=embed, sizes=sizes):
            sizes.append(ids.numel())
            if ids.numel() > capacity:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return embed(ids)

        model.tok_emb.forward = forward
        states.append(cache_hidden_states(Classifier(model, train_gpt.last_token_logits, CPU), dataset).token_ids)
    assert sizes[:3] == [1200, 600, 300 - 300 % 24]
    torch.testing.assert_close(torch.from_numpy(states[1]), torch.from_numpy(states[0]))
    assert capsys.readouterr().err.count("Out of memory") == 2


def test_fits_in_memory_divides_memory_among_local_processes(monkeypatch):
    model, _ = make_gpt_classifier()
    dataset = gpt_dataset(make_reviews(50))
    size = 50 * dataset.pad_to * model.tok_emb.embedding_dim * 4
    monkeypatch.setattr("finetuning.performance.distributed.world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, fits in ((4 * size, False), (4 * size + 4, True)):
        monkeypatch.setattr(frozen_cache, "available_memory", lambda free=free: free)
        assert fits_in_memory(model, [dataset]) == fits


def test_fits_in_memory_counts_fixed_padding_and_allows_half_of_the_memory(monkeypatch):
    model, _ = make_gpt_classifier()
    width = model.tok_emb.embedding_dim
    dataset = gpt_dataset(make_reviews(50))
    sizes = [50 * dataset.pad_to * width * 4, int(dataset.lengths.sum()) * width * 4]
    for pad_to, size in zip((dataset.pad_to, None), sizes, strict=True):
        dataset.pad_to = pad_to
        for free, fits in ((4 * size, False), (4 * size + 2, True)):
            monkeypatch.setattr(frozen_cache, "available_memory", lambda free=free: free)
            assert fits_in_memory(model, [dataset, dataset]) == fits


def test_nothing_is_cached_if_all_layers_are_trained(monkeypatch):
    monkeypatch.setattr(frozen_cache, "available_memory", lambda: 10**9)
    model, layers = make_gpt_classifier()
    dataset = gpt_dataset(make_reviews(10))
    settings = Namespace(trainable_layers="all", num_epochs=2)
    _, datasets = cache_three(settings, Classifier(model, train_gpt.last_token_logits, CPU), layers.head, dataset)
    assert all(each is dataset for each in datasets)


@pytest.mark.parametrize("trainable_layers", ["last_layer", "last_block"])
def test_nothing_is_cached_below_dropout(trainable_layers, monkeypatch):
    monkeypatch.setattr(frozen_cache, "available_memory", lambda: 10**9)
    model, layers = make_gpt_classifier()
    dataset, classifier = gpt_dataset(make_reviews(10)), Classifier(model, train_gpt.last_token_logits, CPU)
    settings = Namespace(trainable_layers=trainable_layers, num_epochs=2, eval_iter=1, batch_size=4)
    model.drop_emb.p = 0.1
    same_classifier, datasets = cache_three(settings, classifier, layers.head, dataset)
    assert same_classifier is classifier
    assert all(each is dataset for each in datasets)
    model.drop_emb.p = 0.0
    _, datasets = cache_three(settings, classifier, layers.head, dataset)
    assert not any(each is dataset for each in datasets)


def test_train_gpt_extracts_features_for_last_layer_only(tiny_gpt, data_dir, tmp_path, monkeypatch, capsys):
    calls = []
    for mode in ("last_layer", "last_block"):
        command = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", mode]
        command += ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / mode), "--context_length", "16"]
        monkeypatch.setattr(
            frozen_cache,
            "extract_features",
            lambda *arguments, mode=mode: (calls.append(mode), extract_features(*arguments))[1],
        )
        train_gpt.main(command)
    assert calls == ["last_layer"]
    assert records.read_record(tmp_path / "last_layer")["parameters"]["trainable"] == 8 * 2 + 2


def test_head_of_several_layers_is_trained_without_cache():
    """RoBERTa's head, which selects a token itself; without dropout, which would also prevent caching."""
    config = copy.deepcopy(TINY_CONFIGS["roberta"])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    layers = train_bert_hf.MODELS["roberta"].finetune_layers(model)
    set_trainable(model, "last_layer", layers)
    dataset = encoder_dataset(make_reviews(120))  # more than one evaluation batch
    expected = training_losses(Classifier(copy.deepcopy(model), train_bert_hf.class_logits, CPU), dataset)
    before = copy.deepcopy(model.state_dict())
    settings = Namespace(trainable_layers="last_layer", num_epochs=3, eval_iter=2, batch_size=8)
    classifier = Classifier(model, train_bert_hf.class_logits, CPU)
    classifier, (data, *_) = cache_three(settings, classifier, layers.head, dataset)
    assert is_deterministic(classifier, data)
    assert training_losses(classifier, data) == pytest.approx(expected, abs=1e-6)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
