"""One whole run: from a model and three tokenized sets to the printed accuracies and the record."""

import re
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from finetuning import distributed, records
from finetuning.checkpoint import CheckpointWriter, find_checkpoint, is_unfinished, restore, run_identity
from finetuning.cli import note
from finetuning.console import accuracy_lines, end_of_training, training_bar
from finetuning.errors import UserError, is_out_of_memory
from finetuning.features import compute_once
from finetuning.files import held
from finetuning.interrupts import put_off
from finetuning.layers import count_parameters
from finetuning.loop import Classifier, Progress, accuracy, count_steps, predict, train_classifier_simple
from finetuning.optimizers import build_optimizer
from finetuning.plots import draw_run
from finetuning.reviews import check_dataset, copies_in_training_set, count_line
from finetuning.runtime import (
    check_compiler,
    compile_model,
    hardware,
    keep_freed_memory,
    peak_memory,
    select_device,
    select_precision,
    synchronize,
)
from finetuning.saved import save_model
from finetuning.tensorboard import TensorBoard


class Setting(NamedTuple):
    """What is known of a run before its model is there."""

    folder: Path
    facts: dict  # as `records.facts` returns them
    copies: np.ndarray  # (test reviews,) bool: which stand in the training set
    checkpoint: dict | None  # to go on from
    device: torch.device
    precision: str
    reason: str  # of that precision
    boards: list[TensorBoard]  # at most one


@distributed.processes()
def run_experiment(args, name, build):
    """Fine-tune a model as `args` say, print the published log, and leave the run's record.

    `build(args)` returns the model, its output layer, `read_logits(model, batch)`, which returns
    the class logits (batch, 2), `save(folder)`, which writes the model's files and returns what else
    a reader of them must know, and the training, validation and test set as IMDbDatasets. What can
    be refused without it is refused first.
    """
    folder = records.run_folder(args, name)
    if args.resume and not args.output_dir:
        folder = interrupted_run(folder)
        name = folder.name
    lock = held(folder, "--output_dir") if distributed.is_first() else nullcontext()
    with lock, way_to_go_on(folder, args.command), memory_advice(args):
        with distributed.first_process_first(), memory_advice():
            setting, built = prepare(args, folder), build(args)
        # Other machines need not have the disk that holds it.
        setting = setting._replace(checkpoint=distributed.of_first(setting.checkpoint))
        fine_tune(args, name, setting, *built)


def interrupted_run(folder):
    """The folder of a run to resume: this one, or else the one that holds a checkpoint of it in another precision."""
    def without_precision(path):
        return re.sub("-precision_[a-z0-9]+", "", path.name)
    others = (path for path in sorted(folder.parent.glob("*")) if without_precision(path) == without_precision(folder))
    return folder if is_unfinished(folder) else next(filter(is_unfinished, others), folder)


def prepare(args, folder):
    """The run's Setting; raises UserError for all that can be seen to be wrong without a model."""
    if args.optimizer != "muon" and "--muon_learning_rate" in args.command:  # also where it gives the default
        raise UserError(f"--muon_learning_rate needs --optimizer muon; this run uses {args.optimizer}")
    check_batches(args, check_dataset(args.data_dir))
    facts = records.facts(args)
    records.check_replaceable(folder, facts)
    checkpoint = find_checkpoint(folder, run_identity(facts)) if args.resume and distributed.is_first() else None
    if not args.resume and is_unfinished(folder):
        raise UserError(f"{folder} holds the checkpoint of an unfinished run: add --resume to go on with it, "
                        "or delete it to start again")
    device = select_device(args.device)
    if args.compile:
        check_compiler(device)
    precision, reason = choose_precision(args.precision, device, checkpoint)
    boards = [TensorBoard(folder)] if args.tensorboard else []
    return Setting(folder, facts, copies_in_training_set(args.data_dir), checkpoint, device, precision, reason, boards)


def choose_precision(name, device, checkpoint):
    """As `select_precision`, for a run that may go on from a checkpoint, whose precision "auto" keeps."""
    if checkpoint is None:
        return select_precision(name, device)
    began = checkpoint["precision"]
    # What "auto" finds out by trying could differ from one time to the next.
    precision, reason = select_precision(began if name == "auto" else name, device)
    if precision == began:
        return precision, reason.replace("as asked", "as the run began")
    return precision, (f"{reason}; {began} up to step {checkpoint['progress']['step']}, so that the numbers will "
                       "differ from those of an uninterrupted run")


