import pytest
import torch

import train_bert_hf
import train_gpt
from finetuning.reporting.experiments import EXPERIMENTS
from finetuning.reporting.parameter_counts import CONFIGS, count_parameters
from previous_chapters import GPTModel


def test_configs_have_every_pretrained_model_of_the_experiments():
    assert {experiment.hub_id for experiment in EXPERIMENTS if experiment.hub_id} == CONFIGS.keys()
    assert {encoder.hub_id for encoder in train_bert_hf.MODELS.values()} < CONFIGS.keys()


@pytest.mark.parametrize(
    ("hub_id", "millions"),
    [
        ("google-bert/bert-base-uncased", 109.5),
        ("distilbert/distilbert-base-uncased", 67.0),
        ("FacebookAI/roberta-large", 355.4),
        ("microsoft/deberta-v3-base", 184.4),
        ("answerdotai/ModernBERT-base", 149.6),
        ("answerdotai/ModernBERT-large", 395.8),
    ],
)
def test_count_parameters_matches_the_published_checkpoints(hub_id, millions):
    assert round(count_parameters(hub_id) / 1e6, 1) == millions


def test_gpt2_count_differs_from_the_books_model_by_the_bias_of_the_head():
    with torch.device("meta"):
        model = GPTModel(train_gpt.BASE_CONFIG | train_gpt.MODEL_CONFIGS["gpt2-small (124M)"])
        train_gpt.replace_head(model, seed=123)
    assert sum(weight.numel() for weight in model.parameters()) - count_parameters("openai-community/gpt2") == 2


def test_minilm_count_matches_its_record():
    assert count_parameters("sentence-transformers/all-MiniLM-L6-v2") == 22_713_986
