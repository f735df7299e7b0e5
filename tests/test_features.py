import copy
from argparse import Namespace

import pytest
import torch
from conftest import TINY_CONFIGS, reviews
from test_loop import CPU, encoder_dataset, gpt, gpt_dataset
from transformers import AutoModelForSequenceClassification

import train_bert_hf
import train_gpt
from finetuning import features, records
from finetuning.features import compute_once, fit_in_memory, freeze_features, freeze_hidden_states, is_fixed
from finetuning.layers import set_trainable
from finetuning.loop import Classifier, predict, train_classifier_simple
from finetuning.optimizers import build_optimizer


def losses(classifier, head, dataset):
    torch.manual_seed(123)
    optimizer = build_optimizer("adamw", classifier.model, learning_rate=1e-2)
    progress = train_classifier_simple(classifier, optimizer, dataset, dataset, num_epochs=3, batch_size=8)
    return [float(loss) for loss in progress.losses]


@pytest.mark.parametrize("read_logits", [*train_gpt.TOKEN_POSITIONS.values(), *train_gpt.AVERAGES.values()])
def test_a_gpts_last_layer_learns_the_same_from_features(read_logits):
    model, layers = gpt()
    set_trainable(model, "last_layer", layers)
    check(model, layers.head, read_logits, gpt_dataset(reviews(50)))


def test_a_modernberts_last_layer_learns_the_same_from_features():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["modernbert-base"])
    layers = train_bert_hf.output_layers("modernbert-base", model)
    set_trainable(model, "last_layer", layers)
    check(model, layers.head, train_bert_hf.read_logits, encoder_dataset(reviews(50)))


def check(model, head, read_logits, dataset):
    classifier = Classifier(model, read_logits, CPU)
    assert is_fixed(classifier, dataset)
    before = {name: id(module) for name, module in model.named_modules()}
    whole = copy.deepcopy(model)
    head_of_whole = dict(whole.named_modules())[next(name for name, m in model.named_modules() if m is head)]
    expected = losses(Classifier(whole, read_logits, CPU), head_of_whole, dataset)
    alone, (vectors,) = freeze_features(classifier, head, dataset)
    torch.testing.assert_close(predict(vectors, alone), predict(dataset, classifier))
    assert losses(alone, head, vectors) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(expected)
    assert {name: id(module) for name, module in model.named_modules()} == before  # the head is back in its place


@pytest.mark.parametrize("name", ["distilbert", "bert", "roberta", "deberta-v3-base"])
def test_dropout_makes_features_vary(name):
    """Their frozen layers drop out at random, which is part of the published training."""
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS[name]).eval()
    state = torch.get_rng_state()
    assert not is_fixed(Classifier(model, train_bert_hf.read_logits, CPU), encoder_dataset(reviews(4)))
    assert not model.training
    torch.set_rng_state(state)


TWO_EPOCHS = Namespace(trainable_layers="last_block", num_epochs=2, eval_iter=2, batch_size=8)


@pytest.mark.parametrize("read_logits", [*train_gpt.TOKEN_POSITIONS.values(), *train_gpt.AVERAGES.values()])
def test_a_gpts_last_block_learns_the_same_from_hidden_states(read_logits, monkeypatch):
    dataset = gpt_dataset(reviews(50))
    if read_logits in (train_gpt.read_last_real, train_gpt.average_real):
        dataset.pad_to = None
    runs = []
    for free in (0, 10**9):
        monkeypatch.setattr(features, "available_memory", lambda free=free: free)
        model, layers = gpt()
        set_trainable(model, "last_block", layers)
        classifier, (states,) = compute_once(TWO_EPOCHS, Classifier(model, read_logits, CPU), layers.head, dataset)
        assert (states is dataset) == (free == 0)
        runs.append(losses(classifier, layers.head, states))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert len(set(runs[0])) == len(runs[0])


@pytest.mark.parametrize("read_logits", [*train_gpt.TOKEN_POSITIONS.values(), *train_gpt.AVERAGES.values()])
def test_in_one_epoch_the_log_lines_come_from_hidden_states(read_logits, monkeypatch):
    """2 x 16 of the reviews, which every log line evaluates; the losses are those without, and cost one block."""
    monkeypatch.setattr(features, "available_memory", lambda: 10**9)
    curves, blocks = [], []
    for trainable in ("last_block", "all"):  # the latter leaves the sets as they are
        model, layers = gpt()
        set_trainable(model, "last_block", layers)
        classifier = Classifier(model, read_logits, CPU)
        args = Namespace(trainable_layers=trainable, num_epochs=1, eval_iter=2, batch_size=8)
        datasets = [gpt_dataset(reviews(50, seed)) for seed in range(3)]
        if read_logits in (train_gpt.read_last_real, train_gpt.average_real):
            for dataset in datasets:
                dataset.pad_to = None
        _, (train, validation, test) = compute_once(args, classifier, layers.head, *datasets)
        assert train.token_ids.ndim == validation.token_ids.ndim == test.token_ids.ndim == 1
        assert train.first(16).token_ids.ndim == (2 if trainable == "last_block" else 1)
        assert train.first(17).token_ids.ndim == test.first(16).token_ids.ndim == 1
        torch.manual_seed(123)
        optimizer = build_optimizer("adamw", model, learning_rate=1e-2)
        progress = train_classifier_simple(classifier, optimizer, train, validation, num_epochs=1, batch_size=8,
                                           eval_freq=1, eval_iter=2)
        curves.append([point["validation_loss"] for point in progress.curve])
        calls = []
        model.trf_blocks[0].ff.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        predict(train.first(16), classifier)
        blocks.append(len(calls) > 0)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert len(set(curves[0])) == 6
    assert blocks == [False, True]


