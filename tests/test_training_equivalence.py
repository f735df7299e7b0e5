"""Training gives the losses of the reference loop, the published protocol in plain PyTorch."""

import copy

import pytest
import torch
from helpers import make_reviews
from tiny_models import (
    MAX_LENGTH,
    TINY_CONFIGS,
    encode_words,
    gpt_dataset,
    make_book_gpt,
    make_gpt_classifier,
    tiny_tokenizer,
    train_with_adamw,
)
from transformers import AutoModelForSequenceClassification

import train_bert_hf
import train_gpt
from benchmarks import reference
from finetuning.data.batching import IMDbDataset
from finetuning.data.tokenization import concatenate
from finetuning.trainable_layers import set_trainable


@pytest.mark.parametrize("mode", ["all", "last_block", "last_layer"])
@pytest.mark.parametrize(
    ("position", "pooling"),
    [
        ("last", train_gpt.POOLING["last", False]),
        ("first", train_gpt.POOLING["first", False]),
        ("average", train_gpt.POOLING["last", True]),
    ],
)
def test_gpt_losses_equal_those_of_the_reference_loop(mode, position, pooling):
    """Within 1e-5 at each step of two epochs, which drop the last, partial batch."""
    frame = make_reviews(52)
    model, layers = make_gpt_classifier()
    set_trainable(model, mode, layers)
    reference_model, reference_layers = make_book_gpt()
    set_trainable(reference_model, mode, reference_layers)
    reference.use_eager_ops(reference_model)
    expected, _ = reference.train(
        reference_model,
        reference.gpt_logits(position),
        reference.ReferenceDataset(frame, encode_words, MAX_LENGTH, pad_token_id=0),
        num_epochs=2,
        learning_rate=1e-3,
    )
    state = train_with_adamw(model, pooling, gpt_dataset(frame), eval_freq=3, eval_iter=1)
    assert len(expected) == 12
    assert [loss.item() for loss in state.losses] == pytest.approx(expected, abs=1e-5)
    assert expected[0] != expected[-1]


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_encoder_losses_equal_those_of_the_reference_loop(name):
    """Padding to each batch's longest review changes nothing; dropout is off, as padding would change its draws."""
    config = copy.deepcopy(TINY_CONFIGS[name])
    for key in (
        "dropout",
        "attention_dropout",
        "seq_classif_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "embedding_dropout",
        "mlp_dropout",
        "classifier_dropout",
    ):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    torch.manual_seed(123)
    model = AutoModelForSequenceClassification.from_config(config)
    reference_model = copy.deepcopy(model)
    frame, tokenizer = make_reviews(40), tiny_tokenizer(config.pad_token_id)
    encode = train_bert_hf.make_tokenizer(tokenizer).encode
    expected, _ = reference.train(
        reference_model,
        reference.encoder_logits,
        reference.ReferenceDataset(frame, encode, MAX_LENGTH, tokenizer.pad_token_id),
        num_epochs=2,
        learning_rate=1e-3,
    )
    dataset = IMDbDataset(
        concatenate(encode(frame["text"].tolist(), MAX_LENGTH), frame["label"]),
        tokenizer.pad_token_id,
        use_attention_mask=True,
    )
    state = train_with_adamw(model, train_bert_hf.class_logits, dataset)
    assert [loss.item() for loss in state.losses] == pytest.approx(expected, abs=1e-5)
