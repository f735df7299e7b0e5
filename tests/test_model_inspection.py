import copy
import json

import pytest
import torch
from bad_inputs import BadInput, parameters
from tiny_models import TINY_CONFIGS, TINY_SIZES, tiny_tokenizer
from transformers import AlbertConfig, AutoModelForSequenceClassification, XLMConfig, XLMRobertaConfig

from finetuning.model_inspection import (
    check_context_length,
    detect_finetune_layers,
    max_sequence_length,
    report_unsupported_model,
)
from finetuning.system.errors import UserError
from finetuning.trainable_layers import count_parameters, set_trainable


def tiny_classifier(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        # One block that runs three times.
        AlbertConfig(**TINY_SIZES | {"embedding_size": 16, "num_hidden_layers": 3}),
        # No blocks: one list holds all attentions, another all norms.
        XLMConfig(vocab_size=20, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=16),
    ],
    ids=lambda config: config.model_type,
)
def test_detect_finetune_layers_without_a_last_block_allows_only_the_last_layer(config):
    model = tiny_classifier(config)
    layers = detect_finetune_layers("other", model, tiny_tokenizer())
    with pytest.raises(UserError, match="use --trainable_layers all or last_layer"):
        set_trainable(model, "last_block", layers)
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == 16 * 2 + 2


def test_detect_finetune_layers_takes_the_whole_classification_head():
    """XLM-RoBERTa's head has a dense layer, which is as new as the output layer."""
    model = tiny_classifier(XLMRobertaConfig(**TINY_SIZES, pad_token_id=1))
    layers = detect_finetune_layers("xlm-roberta", model, tiny_tokenizer(1))
    set_trainable(model, "last_layer", layers)
    assert count_parameters(model)[1] == (16 * 16 + 16) + (16 * 2 + 2)
    assert layers.pooler_and_norm == []


@pytest.mark.parametrize(
    ("name", "limit"),
    [("bert", 40), ("distilbert", 40), ("roberta", 38), ("deberta-v3-base", 40), ("modernbert-base", 40)],
)
def test_max_sequence_length_is_the_smallest_limit_of_model_and_tokenizer(name, limit):
    """RoBERTa's positions start after its padding index 1, so only 38 of 40 are usable."""
    config = TINY_CONFIGS[name]
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = tiny_tokenizer(config.pad_token_id)
    assert max_sequence_length(model, tokenizer) == limit
    model(input_ids=torch.full((1, limit), 7))
    tokenizer.model_max_length = 30
    assert max_sequence_length(model, tokenizer) == 30


def test_model_without_a_maximum_length_needs_a_number():
    model, tokenizer = tiny_classifier(copy.deepcopy(TINY_CONFIGS["bert"])), tiny_tokenizer(0)
    model.config.max_position_embeddings, tokenizer.model_max_length = 0, int(1e30)
    model.bert.embeddings.position_embeddings = None
    with pytest.raises(UserError, match="this model has no maximum; choose a number"):
        check_context_length("model_context_length", model, tokenizer)
    check_context_length("longest_training_example", model, tokenizer)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        UserError("an explanation"),
    ],
)
def test_report_unsupported_model_does_not_change_out_of_memory_and_user_errors(error):
    with pytest.raises(type(error)) as raised, report_unsupported_model("someone/model"):
        raise error
    assert raised.value is error


def test_report_unsupported_model_reports_any_other_error():
    with (
        pytest.raises(UserError, match="--model someone/model cannot classify reviews: KeyError: 'memory_size'"),
        report_unsupported_model("someone/model"),
    ):
        raise KeyError("memory_size")


def edit_json(path, **changes):
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CASES = [
    BadInput(
        "a tokenizer that allows less",
        "--context_length 30 is more than the 25 tokens this model's tokenizer allows",
        lambda folder: edit_json(folder / "model" / "tokenizer_config.json", model_max_length=25),
        ("--context_length", "30"),
    ),
    BadInput(
        "a tokenizer that allows less, and a model",
        "--context_length 41 is more than the 40 tokens this model can",
        lambda folder: edit_json(folder / "model" / "tokenizer_config.json", model_max_length=40),
        ("--context_length", "41"),
    ),
    BadInput(
        "a context length of the special tokens",
        "--context_length 2 leaves no room for the review: this model's tokenizer adds 2 special tokens",
        lambda folder: None,
        ("--context_length", "2"),
    ),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_too_long_context_ends_in_one_line_and_changes_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
