"""Classify texts with the model of a run that was started with --save_model.

    python predict.py results/logreg-counts-seed123 "A film to remember." "A film to forget."
    python predict.py results/logreg-counts-seed123 --csv test.csv > predictions.tsv
    python predict.py results/logreg-counts-seed123 --explain "A film to remember."

Prints one line per text: label, probability of that label, and the beginning of the text; a blank line
of standard input gives a blank line. Texts are truncated, padded and classified like the test reviews
of the run, which therefore get the probabilities in its test_predictions.csv.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import importlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from finetuning.cli import ArgumentParser, run_main, user_path
from finetuning.data.reviews import LABEL_NAMES, iterate_reviews
from finetuning.reporting.saved_models import read_settings
from finetuning.reporting.statistics import predicted_labels
from finetuning.system.console import print_status
from finetuning.system.errors import UserError

TEXTS_PER_CHUNK = 25_000  # a whole test set, so that its reviews are batched as in the run
PREVIEW_CHARS = 80  # characters of a text that are printed
TOP_K = 8  # features that --explain prints for each label


def main(argv: Sequence[str] | None = None) -> None:
    """Load a saved model and print its predictions."""
    args = parse_args(argv)
    folder, settings = read_settings(args.run_folder)
    script, classifier_class = MODEL_TYPES[settings["model_type"]]
    if args.explain and classifier_class is not LinearClassifier:
        raise UserError(
            f"--explain needs a linear model, which train_sklearn_logreg.py trains; the model in {folder} is a "
            f"{settings['model_type']} model"
        )
    classifier = classifier_class(importlib.import_module(script), folder, settings, args.device)
    for lines in read_texts(args):
        texts = [line for line in lines if line.strip()]
        predictions = iter(format_predictions(classifier, texts, args.explain) if texts else [])
        for line in lines:
            print(next(predictions) if line.strip() else "", flush=True)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description="Classify texts with the saved model of a run.")
    add = parser.add_argument
    add("run_folder", type=user_path, metavar="RUN_FOLDER", help="folder of a run that was started with --save_model")
    add("texts", nargs="*", metavar="TEXT", help="a text to classify (default: each line of standard input)")
    add("--csv", type=user_path, metavar="FILE", help="classify the column `text` of this CSV file (default: none)")
    explain = "also print the words that contributed most to each prediction; logistic regression only"
    add("--explain", action="store_true", help=explain)
    add("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:1")
    args = parser.parse_intermixed_args(argv)  # texts may come before and after the flags
    if args.csv and args.texts:
        parser.error("choose one: texts or --csv")
    return args


def read_texts(args: Namespace) -> Iterator[list[str]]:
    """Yield the texts to classify in chunks; raises UserError if a text is empty or cannot be read."""
    if args.csv:
        try:
            for frame in iterate_reviews(args.csv, columns=["text"], chunk_size=TEXTS_PER_CHUNK):
                yield frame["text"].tolist()
        except OSError as error:
            raise UserError(f"cannot read --csv {args.csv}: {error.strerror}") from error
        return
    if not all(text.strip() for text in args.texts):
        raise UserError("a text is empty")
    lines = map(decode_argument, args.texts) if args.texts else read_stdin()
    while texts := list(islice(lines, TEXTS_PER_CHUNK)):
        yield texts


def decode_argument(text: str) -> str:
    """Decode a command-line argument as UTF-8, even if the locale made Python decode it otherwise."""
    try:
        return os.fsencode(text).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise UserError(f"a text is not in UTF-8: {error.reason}") from error


def read_stdin() -> Iterator[str]:
    """Yield the lines of standard input, UTF-8 in any locale, with or without a byte order mark."""
    if sys.stdin is None:
        raise UserError("no text is given, and standard input is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    if sys.stdin.isatty():
        print_status("Type one text per line; Ctrl-D (on Windows Ctrl-Z, Enter) ends")
    try:
        yield from (line.removesuffix("\n") for line in sys.stdin)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not in {error.encoding.upper()}: {error.reason}") from error


def format_predictions(classifier: Any, texts: list[str], explain: bool) -> Iterator[str]:
    """Yield what is printed for each text: label, probability and beginning; with `explain`, also the contributions."""
    explanations = classifier.explain(texts) if explain else [[]] * len(texts)
    for text, positive, explanation in zip(texts, classifier(texts), explanations, strict=True):
        label = int(predicted_labels(positive))
        preview = " ".join(text.split())[:PREVIEW_CHARS]
        prediction = f"{LABEL_NAMES[label]}\t{positive if label else 1 - positive:.6f}\t{preview}"
        yield "\n".join([prediction, *(f"\t{line}" for line in explanation)])


class NeuralClassifier:
    """A saved GPT or encoder."""

    def __init__(self, script: ModuleType, folder: Path, settings: dict, device: str):
        from finetuning.performance.device import select_device, select_saved_precision, set_matmul_precision
        from finetuning.performance.inference import Classifier

        torch_device = select_device(device)
        precision = select_saved_precision(settings["precision"], settings.get("hardware", ""), torch_device)
        set_matmul_precision(precision)
        model, pooling, self.to_dataset = script.load_finetuned(folder, settings)
        skip_padding = settings.get("skip_padding", False)
        self.classifier = Classifier(
            model.to(torch_device), pooling, torch_device, precision, skip_padding=skip_padding
        )

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the probabilities (texts,) of being positive."""
        from finetuning.performance.inference import predict_logits

        return predict_logits(self.to_dataset(texts), self.classifier).double().softmax(dim=-1)[:, 1].numpy()


class LinearClassifier:
    """A saved logistic regression, which can explain its predictions."""

    def __init__(self, script: ModuleType, folder: Path, settings: dict, device: str):
        self.vectorizer, self.model = script.load_finetuned(folder, settings)
        self.feature_names = cache(self.vectorizer.get_feature_names_out)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the probabilities (texts,) of being positive."""
        return self.model.predict_proba(self.vectorizer.transform(texts))[:, 1]

    def explain(self, texts: list[str]) -> list[list[str]]:
        """Return lines for each text: the top contributions to its log-odds for each label, and their sum."""
        contributions = self.vectorizer.transform(texts).multiply(self.model.coef_).tocsr()
        return [self.format_contributions(row.indices, row.data) for row in contributions]

    def format_contributions(self, features: np.ndarray, contributions: np.ndarray) -> list[str]:
        """Return a line for each label with its top features, and a line with the log-odds of a positive review."""
        lines, ranking = [], np.argsort(-np.abs(contributions), kind="stable")
        for label, label_name in enumerate(LABEL_NAMES):
            top = [index for index in ranking if (contributions[index] > 0) == label][:TOP_K]
            names = self.feature_names()[features[top]]
            pairs = [f"{name} {contributions[index]:+.2f}" for name, index in zip(names, top, strict=True)]
            lines.append(f"{label_name}: {', '.join(pairs) or 'none'}")
        total, intercept = contributions.sum(), self.model.intercept_[0]
        log_odds = f"intercept {intercept:+.2f}: log-odds {total + intercept:+.2f}"
        return [*lines, f"all {len(contributions)} features {total:+.2f}, {log_odds}"]


# By the model type in the settings: the script that loads the model and the class that runs it.
MODEL_TYPES = {
    "gpt": ("train_gpt", NeuralClassifier),
    "encoder": ("train_bert_hf", NeuralClassifier),
    "linear": ("train_sklearn_logreg", LinearClassifier),
}


if __name__ == "__main__":
    run_main(main)
