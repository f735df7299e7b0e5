"""One whole run: from a model and three tokenized sets to the printed accuracies and the record."""

import time
from contextlib import contextmanager

import torch

from finetuning import records
from finetuning.checkpoint import CheckpointWriter, load_checkpoint
from finetuning.cli import note
from finetuning.errors import UserError
from finetuning.features import freeze_features, is_fixed
from finetuning.layers import count_parameters
from finetuning.loop import Classifier, Progress, accuracy, predict, train_classifier_simple
from finetuning.optimizers import build_optimizer
from finetuning.plots import draw_run
from finetuning.reviews import copies_in_training_set
from finetuning.runtime import hardware, peak_memory, select_device, select_precision, synchronize
from finetuning.saved import save_model


def run_experiment(args, name, model, head, read_logits, save, train, validation, test):
    """Fine-tune `model` as `args` say, print the published log, and leave the run's record.

    `read_logits(model, batch)` returns the class logits (batch, 2); `head` is the output layer;
    `save(folder)` writes the model's files and returns what else a reader of them must know;
    `train`, `validation` and `test` are IMDbDatasets.
    """
    if len(train) < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(train)} reviews of the training set")
    facts, copies = records.facts(args), copies_in_training_set(args.data_dir)
    folder = records.run_folder(args, name)

    with memory_advice():
        classifier, setting = place(args, model, read_logits)
        started = time.perf_counter()
        if args.trainable_layers == "last_layer" and is_fixed(classifier, train):
            note("Nothing before the output layer learns or varies: computing what it reads, once")
            classifier, (train, validation, test) = freeze_features(classifier, head, train, validation, test)
        torch.manual_seed(args.seed)
        optimizer = build_optimizer(args.optimizer, classifier.model, head, args.learning_rate)
        progress = load_checkpoint(folder, classifier, optimizer, facts) if args.resume else Progress()
        progress.seconds += time.perf_counter() - started
        records.make_folder(folder)
        writer = CheckpointWriter(folder, classifier, optimizer, facts)
        progress = train_classifier_simple(
            classifier, optimizer, train, validation, num_epochs=args.num_epochs, batch_size=args.batch_size,
            max_steps=args.max_steps, eval_freq=args.eval_freq, eval_iter=args.eval_iter,
            group_by_length=args.group_by_length, progress=progress, after_step=writer)
        print(f"Training completed in {progress.seconds / 60:.2f} minutes.", flush=True)

        print("\nEvaluating on the full datasets ...\n", flush=True)
        started = time.perf_counter()
        splits = {"train": train, "validation": validation, "test": test}
        logits = {split: predict(reviews, classifier) for split, reviews in splits.items()}
        synchronize(classifier.device)
        seconds = time.perf_counter() - started
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
    if args.save_model:
        save_model(folder, save, precision=setting["precision"]["used"])
    writer.remove()
    draw_run(folder)
    note(f"Record: {folder / records.RECORD}")


def place(args, model, read_logits):
    """Put the model where and how `args` say, and tell; returns the Classifier and that part of the record."""
    device = select_device(args.device)
    precision, reason = select_precision(args.precision, device)
    total, trainable = count_parameters(model)
    note(f"Device: {device} ({hardware(device)})\nPrecision: {precision} ({reason})\n"
         f"Parameters: {total:,}, of which {trainable:,} are trained")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if args.compile:
        model.compile()
    return Classifier(model.to(device), read_logits, device, precision), {
        "hardware": hardware(device), "precision": {"used": precision, "why": reason},
        "parameters": {"all": total, "trainable": trainable}}


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
            raise UserError("out of memory; try a smaller --batch_size or a shorter --context_length") from error
        raise
