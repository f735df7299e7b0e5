import pytest
import torch

import reproduce
import train_bert_hf
import train_gpt
from finetuning.parameter_counts import CONFIGS, count_parameters
from previous_chapters import GPTModel


def test_every_pretrained_model_of_an_experiment_can_be_counted():
    assert {row.hub_id for row in reproduce.EXPERIMENTS if row.hub_id} == CONFIGS.keys()
    assert {encoder.hub_id for encoder in train_bert_hf.MODELS.values()} < CONFIGS.keys()


@pytest.mark.parametrize(("hub_id", "millions"), [
    ("google-bert/bert-base-uncased", 109.5), ("distilbert/distilbert-base-uncased", 67.0),
    ("FacebookAI/roberta-large", 355.4), ("microsoft/deberta-v3-base", 184.4), ("answerdotai/ModernBERT-base", 149.6),
    ("answerdotai/ModernBERT-large", 395.8)])
def test_the_counts_are_those_of_the_published_checkpoints(hub_id, millions):
    assert round(count_parameters(hub_id) / 1e6, 1) == millions


def test_gpt2_is_the_books_model_but_for_the_bias_of_the_output_layer():
    with torch.device("meta"):
        model = GPTModel(train_gpt.BASE_CONFIG | train_gpt.MODEL_CONFIGS["gpt2-small (124M)"])
        train_gpt.replace_head(model, seed=123)
    assert sum(weight.numel() for weight in model.parameters()) - count_parameters("openai-community/gpt2") == 2


def test_minilm_has_the_parameters_that_its_record_counted():
    assert count_parameters("sentence-transformers/all-MiniLM-L6-v2") == 22_713_986
