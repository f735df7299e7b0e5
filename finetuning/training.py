"""The training loop of all neural models: loss, optimizer steps, log lines."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from finetuning.data.batching import Batch, IMDbDataset, length_grouped_batches, shuffled_batches
from finetuning.performance import distributed
from finetuning.performance.device import synchronize
from finetuning.performance.inference import Classifier, predict_logits
from finetuning.reporting.published_log import epoch_line, step_line
from finetuning.system.console import log
from finetuning.system.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop; the flags of the same names describe them."""

    num_epochs: int = 1
    batch_size: int = 8
    max_steps: int | None = None
    eval_freq: int = 50
    eval_iter: int = 20
    group_by_length: bool = False
    micro_batch_size: int | None = None

    def num_steps(self, num_reviews: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        num_steps = self.num_epochs * (num_reviews // self.batch_size)
        return min(num_steps, self.max_steps or num_steps)


@dataclass
class TrainState:
    """Progress of a training run; with model, optimizers and random state, all that resuming needs."""

    step: int = 0  # number of optimizer steps so far
    batches: torch.Tensor | None = None  # this epoch's batches, (steps, batch_size) indices
    losses: list = field(default_factory=list)  # training loss of each step
    eval_history: list = field(default_factory=list)  # {"step", "train_loss", "validation_loss"} of each log line
    epoch_metrics: list = field(default_factory=list)  # {"step", "train_accuracy", "validation_accuracy"}
    seconds: float = 0.0  # wall-clock time

    @property
    def log_step(self) -> int:
        """The last optimizer step as the log counts them, from 0."""
        return self.step - 1

    def history(self) -> dict[str, list]:
        """Return losses and metrics, rounded to six digits, under the record's keys."""
        return {
            "losses": [round(float(loss), 6) for loss in self.losses],
            "eval_history": [rounded(row) for row in self.eval_history],
            "epoch_metrics": [rounded(row) for row in self.epoch_metrics],
        }


def rounded(metrics: dict[str, float]) -> dict[str, float]:
    """Round metrics to six digits."""
    return {key: round(value, 6) for key, value in metrics.items()}


def train_classifier(
    classifier: Classifier,
    optimizers: list[torch.optim.Optimizer],
    train: IMDbDataset,
    validation: IMDbDataset,
    config: TrainConfig,
    state: TrainState | None = None,
    callbacks: Iterable[Callable[[TrainState], object]] = (),
) -> TrainState:
    """Train, or resume the interrupted run of `state`, and log as the published scripts do.

    The losses of a log line are those of the first `eval_iter` batches' worth of reviews. Raises
    UserError at the first log line after a loss that is not finite.
    """
    state = state or TrainState()
    samples = [reviews.head(config.eval_iter * config.batch_size) for reviews in (train, validation)]
    steps_per_epoch, last_step = len(train) // config.batch_size, config.num_steps(len(train))
    started = time.perf_counter() - state.seconds
    model = distributed.wrap_ddp(classifier.model, lambda: has_unused_parameters(classifier, train.collate([0])))
    parallel = replace(classifier, model=model)
    classifier.model.train()

    def end_step():
        state.seconds = time.perf_counter() - started  # of a run that is interrupted in the next line
        log_due_lines(state, steps_per_epoch, classifier, samples, config)
        state.seconds = time.perf_counter() - started
        for callback in callbacks:
            callback(state)

    if any(due_lines(state, config)):  # in a resumed run that was interrupted while it evaluated
        end_step()
    while state.step < last_step:
        if state.batches is None:
            state.batches = draw_batches(train, config)
        first = state.step % steps_per_epoch
        for indices in state.batches[first : first + last_step - state.step]:
            state.losses.append(forward_backward(train, indices, parallel, config.micro_batch_size))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state.step += 1
            if state.step % steps_per_epoch == 0 or state.step == last_step:
                state.batches = None  # the epoch has ended
            end_step()
    return state


def draw_batches(train: IMDbDataset, config: TrainConfig) -> torch.Tensor:
    """Draw the batches of an epoch, (steps, batch_size) indices, the same for all ranks."""
    if config.group_by_length:
        return distributed.broadcast(length_grouped_batches(train.lengths, config.batch_size))
    return distributed.broadcast(shuffled_batches(len(train), config.batch_size))


def forward_backward(
    reviews: IMDbDataset, indices: torch.Tensor, classifier: Classifier, micro_batch_size: int | None = None
) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over a batch; return that loss, a scalar tensor.

    Each process takes a shard of the batch and works through it in micro-batches.
    """
    shard = distributed.shard(indices)
    micro_batches = shard.split(micro_batch_size or len(shard))
    losses = []
    for micro_batch in micro_batches:
        # Shards and micro-batches can differ in size, and the mean over the ranks must weigh each review equally.
        weight = distributed.world_size() * len(micro_batch) / len(indices)
        with distributed.sync_gradients(classifier.model, enabled=micro_batch is micro_batches[-1]):
            loss = weight * batch_loss(reviews.collate(micro_batch), classifier)
            loss.backward()
        losses.append(loss.detach())  # .item() would synchronize with the GPU at every step
    return distributed.all_reduce_mean(torch.stack(losses).sum())


def batch_loss(batch: Batch, classifier: Classifier) -> torch.Tensor:
    """Return the mean cross-entropy of a batch, a scalar tensor on the classifier's device."""
    batch = batch.to(classifier.device)
    return F.cross_entropy(classifier(batch), batch.labels)


def has_unused_parameters(classifier: Classifier, batch: Batch) -> bool:
    """Return whether a trainable parameter gets no gradient from a batch; draws no random number."""
    was_training = classifier.model.training
    classifier.model.eval()
    with torch.compiler.set_stance("force_eager"):  # one batch is not worth a compilation
        batch_loss(batch, classifier).backward()
    classifier.model.train(was_training)
    unused = any(p.requires_grad and p.grad is None for p in classifier.model.parameters())
    classifier.model.zero_grad()
    return unused


def log_due_lines(
    state: TrainState, steps_per_epoch: int, classifier: Classifier, samples: list[IMDbDataset], config: TrainConfig
) -> None:
    """Evaluate and print the log lines that are due; an interrupted evaluation leaves the state as it was."""
    losses_due, accuracies_due = due_lines(state, config)
    if losses_due:
        log_losses(state, steps_per_epoch, classifier, samples, config)
    if accuracies_due:
        log_accuracies(state, classifier, samples, config)


def due_lines(state: TrainState, config: TrainConfig) -> tuple[bool, bool]:
    """Return whether the losses and the accuracies after the last step are due and not yet in the state."""
    if not state.step:
        return False, False
    return (
        state.log_step % config.eval_freq == 0 and not is_logged(state.eval_history, state.log_step),
        state.batches is None and not is_logged(state.epoch_metrics, state.step),
    )


def is_logged(history: list[dict], step: int) -> bool:
    """Return whether the last entry of a history is that of a step."""
    return bool(history) and history[-1]["step"] == step


def log_losses(
    state: TrainState, steps_per_epoch: int, classifier: Classifier, samples: list[IMDbDataset], config: TrainConfig
) -> None:
    """Evaluate, extend the evaluation history and print a log line."""
    check_finite(state, num_steps=config.eval_freq)
    train_loss, validation_loss = (mean_loss(sample, classifier) for sample in samples)
    state.eval_history.append({"step": state.log_step, "train_loss": train_loss, "validation_loss": validation_loss})
    log(step_line(state.log_step // steps_per_epoch + 1, state.eval_history[-1]))


def log_accuracies(state: TrainState, classifier: Classifier, samples: list[IMDbDataset], config: TrainConfig) -> None:
    """Evaluate, extend the epoch metrics and print a log line."""
    check_finite(state, num_steps=config.eval_freq)
    train_accuracy, validation_accuracy = (
        accuracy(predict_logits(sample, classifier), sample.labels) for sample in samples
    )
    state.epoch_metrics.append(
        {"step": state.step, "train_accuracy": train_accuracy, "validation_accuracy": validation_accuracy}
    )
    log(epoch_line(state.epoch_metrics[-1]))
    synchronize(classifier.device)  # so that TrainState.seconds includes queued work


def mean_loss(reviews: IMDbDataset, classifier: Classifier) -> float:
    """Return the mean cross-entropy over all reviews of a dataset."""
    return F.cross_entropy(predict_logits(reviews, classifier), torch.from_numpy(reviews.labels)).item()


def accuracy(logits: torch.Tensor, labels: np.ndarray) -> float:
    """Return the fraction of correct predictions, from logits (reviews, classes) and labels (reviews,)."""
    return (logits.argmax(dim=-1).numpy() == labels).mean().item()


def check_finite(state: TrainState, num_steps: int) -> None:
    """Raise UserError if the loss of one of the last `num_steps` steps is not finite; synchronizes with the GPU."""
    recent = state.losses[-num_steps:]
    for step, loss in enumerate(map(float, recent), start=len(state.losses) - len(recent)):
        if not math.isfinite(loss):
            advice = (
                "start again with a lower --learning_rate, or with --precision fp32"
                if step
                else "use --precision fp32 or another model: no weight has changed yet"
            )
            raise UserError(f"the training loss is {loss} at step {step}; {advice}")
