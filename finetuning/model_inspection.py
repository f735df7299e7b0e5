"""Properties of models of unknown architecture: maximum length, last layers and padding side."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.data.batching import Batch, IMDbDataset
from finetuning.data.hf_tokenizer import make_encode
from finetuning.data.reviews import NUM_CLASSES
from finetuning.data.tokenization import EncodedReviews, concatenate
from finetuning.system.errors import UserError, is_out_of_memory
from finetuning.trainable_layers import (
    FinetuneLayers,
    find_finetune_layers,
    find_output_layer,
    isolated_copy,
    modules_in_order,
)

NO_LIMIT = 2**30  # tokens; tokenizers use 1e30 for "no limit" but do not accept it as a length
EXAMPLE = "A film to remember, with a plot that holds and a cast that is a joy to watch."
NUM_EXAMPLES = 5  # reviews to run a model on
TOLERANCE = 1e-4  # of logits, between a review alone and in a padded batch


def detect_output_layer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the path of the output layer, found by running the model on an example."""
    with report_unsupported_model(name):
        return find_output_layer(model, modules_in_order(model, **example_inputs(model, tokenizer)), NUM_CLASSES)


def detect_finetune_layers(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FinetuneLayers:
    """Find the last layers of a model without an EncoderSpec by running it on an example."""
    num_blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    with report_unsupported_model(name):
        order = modules_in_order(model, **example_inputs(model, tokenizer))
        return find_finetune_layers(model, order, num_blocks, NUM_CLASSES)


def example_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Return the model's inputs for a single review."""
    ids = torch.tensor(make_encode(tokenizer)([EXAMPLE], max_sequence_length(model, tokenizer)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_context_length(context_length: int | str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if `context_length` is too short or too long for the tokenizer.

    Also raises it for "model_context_length" if neither model nor tokenizer has a maximum.
    """
    if context_length == "model_context_length" and max_sequence_length(model, tokenizer) == NO_LIMIT:
        raise UserError(
            "--context_length model_context_length: this model has no maximum; choose a number, or "
            "longest_training_example"
        )
    num_special = tokenizer.num_special_tokens_to_add()
    if isinstance(context_length, int) and context_length <= num_special:
        raise UserError(
            f"--context_length {context_length} leaves no room for the review: this model's tokenizer adds "
            f"{num_special} special tokens"
        )
    allowed = tokenizer.model_max_length
    if allowed < max_sequence_length(model) and isinstance(context_length, int) and context_length > allowed:
        raise UserError(
            f"--context_length {context_length} is more than the {allowed} tokens this model's tokenizer "
            "allows (model_max_length in its tokenizer_config.json)"
        )


def max_sequence_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Return the maximum number of tokens that the model, and the tokenizer if given, support."""
    limits = [
        tokenizer.model_max_length if tokenizer else 0,
        getattr(model.config, "max_position_embeddings", None) or 0,
    ]
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions start after its padding index.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limit for limit in [*limits, NO_LIMIT] if limit > 0)


@contextlib.contextmanager
def report_unsupported_model(name: str) -> Iterator[None]:
    """Turn any error of the block into a UserError that names the model, except if memory runs out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"--model {name} cannot classify reviews: {type(error).__name__}: {error}") from error


def example_reviews(tokenizer: PreTrainedTokenizerBase, context_length: int) -> EncodedReviews:
    """Return NUM_EXAMPLES encoded texts from a few words to `context_length` tokens."""
    words = EXAMPLE.split() * context_length
    counts = np.geomspace(4, max(4, context_length), NUM_EXAMPLES).astype(int)
    texts = [" ".join(words[:count]) for count in counts]
    return concatenate(make_encode(tokenizer)(texts, context_length), [0] * len(texts))


def find_padding_side(
    name: str,
    model: nn.Module,
    pooling: Callable[[nn.Module, Batch], torch.Tensor],
    make_dataset: Callable[..., IMDbDataset],
    use_attention_mask: bool,
) -> str:
    """Return the side, preferably "right", on which padding does not change a model's predictions.

    `make_dataset(use_attention_mask=, padding_side=)` returns the example reviews. Raises UserError if
    the model cannot classify them, or if batches are padded to different lengths and both sides
    change the predictions.
    """
    with report_unsupported_model(name):
        with isolated_copy(model) as copied:  # some models fail only in training mode
            reviews = make_dataset(use_attention_mask=use_attention_mask)
            pooling(copied.train(), reviews.collate(range(len(reviews))))
        for side in ("right", "left"):
            if ignores_padding(model, pooling, make_dataset(use_attention_mask=True, padding_side=side)):
                return side
        if not ignores_padding(model, pooling, make_dataset(use_attention_mask=False)):
            raise UserError(
                f"--model {name} cannot be used: its prediction for a review changes between calls, "
                "or with the other reviews of the batch"
            )
    if use_attention_mask:
        raise UserError(
            f"the predictions of --model {name} depend on how much padding a batch has; with "
            "--use_attention_mask false all batches have the same length"
        )
    return "right"


def ignores_padding(
    model: nn.Module, pooling: Callable[[nn.Module, Batch], torch.Tensor], reviews: IMDbDataset
) -> bool:
    """Return whether the logits of each review alone equal those of all reviews in one batch."""
    indices = range(len(reviews))
    with isolated_copy(model) as copied:
        together = pooling(copied.eval(), reviews.collate(indices))
    with isolated_copy(model) as copied:
        alone = torch.cat([pooling(copied.eval(), reviews.collate([index])) for index in indices])
    return torch.allclose(alone, together, rtol=TOLERANCE, atol=TOLERANCE)
