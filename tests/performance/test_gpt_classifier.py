import pytest
import torch
from tiny_gpt import GPT_CONFIG

from finetuning.performance.gpt_classifier import GPTClassifier
from previous_chapters import GPTModel


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPTModel(GPT_CONFIG)


def gradients(model, logits):
    model.zero_grad()
    logits.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(classifier_logits, expected, gpt):
    """Compare logits and the gradients of all parameters, in float32 to 1e-5."""
    torch.testing.assert_close(classifier_logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(gpt, classifier_logits), gradients(gpt, expected), rtol=1e-4, atol=1e-5)


def test_gpt_classifier_shares_parameters_and_state_dict_with_the_book_model(gpt):
    classifier = GPTClassifier(gpt)
    assert [*classifier.state_dict()] == [*gpt.state_dict()]
    assert all(a is b for a, b in zip(classifier.parameters(), gpt.parameters(), strict=True))
    GPTModel(GPT_CONFIG).load_state_dict(classifier.state_dict())


def test_forward_equals_the_book_model(gpt):
    ids = torch.randint(50, (3, 10))
    assert_same(GPTClassifier(gpt)(ids), gpt(ids), gpt)


def test_forward_at_positions_equals_a_selection_of_the_book_models_logits(gpt):
    ids = torch.randint(50, (3, 10))
    positions = torch.tensor([[9, 2], [0, 1], [4, 4]])
    assert_same(GPTClassifier(gpt)(ids, positions), gpt(ids)[torch.arange(3)[:, None], positions], gpt)


@pytest.mark.parametrize("last_tokens_only", [False, True])
def test_forward_of_packed_texts_equals_the_book_model_on_each_text(gpt, last_tokens_only):
    texts = [torch.randint(50, (1, n)) for n in (5, 1, 9)]
    expected = torch.cat([gpt(text)[:, -1:] if last_tokens_only else gpt(text) for text in texts], dim=1)
    positions = torch.tensor([[4, 5, 14]]) if last_tokens_only else None
    assert_same(GPTClassifier(gpt)(torch.cat(texts, dim=1), positions, lengths=[5, 1, 9]), expected, gpt)


def test_forward_of_cached_hidden_states_equals_the_book_model(gpt):
    classifier, ids = GPTClassifier(gpt), torch.randint(50, (3, 10))
    hidden = classifier.hidden_states(ids)
    assert hidden.shape == (3, 10, 8)
    assert_same(classifier(hidden), gpt(ids), gpt)
    positions = torch.tensor([[9], [0], [4]])
    expected = gpt(ids)[torch.arange(3)[:, None], positions]
    assert_same(classifier(classifier.hidden_states(ids), positions), expected, gpt)


def test_forward_applies_dropout_in_training_mode_only():
    classifier = GPTClassifier(GPTModel({**GPT_CONFIG, "drop_rate": 0.5}))
    ids = torch.randint(50, (1, 10))
    assert not torch.equal(classifier(ids), classifier(ids))
    classifier.eval()
    assert torch.equal(classifier(ids), classifier(ids))
