"""One run: what is checked before a model is loaded, then training, evaluation and the record."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from finetuning.callbacks import TensorBoard, training_bar
from finetuning.checkpoint import (
    Checkpointer,
    digest_frozen_weights,
    find_interrupted_run,
    has_checkpoint,
    load_checkpoint,
    remove_checkpoints,
    restore,
    run_fingerprint,
)
from finetuning.data.batching import Batch, IMDbDataset
from finetuning.data.reviews import check_dataset, count_line, duplicated_in_training_set
from finetuning.hints import out_of_memory_hint, resume_hint
from finetuning.optimizers import build_optimizers
from finetuning.performance import device as devices
from finetuning.performance import distributed
from finetuning.performance.frozen_cache import cache_frozen_outputs
from finetuning.performance.inference import Classifier, predict_logits
from finetuning.reporting import records
from finetuning.reporting.plots import plot_run
from finetuning.reporting.published_log import accuracy_lines, end_of_training
from finetuning.reporting.saved_models import save_model
from finetuning.system.console import log, print_status
from finetuning.system.errors import UserError
from finetuning.system.files import exclusive_dir
from finetuning.system.signals import defer_interrupts, raise_pending_interrupt
from finetuning.trainable_layers import count_parameters
from finetuning.training import TrainConfig, TrainState, accuracy, train_classifier


@dataclass
class Task:
    """A model to fine-tune, with the functions that pool its outputs and save it."""

    model: nn.Module
    head: nn.Module  # the output layer
    pooling: Callable[[nn.Module, Batch], torch.Tensor]  # (model, batch) -> class logits (batch, classes)
    save: Callable[[Path], dict]  # write the model's files to a folder; return the settings to load them with
    skip_padding: bool = False  # see `Classifier`


@dataclass
class RunContext:
    """Arguments, folder, checkpoint and device of a run."""

    args: argparse.Namespace
    name: str
    folder: Path
    metadata: dict  # as `records.run_metadata` returns it
    duplicated: np.ndarray  # (test reviews,) bool: also in the training set
    checkpoint: dict | None  # to resume from
    device: torch.device
    precision: str
    precision_reason: str
    tensorboard: TensorBoard | None

    @property
    def config(self) -> TrainConfig:
        """The settings of the training loop."""
        return TrainConfig(**{each.name: getattr(self.args, each.name) for each in fields(TrainConfig)})


@contextmanager
def start_run(args: argparse.Namespace, name: str) -> Iterator[RunContext]:
    """Yield the context of a new or resumed run, its folder locked and torchrun's processes connected.

    Raises UserError for invalid arguments, data, devices and checkpoints. The other processes wait here
    until the main process reaches `finetune`, and then find its downloads and token cache.
    """
    folder = records.run_folder(args, name)
    if args.resume and not args.output_dir:
        folder = find_interrupted_run(folder)
        name = folder.name
    with distributed.process_group(), ExitStack() as stack:
        if distributed.is_main_process():
            stack.enter_context(exclusive_dir(folder, "--output_dir"))
        stack.enter_context(resume_hint(folder, args.command))
        stack.enter_context(out_of_memory_hint(args))
        distributed.wait_for_main_process()
        yield prepare(args, name, folder)


def prepare(args: argparse.Namespace, name: str, folder: Path) -> RunContext:
    """Check everything that needs no model and return the run's context."""
    if args.optimizer != "muon" and "--muon_learning_rate" in args.command:  # even with the default value
        raise UserError(f"--muon_learning_rate needs --optimizer muon; this run uses {args.optimizer}")
    check_batch_size(args.batch_size, check_dataset(args.data_dir))
    metadata = records.run_metadata(args)
    records.check_replaceable(folder, metadata)
    checkpoint = None
    if args.resume and distributed.is_main_process():
        checkpoint = load_checkpoint(folder, run_fingerprint(metadata))
    elif has_checkpoint(folder) and not args.resume:
        raise UserError(
            f"{folder} holds the checkpoint of an interrupted run: add --resume, or delete it to start again"
        )
    device = devices.select_device(args.device)
    if args.compile:
        devices.check_compiler(device)
    precision, reason = select_precision(args.precision, device, checkpoint)
    return RunContext(
        args=args,
        name=name,
        folder=folder,
        metadata=metadata,
        duplicated=duplicated_in_training_set(args.data_dir),
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        precision_reason=reason,
        tensorboard=TensorBoard(folder) if args.tensorboard else None,
    )


def check_batch_size(batch_size: int, num_reviews: int) -> None:
    """Raise UserError if the training set does not fill a batch, or a batch has no review for some process."""
    if num_reviews < batch_size:
        raise UserError(f"--batch_size {batch_size} is more than the {num_reviews} reviews of the training set")
    if batch_size < distributed.world_size():
        raise UserError(f"--batch_size {batch_size} is less than the {distributed.world_size()} processes")


def select_precision(name: str, device: torch.device, checkpoint: dict | None) -> tuple[str, str]:
    """Return (precision, reason) of a new or resumed run; "auto" keeps the checkpoint's precision."""
    if checkpoint is None:
        return devices.select_precision(name, device)
    # A new measurement could choose another precision than the run started with.
    previous = checkpoint["precision"]
    precision, reason = devices.select_precision(previous if name == "auto" else name, device)
    if precision == previous:
        return precision, reason.replace("as requested", "that of the checkpoint")
    step = checkpoint["train_state"]["step"]
    return precision, f"{reason}; {previous} up to step {step}: the numbers differ from those of an uninterrupted run"


