"""One whole run: from a model and three tokenized sets to the printed accuracies and the record."""

import time
from contextlib import contextmanager

import torch

from finetuning import distributed, records
from finetuning.checkpoint import CheckpointWriter, load_checkpoint
from finetuning.cli import note
from finetuning.console import training_bar
from finetuning.errors import UserError
from finetuning.features import freeze_features, is_fixed
from finetuning.layers import count_parameters
from finetuning.loop import Classifier, Progress, accuracy, count_steps, predict, train_classifier_simple
from finetuning.optimizers import build_optimizer
from finetuning.plots import draw_run
from finetuning.reviews import copies_in_training_set
from finetuning.runtime import hardware, peak_memory, select_device, select_precision, synchronize
from finetuning.tensorboard import TensorBoard


@distributed.processes()
def run_experiment(args, name, build):
    """Fine-tune a model as `args` say, print the published log, and leave the run's record.

    `build(args)` returns (model, head, read_logits, training set, validation set, test set): `head`
    is the model's output layer, `read_logits(model, batch)` its class logits (batch, 2), and the
    sets are IMDbDatasets.
    """
    with distributed.first_process_first():
        model, head, read_logits, train, validation, test = build(args)
    check_batches(args, len(train))
    facts, copies = records.facts(args), copies_in_training_set(args.data_dir)
    folder = records.run_folder(args, name)
    boards = [TensorBoard(folder)] if args.tensorboard else []

    with memory_advice():
        classifier, setting = place(args, model, read_logits)
        started = time.perf_counter()
        if args.trainable_layers == "last_layer" and is_fixed(classifier, train):
            note("Nothing before the output layer learns or varies: computing what it reads, once")
            classifier, (train, validation, test) = freeze_features(classifier, head, train, validation, test)
        torch.manual_seed(args.seed)
        optimizer = build_optimizer(args.optimizer, classifier.model, head, args.learning_rate)
        progress = load_checkpoint(folder, classifier, optimizer, facts) if args.resume else Progress()
        distributed.seed_apart(args.seed, progress.step)
        progress.seconds += time.perf_counter() - started
        records.make_folder(folder)
        writer = CheckpointWriter(folder, classifier, optimizer, facts)
        total_steps = count_steps(len(train), args.batch_size, args.num_epochs, args.max_steps)
        with training_bar(progress, total_steps, args.batch_size) as bar:
            tasks = ([bar, *boards, writer] if distributed.is_first() else
                     [lambda progress: distributed.seed_apart(args.seed, progress.step)])
            progress = train_classifier_simple(
                classifier, optimizer, train, validation, num_epochs=args.num_epochs, batch_size=args.batch_size,
                max_steps=args.max_steps, eval_freq=args.eval_freq, eval_iter=args.eval_iter,
                group_by_length=args.group_by_length, accumulate=args.accumulate, progress=progress,
                after_step=lambda progress: [task(progress) for task in tasks])
        print(f"Training completed in {progress.seconds / 60:.2f} minutes.", flush=True)

        print("\nEvaluating on the full datasets ...\n", flush=True)
        started = time.perf_counter()
        splits = {"train": train, "validation": validation, "test": test}
        logits = {split: predict(reviews, classifier) for split, reviews in splits.items()}
        synchronize(classifier.device)
        seconds = time.perf_counter() - started
    if not distributed.is_first():
        return
    accuracies = {split: accuracy(logits[split], reviews.labels) for split, reviews in splits.items()}
    print(f"Training accuracy: {accuracies['train']:.2%}")
    print(f"Validation accuracy: {accuracies['validation']:.2%}")
    print(f"Test accuracy: {accuracies['test']:.2%}")

    counts = {split: len(reviews) for split, reviews in splits.items()}
    records.write_record(folder, {
        **facts, **setting, "name": name,
        "losses": [round(float(loss), 6) for loss in progress.losses], "curve": rounded(progress.curve),
        "epochs": rounded(progress.epochs), "accuracy": accuracies, "reviews": counts,
        "seconds": {"training": progress.seconds, "evaluation": seconds},
        "reviews_per_second": {"training": progress.step * args.batch_size / progress.seconds,
                               "evaluation": sum(counts.values()) / seconds},
        "peak_memory": peak_memory(classifier.device),
    }, copies, test.labels, logits["test"].double().softmax(dim=-1)[:, 1].numpy())
    writer.remove()
    draw_run(folder)
    note(f"Record: {folder / records.RECORD}")


def place(args, model, read_logits):
    """Put the model where and how `args` say, and tell; returns the Classifier and that part of the record."""
    device = select_device(args.device)
    precision, reason = distributed.of_first(select_precision(args.precision, device))
    total, trainable = count_parameters(model)
    note(f"Device: {device} ({hardware(device)})\nPrecision: {precision} ({reason})\n"
         f"Parameters: {total:,}, of which {trainable:,} are trained")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if args.compile:
        model.compile()
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
def memory_advice():
    """Turn running out of memory into advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise UserError("out of memory; try --accumulate 2 or more, a smaller --batch_size or a "
                            "shorter --context_length") from error
        raise
