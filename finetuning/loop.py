"""Loss, accuracy, evaluation, and the one training loop of every neural model here."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from finetuning import distributed
from finetuning.batches import Batch, evaluation_order, grouped_order, training_order
from finetuning.console import epoch_line, evaluation_bar, log, step_line
from finetuning.errors import UserError, is_out_of_memory
from finetuning.quick import packed_weights, quick_cpu
from finetuning.runtime import autocast, empty_cache, is_compiled, synchronize

# Tokens in a batch of evaluation: enough to keep the device busy. Where memory runs out there will be fewer.
EVALUATION_TOKENS = {"cpu": 8 * 256, "mps": 64 * 256, "cuda": 256 * 256}


@dataclass
class Classifier:
    """A model, how to read a review's class logits from it, and where and how precisely it computes."""

    model: nn.Module
    read_logits: Callable[[nn.Module, Batch], torch.Tensor]
    device: torch.device
    precision: str = "fp32"
    max_evaluation_tokens: float = math.inf  # where memory has run out, how many to try instead

    def __call__(self, batch):
        """Batch on the classifier's device -> logits (batch, classes), float32."""
        with autocast(self.device, self.precision), quick_cpu() if self.quick else nullcontext():
            # A copy: where a compiled model runs as a CUDA graph, its next call overwrites what this one returned.
            return self.read_logits(self.model, batch).to(torch.float32, copy=True)

    @property
    def evaluation_tokens(self):
        """The tokens in a batch of evaluation."""
        return min(EVALUATION_TOKENS[self.device.type], self.max_evaluation_tokens)

    @property
    def quick(self):
        """Whether `finetuning.quick` computes: a compiler does better without it, to a GPU it would be of no use."""
        return self.device.type == "cpu" and not is_compiled(self.model)


@dataclass
class Progress:
    """How far a training run has come; with the model and the optimizer, all it needs to go on."""

    step: int = 0  # updates made
    order: torch.Tensor | None = None  # this epoch's batches, (steps, batch_size) indices
    losses: list = field(default_factory=list)  # training loss of each update
    curve: list = field(default_factory=list)  # {"step", "train_loss", "validation_loss"} for each log line
    epochs: list = field(default_factory=list)  # {"step", "train_accuracy", "validation_accuracy"} after each epoch
    seconds: float = 0.0  # wall-clock time spent


def calc_loss_batch(batch, classifier):
    """Mean cross-entropy of one batch, as a scalar tensor on the classifier's device."""
    batch = batch.to(classifier.device)
    return F.cross_entropy(classifier(batch), batch.labels)


def calc_gradients(reviews, indices, classifier, accumulate=1):
    """Leave the gradient of the mean loss over the reviews at `indices`; return that loss, a scalar tensor.

    Each process works through its share of the reviews in `accumulate` parts.
    """
    parts = distributed.share(indices).tensor_split(accumulate)
    losses = []
    for part in parts:
        # Parts may differ in size by one, and count accordingly in the mean over the processes.
        weight = distributed.size() * len(part) / len(indices)
        with distributed.exchanging(classifier.model, now=part is parts[-1]):
            loss = weight * calc_loss_batch(reviews.batch(part), classifier)
            loss.backward()
        losses.append(loss.detach())  # reading its value here would make the GPU wait
    return distributed.mean(sum(losses))


def has_unused_parameters(classifier, batch):
    """Whether a trainable parameter gets no gradient from a batch; draws no random number."""
    was_training = classifier.model.training
    classifier.model.eval()
    with torch.compiler.set_stance("force_eager"):  # not worth a compilation
        calc_loss_batch(batch, classifier).backward()
    classifier.model.train(was_training)
    unused = any(p.requires_grad and p.grad is None for p in classifier.model.parameters())
    classifier.model.zero_grad()
    return unused


@contextmanager
def evaluating(classifier):
    """Without gradients and in the classifier's precision; a weight that learns is rounded but once."""
    with (torch.inference_mode(), autocast(classifier.device, classifier.precision),
          packed_weights() if classifier.quick else nullcontext()):
        yield


