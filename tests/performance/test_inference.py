import signal

import pytest
import torch
from helpers import make_reviews
from tiny_models import CPU, TINY_CONFIGS, encoder_dataset, first_token_classifier, limited_memory_classifier
from transformers import AutoModelForSequenceClassification

import train_bert_hf
from finetuning.data.batching import IMDbDataset
from finetuning.data.tokenization import concatenate
from finetuning.performance import distributed
from finetuning.performance.inference import EVAL_TOKENS_PER_BATCH, Classifier, has_enough_padding, predict_logits
from finetuning.system.errors import UserError
from finetuning.system.signals import defer_interrupts


@pytest.mark.parametrize("training", [True, False])
def test_predict_logits_restores_training_mode_and_keeps_rng_state(training):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY_CONFIGS["distilbert"]).train(training)
    frame = make_reviews(20)
    dataset = encoder_dataset(frame)
    classifier = Classifier(model, train_bert_hf.class_logits, CPU)
    state = torch.get_rng_state()
    first, second = predict_logits(dataset, classifier), predict_logits(dataset, classifier)
    assert torch.equal(first, second)  # dropout was off
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_predict_logits_does_not_depend_on_the_batches(monkeypatch):
    dataset = IMDbDataset(concatenate([[i % 7] * (i % 5 + 1) for i in range(103)], [0] * 103), pad_token_id=0)
    whole = predict_logits(dataset, first_token_classifier())
    monkeypatch.setitem(EVAL_TOKENS_PER_BATCH, "cpu", 11)
    assert torch.equal(predict_logits(dataset, first_token_classifier()), whole)
    assert whole[:, 1].tolist() == [i % 7 for i in range(103)]


def test_compiled_model_sees_one_batch_size_for_each_length(monkeypatch):
    monkeypatch.setattr("finetuning.performance.inference.is_compiled", lambda model: True)
    monkeypatch.setitem(EVAL_TOKENS_PER_BATCH, "cpu", 13)
    tokens = concatenate([[i] * (i % 4 + 1) for i in range(14)], [0] * 14)  # 6 of 3 or 4 tokens, 8 of 1 or 2
    classifier = limited_memory_classifier(13)
    logits = predict_logits(IMDbDataset(tokens, pad_token_id=0, pad_to=(2, 4)), classifier)
    assert logits[:, 1].tolist() == list(range(14))
    # Batches of 3 and 3 long reviews, then of 6 short ones and of 2 that are repeated.
    assert [batch for _, batch in classifier.model.batches] == [
        [2, 3, 6],
        [7, 10, 11],
        [0, 1, 4, 5, 8, 9],
        [12, 13, 12, 13, 12, 13],
    ]
    assert [count for count, _ in classifier.model.batches] == [12] * 4


@pytest.mark.parametrize("error", [None, RuntimeError("MPS backend out of memory"), MemoryError()])
def test_predict_logits_halves_batches_until_they_fit(error, monkeypatch, capsys):
    """32 reviews of 1 to 4 tokens, memory for 20 tokens: batches of 64 and 32 tokens fail, those of 16 fit."""
    monkeypatch.setitem(EVAL_TOKENS_PER_BATCH, "cpu", 64)
    dataset = IMDbDataset(concatenate([[i] * (i % 4 + 1) for i in range(32)], [0] * 32), pad_token_id=0)
    classifier = limited_memory_classifier(20, error)
    assert predict_logits(dataset, classifier)[:, 1].tolist() == list(range(32))  # in order and complete
    failed, succeeded = [], []
    for tokens, reviews_of_batch in classifier.model.batches:
        (succeeded if tokens <= 20 else failed).append((tokens, reviews_of_batch))
    assert [tokens for tokens, _ in failed] == [64, 32]
    assert sorted(review for _, batch in succeeded for review in batch) == list(range(32))  # none computed twice
    assert capsys.readouterr().err.splitlines() == [
        "Out of memory with 16 reviews per batch; evaluating 32 tokens at a time",
        "Out of memory with 8 reviews per batch; evaluating 16 tokens at a time",
    ]
    classifier.model.batches.clear()
    predict_logits(dataset, classifier)  # the next evaluation starts with that size
    assert max(tokens for tokens, _ in classifier.model.batches) == 16
    assert capsys.readouterr().err == ""


def test_predict_logits_keeps_results_when_memory_runs_out_later(monkeypatch):
    monkeypatch.setitem(EVAL_TOKENS_PER_BATCH, "cpu", 8)
    dataset = IMDbDataset(concatenate([[i] for i in range(20)], [0] * 20), pad_token_id=0)
    classifier = limited_memory_classifier(8)

    def shrink(model, inputs):
        if len(model.batches) == 1:
            model.capacity = 4

    classifier.model.register_forward_pre_hook(shrink)
    assert predict_logits(dataset, classifier)[:, 1].tolist() == list(range(20))
    assert [len(batch) for _, batch in classifier.model.batches] == [8, 8, 4, 4, 4]


def test_predict_logits_raises_user_error_if_a_single_review_does_not_fit():
    dataset = IMDbDataset(concatenate([[1] * 7, [2] * 9], [0, 0]), pad_token_id=0)
    classifier = limited_memory_classifier(8)
    with pytest.raises(UserError, match="out of memory for a single review of 9 tokens on cpu"):
        predict_logits(dataset, classifier)
    assert [tokens for tokens, _ in classifier.model.batches] == [18, 9]


def test_predict_logits_does_not_retry_other_errors():
    dataset = IMDbDataset(concatenate([[1] * 7, [2] * 9], [0, 0]), pad_token_id=0)
    classifier = limited_memory_classifier(8, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="assert"):
        predict_logits(dataset, classifier)
    assert len(classifier.model.batches) == 1


def test_padding_is_skipped_from_a_twentieth_of_the_tokens_on():
    mask = torch.ones(2, 10, dtype=torch.int64)
    assert not has_enough_padding(mask)
    mask[1, 9] = 0  # 1 of 20 tokens
    assert has_enough_padding(mask)
    mask = torch.cat([mask, torch.ones(1, 10, dtype=torch.int64)])  # 1 of 30
    assert not has_enough_padding(mask)


def test_only_the_main_process_stops_an_evaluation(monkeypatch):
    """It saves the checkpoint, and an error of another process would keep it from that."""
    dataset = IMDbDataset(concatenate([[1], [2]], [0, 1]), pad_token_id=0)
    finished = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        for is_main_process in (False, True):
            monkeypatch.setattr(distributed, "is_main_process", lambda value=is_main_process: value)
            predict_logits(dataset, first_token_classifier())
            finished.append(is_main_process)
    assert finished == [False]