def finetune(run: RunContext, task: Task, train: IMDbDataset, validation: IMDbDataset, test: IMDbDataset) -> None:
    """Train, evaluate, print the published log and write the record."""
    distributed.release_other_processes()
    # Other nodes may not share the file system that holds the checkpoint.
    run.checkpoint = distributed.broadcast(run.checkpoint)
    print_status(count_line(len(train), len(validation), len(test)))
    with out_of_memory_hint():
        classifier, model_info = setup_model(run, task)
    splits = {"train": train, "validation": validation, "test": test}
    trained, splits, state = train_model(run, task, classifier, splits)
    log(end_of_training(state.seconds))

    # The test set goes through the whole model without cached outputs, as in predict.py.
    classifiers = {"train": trained, "validation": trained, "test": classifier}
    started = time.perf_counter()
    logits = {split: predict_logits(reviews, classifiers[split]) for split, reviews in splits.items()}
    devices.synchronize(classifier.device)
    seconds = {"training": state.seconds, "evaluation": time.perf_counter() - started}
    if not distributed.is_main_process():
        return
    accuracies = {split: accuracy(logits[split], reviews.labels) for split, reviews in splits.items()}
    log(accuracy_lines(accuracies))

    counts = {split: len(reviews) for split, reviews in splits.items()}
    num_trained = state.step * run.config.batch_size
    record = {
        **run.metadata,
        **model_info,
        **state.history(),
        "name": run.name,
        "accuracy": accuracies,
        "reviews": counts,
        "seconds": seconds,
        "reviews_per_second": records.reviews_per_second(num_trained, sum(counts.values()), seconds),
        "peak_memory": devices.peak_memory(classifier.device),
    }
    probabilities = logits["test"].double().softmax(dim=-1)[:, 1].numpy()
    records.write_record(run.folder, record, run.duplicated, test.labels, probabilities)
    if run.args.save_model:
        settings = {"precision": run.precision, "hardware": record["hardware"], "skip_padding": task.skip_padding}
        save_model(run.folder, task.save, **settings)
    plot_run(run.folder)
    remove_checkpoints(run.folder)
    print_status(f"Record: {run.folder / records.RECORD}")


def setup_model(run: RunContext, task: Task) -> tuple[Classifier, dict]:
    """Move the model to its device; return the classifier and what the record says of device and model."""
    run.precision, run.precision_reason = distributed.broadcast((run.precision, run.precision_reason))
    total, trainable = count_parameters(task.model)
    name = devices.device_name(run.device)
    print_status(
        f"Device: {run.device} ({name})\nPrecision: {run.precision} ({run.precision_reason})\n"
        f"Parameters: {total:,}, {trainable:,} trainable"
    )
    devices.set_matmul_precision(run.precision)
    if run.device.type == "cpu":
        devices.tune_malloc()
    if run.args.compile:
        devices.compile_model(task.model, run.device, accumulates_gradients=run.args.micro_batch_size is not None)
    classifier = Classifier(
        task.model.to(run.device), task.pooling, run.device, run.precision, skip_padding=task.skip_padding
    )
    return classifier, {
        "hardware": name,
        "precision": {"dtype": run.precision, "reason": run.precision_reason},
        "parameters": {"total": total, "trainable": trainable},
    }


def train_model(
    run: RunContext, task: Task, classifier: Classifier, splits: dict[str, IMDbDataset]
) -> tuple[Classifier, dict[str, IMDbDataset], TrainState]:
    """Train; return the trained classifier and the splits, which may use cached frozen outputs, and the final state."""
    args, config = run.args, run.config
    fingerprint = run_fingerprint(run.metadata) | {"frozen weights": digest_frozen_weights(task.model)}
    started = time.perf_counter()
    classifier, (train, validation) = cache_frozen_outputs(
        args, classifier, task.head, splits["train"], splits["validation"]
    )
    torch.manual_seed(args.seed)
    optimizers = build_optimizers(args.optimizer, classifier.model, args.learning_rate, args.muon_learning_rate)
    state = restore(run.checkpoint, fingerprint, classifier, optimizers) if run.checkpoint else TrainState()
    run.checkpoint = None  # free the memory
    distributed.seed_per_rank(args.seed, state.step)
    state.seconds += time.perf_counter() - started
    checkpointer = Checkpointer(run.folder, classifier, optimizers, fingerprint, args.checkpoint_minutes)
    num_steps = config.num_steps(len(train))
    with defer_interrupts() as pending, training_bar(state, num_steps, config.batch_size) as bar:
        # Only the main process saves and stops; the other ranks then fail in their next collective operation.
        tensorboard = [run.tensorboard] if run.tensorboard else []
        main_callbacks: list[Callable] = [bar, *tensorboard, checkpointer, lambda state: raise_pending_interrupt()]
        other_callbacks = [lambda state: distributed.seed_per_rank(args.seed, state.step)]
        callbacks = main_callbacks if distributed.is_main_process() else other_callbacks
        try:
            state = train_classifier(classifier, optimizers, train, validation, config, state, callbacks)
        except KeyboardInterrupt as interrupt:
            if interrupt in pending:  # raised after a step, unlike a second Ctrl-C
                checkpointer.save(state)
            raise
    return classifier, splits | {"train": train, "validation": validation}, state