def fine_tune(args, name, setting, model, head, read_logits, save, train, validation, test):
    """What `run_experiment` says, once all that it needs is there."""
    folder, facts, copies, checkpoint, *_ = setting
    note(count_line(len(train), len(validation), len(test)))
    with memory_advice():
        classifier, described = place(setting, model, read_logits, args)
    started = time.perf_counter()
    classifier, (train, validation, test) = compute_once(args, classifier, head, train, validation, test)
    torch.manual_seed(args.seed)
    optimizer = build_optimizer(args.optimizer, classifier.model, args.learning_rate, args.muon_learning_rate)
    progress = restore(checkpoint, classifier, optimizer) if checkpoint else Progress()
    distributed.seed_apart(args.seed, progress.step)
    progress.seconds += time.perf_counter() - started
    writer = CheckpointWriter(folder, classifier, optimizer, run_identity(facts), args.checkpoint_minutes)
    total_steps = count_steps(len(train), args.batch_size, args.num_epochs, args.max_steps)
    with put_off() as interrupts, training_bar(progress, total_steps, args.batch_size) as bar:
        def save_or_stop(progress):
            writer(progress, now=bool(interrupts))
            if interrupts:
                raise interrupts[0]
        # Of several processes the first saves and stops; the others end when they miss it.
        tasks = ([bar, *setting.boards, save_or_stop] if distributed.is_first() else
                 [lambda progress: distributed.seed_apart(args.seed, progress.step)])
        progress = train_classifier_simple(
            classifier, optimizer, train, validation, num_epochs=args.num_epochs, batch_size=args.batch_size,
            max_steps=args.max_steps, eval_freq=args.eval_freq, eval_iter=args.eval_iter,
            group_by_length=args.group_by_length, accumulate=args.accumulate, progress=progress,
            after_step=lambda progress: [task(progress) for task in tasks])
    print(end_of_training(progress.seconds), flush=True)

    started = time.perf_counter()
    splits = {"train": train, "validation": validation, "test": test}
    logits = {split: predict(reviews, classifier) for split, reviews in splits.items()}
    synchronize(classifier.device)
    seconds = time.perf_counter() - started
    if not distributed.is_first():
        return
    accuracies = {split: accuracy(logits[split], reviews.labels) for split, reviews in splits.items()}
    print(accuracy_lines(accuracies))

    counts = {split: len(reviews) for split, reviews in splits.items()}
    records.write_record(folder, {
        **facts, **described, "name": name,
        "losses": [round(float(loss), 6) for loss in progress.losses], "curve": rounded(progress.curve),
        "epochs": rounded(progress.epochs), "accuracy": accuracies, "reviews": counts,
        "seconds": {"training": progress.seconds, "evaluation": seconds},
        "reviews_per_second": {"training": progress.step * args.batch_size / progress.seconds,
                               "evaluation": sum(counts.values()) / seconds},
        "peak_memory": peak_memory(classifier.device),
    }, copies, test.labels, logits["test"].double().softmax(dim=-1)[:, 1].numpy())
    if args.save_model:
        save_model(folder, save, precision=described["precision"]["used"])
    draw_run(folder)
    writer.remove()
    note(f"Record: {folder / records.RECORD}")


def place(setting, model, read_logits, args):
    """Put the model where and how it shall compute, and tell; returns the Classifier and that part of the record."""
    total, trainable = count_parameters(model)
    device = setting.device
    precision, reason = distributed.of_first((setting.precision, setting.reason))
    note(f"Device: {device} ({hardware(device)})\nPrecision: {precision} ({reason})\n"
         f"Parameters: {total:,}, of which {trainable:,} are trained")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if device.type == "cpu":
        keep_freed_memory()
    if args.compile:
        compile_model(model, device, args.accumulate)
    return Classifier(model.to(device), read_logits, device, precision), {
        "hardware": hardware(device), "precision": {"used": precision, "why": reason},
        "parameters": {"all": total, "trainable": trainable}}


def check_batches(args, num_reviews):
    """Raise UserError where the training set does not fill a batch, or a batch cannot be cut as asked."""
    if num_reviews < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size} is more than the {num_reviews} reviews of the training set")
    if args.batch_size < distributed.size() * args.accumulate:
        processes = f"{distributed.size()} processes with " if distributed.size() > 1 else ""
        raise UserError(f"--batch_size {args.batch_size} is too small for {processes}--accumulate {args.accumulate}: "
                        "each part needs a review")


def rounded(rows):
    """The rows of a curve with as many digits as mean anything."""
    return [{key: round(value, 6) for key, value in row.items()} for row in rows]


@contextmanager
def way_to_go_on(folder, command):
    """Let an interrupt say what to type to go on, where there is something to go on from."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_unfinished(folder):
            error.args = (f"Interrupted; to go on: {command.removesuffix(' --resume')} --resume",)
        raise


@contextmanager
def memory_advice(args=None):
    """Turn running out of memory into advice: about training as `args` say, or about a model that does not fit."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        where = "before training" if args is None else "in training"
        raise UserError(f"out of memory {where}; try {' or '.join(memory_remedies(args))}") from error


def memory_remedies(args=None):
    """What takes less memory: where only the model is there, or in training as `args` say."""
    if args is None:
        return ["a smaller model", "a device with more memory"]
    parts = min(2 * args.accumulate, args.batch_size // distributed.size())
    remedies = [f"--accumulate {parts}"] if parts > args.accumulate else []
    if args.resume:  # nothing else may change
        return remedies or ["a device with more memory"]
    layers = ["--trainable_layers last_block"] if args.trainable_layers == "all" else []
    return [*remedies, "a shorter --context_length", *layers, *([] if remedies else ["a smaller model"])]