def compute_batches(compute, batches, lengths, classifier):
    """Yield `(indices, compute(indices))` for each of the `batches` of indices of reviews padded to `lengths`.

    Where memory runs out, that batch and those that follow, of this call and of later ones, are cut to half of its
    tokens, until a batch is one review. Raises UserError if that is still too much.
    """
    for batch in batches:
        while len(batch):
            indices = batch[:max(1, classifier.evaluation_tokens // max(1, int(lengths[batch[0]])))]
            error = None
            try:
                result = compute(indices)
            except (RuntimeError, MemoryError, OSError) as raised:
                if not is_out_of_memory(raised):
                    raise
                error = raised.with_traceback(None)  # its frames hold the tensors of the failed attempt
            if error is None:
                yield indices, result
                batch = batch[len(indices):]
                continue
            empty_cache(classifier.device)
            tokens = len(indices) * int(lengths[batch[0]])
            if len(indices) == 1:
                raise UserError(f"out of memory for a single review of {tokens} tokens on {classifier.device}; free "
                                "what other programs hold of it, or take a smaller model or a shorter context"
                                ) from error
            classifier.max_evaluation_tokens = tokens // 2
            log(f"Out of memory with {len(indices)} reviews at once; evaluating {tokens // 2:,} tokens at a time",
                file=sys.stderr)


def predict(reviews, classifier):
    """Logits (len(reviews), classes) of an IMDbDataset, float32 on the CPU, in the dataset's order.

    Dropout is off meanwhile, no random number is drawn, and the model's mode is put back, so that
    how often one evaluates does not change what is learned.
    """
    was_training = classifier.model.training
    classifier.model.eval()
    share, lengths = np.arange(distributed.rank(), len(reviews), distributed.size()), reviews.padded(reviews.lengths)
    batches = [share[indices] for indices in evaluation_order(lengths[share], classifier.evaluation_tokens)]
    with evaluating(classifier):
        parts = list(compute_batches(lambda indices: classifier(reviews.batch(indices).to(classifier.device)),
                                     evaluation_bar(batches), lengths, classifier))
    classifier.model.train(was_training)
    order, logits = zip(*distributed.gather([(indices, part.cpu()) for indices, part in parts]), strict=True)
    logits = torch.cat(logits)
    in_order = torch.empty_like(logits)
    in_order[torch.from_numpy(np.concatenate(order))] = logits
    return in_order


def calc_loss_loader(reviews, classifier):
    """Mean cross-entropy over all reviews of an IMDbDataset."""
    return F.cross_entropy(predict(reviews, classifier), torch.from_numpy(reviews.labels)).item()


def calc_accuracy_loader(reviews, classifier):
    """Share of an IMDbDataset's reviews that are classified correctly."""
    return accuracy(predict(reviews, classifier), reviews.labels)


def accuracy(logits, labels):
    """Share of rows whose largest logit is at the label."""
    return (logits.argmax(dim=-1).numpy() == labels).mean().item()


def evaluate_model(classifier, train, validation):
    """(training loss, validation loss)"""
    return calc_loss_loader(train, classifier), calc_loss_loader(validation, classifier)


def check_losses(progress, updates):
    """Raise UserError if the loss of one of the last `updates` is no finite number; a GPU has to wait for that."""
    recent = progress.losses[-updates:]
    for step, loss in enumerate(map(float, recent), start=len(progress.losses) - len(recent)):
        if not math.isfinite(loss):
            advice = ("a smaller --learning_rate or --precision fp32; any checkpoint is from before that" if step else
                      "--precision fp32, or another model: no weight has changed yet")
            raise UserError(f"the training loss is {loss} at step {step}; try {advice}")


def count_steps(num_reviews, batch_size, num_epochs, max_steps=None):
    """How many updates a whole training run makes."""
    return min(num_epochs * (num_reviews // batch_size), max_steps or float("inf"))


def train_classifier_simple(classifier, optimizer, train, validation, *, num_epochs, batch_size, max_steps=None,
                            eval_freq=50, eval_iter=20, group_by_length=False, accumulate=1, progress=None,
                            after_step=lambda progress: None):
    """Train for `num_epochs`, or exactly `max_steps` updates if that is less; return the Progress.

    Every `eval_freq` updates, counted from the first, it prints the losses over the first
    `eval_iter` batches' worth of reviews of each set, and after each epoch the accuracies.
    `group_by_length` puts reviews of similar length into a batch; `accumulate` works through a
    batch in that many parts, which takes less memory and learns the same.
    Given an unfinished run's `progress`, it goes on from there. `after_step` is called between
    two updates. Raises UserError at the first log line after a loss that is no finite number.
    """
    progress = progress or Progress()
    train_sample, validation_sample = (reviews.first(eval_iter * batch_size) for reviews in (train, validation))
    steps_per_epoch = len(train) // batch_size
    last_step = count_steps(len(train), batch_size, num_epochs, max_steps)
    started = time.perf_counter() - progress.seconds
    classifier.model.train()
    learner = distributed.learner(classifier, lambda: has_unused_parameters(classifier, train.batch([0])))
    while progress.step < last_step:
        epoch, steps_done = divmod(progress.step, steps_per_epoch)
        if progress.order is None:
            progress.order = distributed.of_first(grouped_order(train.lengths, batch_size) if group_by_length
                                                  else training_order(len(train), batch_size))
        for indices in progress.order[steps_done:steps_done + last_step - progress.step]:
            progress.losses.append(calc_gradients(train, indices, learner, accumulate))
            optimizer.step()
            optimizer.zero_grad()
            if progress.step % eval_freq == 0:
                check_losses(progress, eval_freq)
                train_loss, validation_loss = evaluate_model(classifier, train_sample, validation_sample)
                progress.curve.append(
                    {"step": progress.step, "train_loss": train_loss, "validation_loss": validation_loss})
                log(step_line(epoch + 1, progress.curve[-1]))
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            if progress.step % steps_per_epoch and progress.step < last_step:
                after_step(progress)
        check_losses(progress, eval_freq)
        progress.order = None
        train_accuracy, validation_accuracy = (
            calc_accuracy_loader(reviews, classifier) for reviews in (train_sample, validation_sample))
        progress.epochs.append({"step": progress.step, "train_accuracy": train_accuracy,
                                "validation_accuracy": validation_accuracy})
        log(epoch_line(progress.epochs[-1]))
        synchronize(classifier.device)
        progress.seconds = time.perf_counter() - started
        after_step(progress)
    return progress