def test_hidden_states_are_computed_in_batches_that_fit(capsys):
    """1,200 tokens at once are too many; the states are those of the model without that limit."""
    dataset, states = gpt_dataset(reviews(50)), []
    for capacity in (10**9, 300):
        model, _ = gpt()
        embed, sizes = model.tok_emb.forward, []

        def forward(ids, capacity=capacity, embed=embed, sizes=sizes):
            sizes.append(ids.numel())
            if ids.numel() > capacity:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return embed(ids)
        model.tok_emb.forward = forward
        states.append(freeze_hidden_states(Classifier(model, train_gpt.read_last, CPU), dataset).token_ids)
    assert sizes[:3] == [1200, 600, 300 - 300 % 24]
    torch.testing.assert_close(torch.from_numpy(states[1]), torch.from_numpy(states[0]))
    assert capsys.readouterr().err.count("Out of memory") == 2


def test_processes_share_the_memory_of_their_machine(monkeypatch):
    model, _ = gpt()
    dataset = gpt_dataset(reviews(50))
    size = 50 * dataset.pad_to * model.tok_emb.embedding_dim * 4
    monkeypatch.setattr("finetuning.distributed.size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, fits in ((4 * size, False), (4 * size + 4, True)):
        monkeypatch.setattr(features, "available_memory", lambda free=free: free)
        assert fit_in_memory(model, [dataset]) == fits


def test_hidden_states_need_memory_for_all_that_is_read(monkeypatch):
    """Of the free memory half may be taken."""
    model, _ = gpt()
    width = model.tok_emb.embedding_dim
    dataset = gpt_dataset(reviews(50))
    sizes = [50 * dataset.pad_to * width * 4, int(dataset.lengths.sum()) * width * 4]
    for pad_to, size in zip((dataset.pad_to, None), sizes, strict=True):
        dataset.pad_to = pad_to
        for free, fits in ((4 * size, False), (4 * size + 2, True)):
            monkeypatch.setattr(features, "available_memory", lambda free=free: free)
            assert fit_in_memory(model, [dataset, dataset]) == fits


def test_where_all_layers_learn_nothing_is_computed_beforehand(monkeypatch):
    monkeypatch.setattr(features, "available_memory", lambda: 10**9)
    model, layers = gpt()
    dataset = gpt_dataset(reviews(10))
    settings = Namespace(trainable_layers="all", num_epochs=2)
    _, (same,) = compute_once(settings, Classifier(model, train_gpt.read_last, CPU), layers.head, dataset)
    assert same is dataset


def test_train_gpt_uses_it_for_the_last_layer_alone(tiny_gpt, data_dir, tmp_path, monkeypatch, capsys):
    calls = []
    for mode in ("last_layer", "last_block"):
        command = ["--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", mode, "--data_dir",
                   str(data_dir), "--output_dir", str(tmp_path / mode), "--context_length", "16"]
        monkeypatch.setattr(features, "freeze_features",
                            lambda *arguments, mode=mode: (calls.append(mode), freeze_features(*arguments))[1])
        train_gpt.main(command)
    assert calls == ["last_layer"]
    assert records.read_record(tmp_path / "last_layer")["parameters"]["trainable"] == 8 * 2 + 2


def test_a_head_of_several_layers_trains_as_it_is():
    """RoBERTa's head, which reads one vector of all that it is given, with no dropout that would forbid to cache."""
    config = copy.deepcopy(TINY_CONFIGS["roberta"])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    layers = train_bert_hf.output_layers("roberta", model)
    set_trainable(model, "last_layer", layers)
    dataset = encoder_dataset(reviews(120))  # more than one batch of evaluation
    expected = losses(Classifier(copy.deepcopy(model), train_bert_hf.read_logits, CPU), None, dataset)
    before = copy.deepcopy(model.state_dict())
    settings = Namespace(trainable_layers="last_layer", num_epochs=3, eval_iter=2, batch_size=8)
    classifier = Classifier(model, train_bert_hf.read_logits, CPU)
    classifier, (data,) = compute_once(settings, classifier, layers.head, dataset)
    assert is_fixed(classifier, data)
    assert losses(classifier, layers.head, data) == pytest.approx(expected, abs=1e-6)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
