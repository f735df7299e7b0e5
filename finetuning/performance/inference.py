"""Logits of whole datasets: large batches sorted by length, no gradients, several processes."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from finetuning.data.batching import Batch, IMDbDataset, batches_by_token_budget
from finetuning.performance import distributed
from finetuning.performance.cpu_kernels import fast_cpu_ops
from finetuning.performance.device import autocast, empty_cache, is_compiled
from finetuning.performance.unpadded_linear import unpadded_linear
from finetuning.system.console import evaluation_bar, print_status
from finetuning.system.errors import UserError, is_out_of_memory
from finetuning.system.signals import raise_pending_interrupt

# Enough tokens to keep the device busy; `retry_in_smaller_batches` lowers the number if memory runs out.
EVAL_TOKENS_PER_BATCH = {"cpu": 8 * 256, "mps": 64 * 256, "cuda": 256 * 256}
MIN_PADDING = 0.05  # fraction of a batch's tokens from which skipping the padding saves time


@dataclass
class Classifier:
    """A model with the function that pools its outputs to class logits, its device and its compute precision."""

    model: nn.Module
    pooling: Callable[[nn.Module, Batch], torch.Tensor]
    device: torch.device
    precision: str = "fp32"
    max_eval_tokens: int = sys.maxsize  # lowered when memory runs out
    skip_padding: bool = False  # on a CPU; needs a model that masks padding and pools no padding position

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the logits (batch, classes), float32, of a batch on the classifier's device."""
        with ExitStack() as stack:
            stack.enter_context(autocast(self.device, self.precision))
            if self.device.type == "cpu" and not is_compiled(self.model):  # a compiled model is faster without
                stack.enter_context(fast_cpu_ops())
                if self.skip_padding and (mask := batch.attention_mask) is not None and has_enough_padding(mask):
                    stack.enter_context(unpadded_linear(mask))
            # A copy, because the next call of a CUDA graph overwrites the output of this one.
            return self.pooling(self.model, batch).to(torch.float32, copy=True)

    @property
    def eval_tokens(self) -> int:
        """Tokens per evaluation batch."""
        return min(EVAL_TOKENS_PER_BATCH[self.device.type], self.max_eval_tokens)


def has_enough_padding(attention_mask: torch.Tensor) -> bool:
    """Return whether at least MIN_PADDING of a batch's tokens are padding."""
    return attention_mask.numel() - int(attention_mask.sum()) >= MIN_PADDING * attention_mask.numel()


@contextmanager
def inference_context(classifier: Classifier) -> Iterator[None]:
    """Disable gradients and, through autocast's cache, convert each trainable weight only once."""
    with torch.inference_mode(), autocast(classifier.device, classifier.precision):
        yield


def predict_logits(reviews: IMDbDataset, classifier: Classifier) -> torch.Tensor:
    """Return the logits (reviews, classes) of a dataset, float32 on the CPU, in the dataset's order.

    Dropout is off, no random number is drawn and the training mode is restored, so that evaluating
    does not change what is trained. A pending interrupt is raised after the current batch.
    """
    was_training = classifier.model.training
    classifier.model.eval()
    lengths = reviews.padded_lengths(reviews.lengths)
    shard = np.arange(distributed.rank(), len(reviews), distributed.world_size())
    batches = [shard[indices] for indices in batches_by_token_budget(lengths[shard], classifier.eval_tokens)]

    compiled = is_compiled(classifier.model)

    def compute(indices):
        stop_if_interrupted()
        # A compiled model is recompiled for each shape: repeated reviews complete its batches to one size.
        size = max(1, classifier.eval_tokens // max(1, int(lengths[indices[0]]))) if compiled else len(indices)
        batch = reviews.collate(np.resize(indices, size))
        return classifier(batch.to(classifier.device))[: len(indices)]

    with inference_context(classifier):
        results = [*retry_in_smaller_batches(compute, evaluation_bar(batches), lengths, classifier)]
    stop_if_interrupted()
    classifier.model.train(was_training)
    results = distributed.all_gather([(torch.from_numpy(indices), logits.cpu()) for indices, logits in results])
    indices, logits = (torch.cat(parts) for parts in zip(*results, strict=True))
    return torch.empty_like(logits).index_copy_(0, indices, logits)


def stop_if_interrupted() -> None:
    """Raise a pending interrupt in the main process; only that one saves checkpoints."""
    if distributed.is_main_process():
        raise_pending_interrupt()


def retry_in_smaller_batches(
    compute: Callable[[np.ndarray], Any], batches: Iterable[np.ndarray], lengths: np.ndarray, classifier: Classifier
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield (indices, compute(indices)) for batches of indices of reviews padded to `lengths`.

    If memory runs out, halve the classifier's tokens per evaluation batch, for this call and later
    ones, and retry. Raises UserError if a single review needs too much memory.
    """
    for batch in batches:
        while len(batch):
            length = max(1, int(lengths[batch[0]]))
            indices = batch[: max(1, classifier.eval_tokens // length)]
            try:
                result = compute(indices)
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames would keep the tensors of the failed attempt
                empty_cache(classifier.device)
                if len(indices) == 1:
                    raise UserError(
                        f"out of memory for a single review of {length} tokens on {classifier.device}; free the memory "
                        "that other programs use, or take a smaller model or a shorter --context_length"
                    ) from error
                classifier.max_eval_tokens = len(indices) * length // 2
                print_status(
                    f"Out of memory with {len(indices)} reviews per batch; evaluating {classifier.eval_tokens:,} "
                    "tokens at a time"
                )
            else:
                yield indices, result
                batch = batch[len(indices) :]
