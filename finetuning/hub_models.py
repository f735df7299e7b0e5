"""Sequence classifiers of the Hugging Face Hub: load them safely and give them a new output layer."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from finetuning.data.reviews import LABEL_NAMES, NUM_CLASSES
from finetuning.model_inspection import detect_output_layer
from finetuning.system.console import print_status
from finetuning.system.errors import UserError
from finetuning.system.hub import check_cached_weights
from finetuning.system.model_files import check_model_folder
from finetuning.system.network import is_network_error, misconfigured_variable
from finetuning.trainable_layers import FinetuneLayers, classification_head

# Settings that override those of a checkpoint for another task.
CONFIG = {
    "id2label": dict(enumerate(LABEL_NAMES)),
    "label2id": {label_name: label for label, label_name in enumerate(LABEL_NAMES)},
    "problem_type": "single_label_classification",
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}
# What Transformers, Safetensors and the Hub's client raise for files that are missing, damaged or unsupported.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, UnpicklingError,
                  SafetensorError, HfHubHTTPError)  # fmt: skip


class EncoderSpec(NamedTuple):
    """A published model and the names of its last layers."""

    hub_id: str
    head: str  # the output layer
    pooler_and_norm: tuple[str, ...]  # the layers between the last block and the classification head
    blocks: str  # the list of transformer blocks
    replace_head: bool = True  # whether the published code replaces the library's output layer

    def finetune_layers(self, model: nn.Module) -> FinetuneLayers:
        """Return the last layers of a loaded model."""
        blocks: Any = model.get_submodule(self.blocks)
        pooler_and_norm = [model.get_submodule(path) for path in self.pooler_and_norm]
        return FinetuneLayers(classification_head(model, self.head), pooler_and_norm, blocks[-1])


def load_pretrained(
    name: str, seed: int, specs: Mapping[str, EncoderSpec] = {}
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load (model, tokenizer) by a name in `specs`, a Hub id or a folder; the model gets a new output layer.

    Raises UserError if the model does not exist, the Hub cannot be reached, files are damaged, or
    pretrained weights are missing. Never executes code from the repository.
    """
    spec = specs.get(name)
    source = spec.hub_id if spec else name
    transformers.logging.set_verbosity_error()  # the checks below report what matters of its warnings
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if spec is None and Path(source).exists():
        check_model_folder(source)
    try:
        check_no_adapter(name, source)
        AutoConfig.from_pretrained(source, trust_remote_code=False)  # its errors say more than the tokenizer's
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        torch.manual_seed(seed)
        model, loading_info = AutoModelForSequenceClassification.from_pretrained(
            source,
            **CONFIG,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,  # whatever precision the file is stored in
        )
    except Exception as error:
        if problem := loading_problem(error, name, source, specs):
            raise UserError(f"cannot load --model {name}{problem}") from error
        raise
    if not Path(source).is_dir():
        check_cached_weights(source)
    check_vocabulary(name, tokenizer, getattr(model.config.get_text_config(), "vocab_size", None))
    set_pad_token(name, model, tokenizer)
    new = {*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])}
    check_pretrained(name, model, new)
    new |= replace_output_layer(name, model, tokenizer, spec)
    check_finite_weights(name, model)
    print_status(f"Randomly initialized layers: {', '.join(sorted({key.rpartition('.')[0] for key in new}))}")
    return model, tokenizer


def loading_problem(error: Exception, name: str, source: str, specs: Mapping[str, EncoderSpec]) -> str | None:
    """Return the end of the message "cannot load --model X", or None to let the error through."""
    if isinstance(error, UserError):
        return None
    if not Path(source).is_dir() and (problem := misconfigured_variable(error, "hub")):
        return f": {problem}"
    if not isinstance(error, LOADING_ERRORS) and not is_network_error(error):
        return None
    if isinstance(error, UnpicklingError):
        return ": its weights are a pickle of more than tensors, which could run code and is not loaded"
    if "trust_remote_code" in str(error):
        return ": it needs code of its own, which is never run here"
    is_unknown = name not in specs and not Path(source).exists()
    return f"; it is none of {', '.join(specs)}: {error}" if specs and is_unknown else f": {error}"


def check_no_adapter(name: str, source: str) -> None:
    """Raise UserError if a repository or folder holds an adapter, which would be applied to the weights."""
    if find_adapter_config_file(source):
        raise UserError(
            f"cannot load --model {name}: it holds an adapter (adapter_config.json); merge it into its "
            "base model (merge_and_unload of peft), or name the base model instead"
        )


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> None:
    """Raise UserError if the tokenizer has no vocabulary or a larger one than the model."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_ids):  # as some tokenizers load if their files are missing
        raise UserError(f"cannot load --model {name}: its tokenizer has no vocabulary; are its files missing?")
    if num_embeddings is not None and max(vocabulary.values()) >= num_embeddings:
        raise UserError(
            f"cannot load --model {name}: its tokenizer is of another model; it has "
            f"{max(vocabulary.values()) + 1:,} tokens, the model {num_embeddings:,}"
        )


def set_pad_token(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the same pad token in model and tokenizer; raise UserError if the tokenizer has none."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"cannot load --model {name}: its tokenizer has neither a pad nor an eos token to pad with")
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def check_pretrained(name: str, model: PreTrainedModel, new: Iterable[str]) -> None:
    """Raise UserError if weights of transformer blocks or embeddings are among the new parameters."""
    pretrained = tuple(
        f"{path}."
        for path, module in model.named_modules()
        # I-BERT has an embedding class of its own.
        if isinstance(module, (nn.ModuleList, nn.Embedding)) or type(module).__name__.endswith("Embedding")
    )
    if missing := sorted(key for key in new if key.startswith(pretrained)):
        raise UserError(
            f"the checkpoint of --model {name} is incomplete or does not fit its configuration: "
            f"{len(missing)} parameters, such as {missing[0]}, are missing or of another shape"
        )


def check_finite_weights(name: str, model: PreTrainedModel) -> None:
    """Raise UserError if the checkpoint holds NaN or infinite weights."""
    for path, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"the checkpoint of --model {name} is damaged: {path} holds NaN or infinite numbers")


def replace_output_layer(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec | None
) -> set[str]:
    """Replace the output layer unless the published code keeps the library's; return the names of new parameters.

    Between `torch.manual_seed` and this call, the random numbers drawn are those of the published
    code, so that the new layer has the published weights.
    """
    if spec and not spec.replace_head:
        return set()
    path = spec.head if spec else detect_output_layer(name, model, tokenizer)
    old: Any = model.get_submodule(path)
    model.set_submodule(path, nn.Linear(old.in_features, NUM_CLASSES, bias=old.bias is not None))
    return {f"{path}.weight"}
