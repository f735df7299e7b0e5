"""Fine-tune BERT or one of its successors on the IMDb movie reviews.

    python train_bert_hf.py --trainable_layers all --num_epochs 1 --model bert

runs experiment 2 of the README, "340M BERT", published with 90.89% test accuracy: AdamW, learning rate
5e-6, 256 tokens, padding masked. Experiments 3 to 7 are the other published names in MODELS, run in the
same way (`roberta` with `--trainable_layers last_block`).

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetuning import cli
from finetuning.data.batching import Batch, IMDbDataset, length_buckets
from finetuning.data.hf_tokenizer import make_encode, make_tokenizer
from finetuning.data.tokenization import EncodedReviews, concatenate, load_encoded_splits
from finetuning.experiment import Task, finetune, start_run
from finetuning.hub_models import EncoderSpec, load_pretrained
from finetuning.model_inspection import (
    check_context_length,
    detect_finetune_layers,
    example_reviews,
    find_padding_side,
    max_sequence_length,
)
from finetuning.system.errors import UserError
from finetuning.trainable_layers import set_trainable

MODELS = {
    "distilbert": EncoderSpec(
        hub_id="distilbert/distilbert-base-uncased",
        head="classifier",
        pooler_and_norm=("pre_classifier",),
        blocks="distilbert.transformer.layer",
        replace_head=False,
    ),
    "bert": EncoderSpec(
        hub_id="google-bert/bert-base-uncased",
        head="classifier",
        pooler_and_norm=("bert.pooler",),
        blocks="bert.encoder.layer",
    ),
    "roberta": EncoderSpec(
        hub_id="FacebookAI/roberta-large",
        head="classifier.out_proj",
        pooler_and_norm=(),
        blocks="roberta.encoder.layer",
    ),
    "deberta-v3-base": EncoderSpec(
        hub_id="microsoft/deberta-v3-base",
        head="classifier",
        pooler_and_norm=("pooler",),
        blocks="deberta.encoder.layer",
    ),
    "modernbert-base": EncoderSpec(
        hub_id="answerdotai/ModernBERT-base",
        head="classifier",
        pooler_and_norm=("model.final_norm", "head"),
        blocks="model.layers",
    ),
    "modernbert-large": EncoderSpec(
        hub_id="answerdotai/ModernBERT-large",
        head="classifier",
        pooler_and_norm=("model.final_norm", "head"),
        blocks="model.layers",
    ),
    "minilm": EncoderSpec(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        head="classifier",
        pooler_and_norm=("bert.pooler",),
        blocks="bert.encoder.layer",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune an encoder."""
    args = parse_args(argv)
    spec = MODELS.get(args.model)
    with start_run(args, run_name(args)) as run:
        model, tokenizer = load_pretrained(args.model, args.seed, MODELS)
        layers = spec.finetune_layers(model) if spec else detect_finetune_layers(args.model, model, tokenizer)
        set_trainable(model, args.trainable_layers, layers)

        use_mask = args.use_attention_mask == "true"
        check_context_length(args.context_length, model, tokenizer)
        max_length = max_sequence_length(model, tokenizer)
        splits, context_length = load_encoded_splits(
            args.data_dir, make_tokenizer(tokenizer), args.context_length, max_length
        )
        padding = {"use_attention_mask": use_mask, "context_length": context_length, "padding_side": "right"}
        if spec is None:
            make_examples = partial(make_dataset, example_reviews(tokenizer, context_length), tokenizer, context_length)
            padding["padding_side"] = find_padding_side(args.model, model, class_logits, make_examples, use_mask)
        datasets = [make_dataset(reviews, tokenizer, **padding, use_buckets=args.compile) for reviews in splits]

        save_model = partial(save, model, tokenizer, padding)
        task = Task(model, layers.head, class_logits, save_model, skip_padding=spec is not None and use_mask)
        finetune(run, task, *datasets)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description="Fine-tune BERT or a similar encoder on the IMDb movie reviews.")
    add = cli.add_model_arguments(parser, trainable_layers="all").add_argument
    models = f"{', '.join(MODELS)}, or the Hub id or folder of any model that can classify sequences"
    add("--model", type=cli.user_path, default="distilbert", help=models)
    mask = "true: mask the padding; false: attention includes the padding"
    add("--use_attention_mask", choices=["true", "false"], default="true", help=mask)
    cli.add_training_arguments(parser, learning_rate=5e-6)
    cli.add_run_arguments(parser)
    return parser.parse_args(argv)


def run_name(args: Namespace) -> str:
    """Return the run's name: model, trainable layers, arguments that differ from the defaults, seed."""
    model = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model.replace("/", "-")
    return "-".join([model, args.trainable_layers, *args.overrides, f"seed{args.seed}"])


def make_dataset(
    reviews: EncodedReviews,
    tokenizer: transformers.PreTrainedTokenizerBase,
    context_length: int,
    use_attention_mask: bool,
    padding_side: str = "right",
    use_buckets: bool = False,
) -> IMDbDataset:
    """Return encoded reviews as an IMDbDataset, padded to a few fixed lengths if `use_buckets`."""
    # If the padding is masked, padding to the longest review of the batch gives the same logits as to the full length.
    pad_to: int | tuple[int, ...] | None = context_length
    if use_attention_mask:
        pad_to = length_buckets(context_length) if use_buckets else None
    return IMDbDataset(reviews, tokenizer.pad_token_id, pad_to, use_attention_mask, padding_side)


def class_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the model's class logits, (batch, classes); raise UserError if the model does not support bf16."""
    try:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    except (RuntimeError, TypeError) as error:
        if "BFloat16" not in str(error):
            raise
        raise UserError(f"this model does not compute in bf16 ({error}); use --precision fp32") from error


def save(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    padding: dict,
    folder: Path,
) -> dict:
    """Save model and tokenizer in Transformers' format; return the settings that `load_finetuned` needs."""
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    # `transformers.pipeline` then truncates and pads as this run did.
    settings = {
        "model_max_length": padding["context_length"],
        "padding_side": padding["padding_side"],
        "split_special_tokens": tokenizer.is_fast,
    }
    tokenizer.init_kwargs |= settings
    for key, value in settings.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return {"model_type": "encoder", "base_model": model.name_or_path, **padding}


def load_finetuned(folder: Path, settings: dict) -> tuple[nn.Module, Callable, Callable[[list[str]], IMDbDataset]]:
    """Load a saved model; return (model, pooling, function that turns a list of texts into an IMDbDataset)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    encode, context_length = make_encode(tokenizer), settings["context_length"]
    use_mask, padding_side = settings["use_attention_mask"], settings.get("padding_side", "right")

    def to_dataset(texts):
        reviews = concatenate(encode(texts, context_length), [0] * len(texts))
        return make_dataset(reviews, tokenizer, context_length, use_mask, padding_side)

    return model, class_logits, to_dataset


if __name__ == "__main__":
    cli.run_main(main)
