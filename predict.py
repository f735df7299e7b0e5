"""Classify texts with the model of a run that was made with --save_model.

    python predict.py results/logreg-counts-seed123 "A film to remember." "A film to forget."
    python predict.py results/logreg-counts-seed123 --csv test.csv > answers.tsv
    python predict.py results/logreg-counts-seed123 --explain "A film to remember."

For each text it prints a line: label, probability of that label, and how the text begins; for a
blank line of standard input, a blank line. Texts are cut, padded and classified as the run's own test
reviews were, so that these get the probabilities that stand in the run's test_predictions.csv.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import importlib
import io
import os
import sys
from functools import cache
from itertools import islice

import numpy as np

from finetuning.cli import ArgumentParser, note, run, user_path
from finetuning.errors import UserError
from finetuning.reviews import CHUNK, LABELS, iterate_reviews
from finetuning.saved import read_settings
from finetuning.uncertainty import answers

BEGINNING = 80  # characters of a text that are shown
REASONS = 8  # features for each label that --explain shows


def main(argv=None):
    args = parse_args(argv)
    folder, settings = read_settings(args.run_folder)
    script, classifier = FAMILIES[settings["family"]]
    if args.explain and classifier is not Linear:
        raise UserError(f"--explain needs a linear model, whose words can be weighed one by one; the model in "
                        f"{folder} is none (train_sklearn_logreg.py makes one)")
    classifier = classifier(importlib.import_module(script), folder, settings, args.device)
    for lines in texts_of(args):
        texts = [line for line in lines if line.strip()]
        predictions = iter(describe(classifier, texts, args.explain) if texts else [])
        for line in lines:
            print(next(predictions) if line.strip() else "", flush=True)


def describe(classifier, texts, explain):
    """Yield what is printed for each text: its label, probability and beginning; below it, to `explain`, the reasons.
    """
    reasons = classifier.reasons(texts) if explain else [[]] * len(texts)
    for text, positive, lines in zip(texts, classifier(texts), reasons, strict=True):
        label = int(answers(positive))
        beginning = " ".join(text.split())[:BEGINNING]
        first = f"{LABELS[label]}\t{positive if label else 1 - positive:.6f}\t{beginning}"
        yield "\n".join([first, *(f"\t{line}" for line in lines)])


def parse_args(argv=None):
    parser = ArgumentParser(description="Classify texts with the saved model of a run.")
    parser.add_argument("run_folder", type=user_path, metavar="RUN_FOLDER",
                        help="folder of a run that was made with --save_model")
    parser.add_argument("texts", nargs="*", metavar="TEXT",
                        help="a text to classify (default: each line of standard input)")
    parser.add_argument("--csv", type=user_path, metavar="FILE",
                        help="classify the column `text` of a CSV file instead (default: none)")
    parser.add_argument("--explain", action="store_true",
                        help="show which words push the decision of a linear model, and how far (in log-odds)")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:1")
    args = parser.parse_intermixed_args(argv)  # texts may come before and after the flags
    if args.csv and args.texts:
        parser.error("choose one: texts or --csv")
    return args


def texts_of(args):
    """Yield the texts to classify in lists of at most CHUNK; raises UserError where one is empty or cannot be read."""
    if args.csv:
        try:
            yield from (frame["text"].tolist() for frame in iterate_reviews(args.csv, columns=["text"]))
        except OSError as error:
            raise UserError(f"cannot read --csv {args.csv}: {error.strerror}") from error
        return
    if not all(text.strip() for text in args.texts):
        raise UserError("a text is empty")
    lines = map(decode_argument, args.texts) if args.texts else lines_of_standard_input()
    while texts := list(islice(lines, CHUNK)):
        yield texts


def decode_argument(text):
    """Return an argument of the command line as UTF-8, whatever encoding the locale made Python read it in."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"a text is not in UTF-8: {error.reason}") from error


def lines_of_standard_input():
    """Yield the lines of standard input, which is UTF-8 in any locale, with or without a byte order mark."""
    if sys.stdin is None:
        raise UserError("no text is given, and standard input is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    if sys.stdin.isatty():
        note("Type a text on each line; Ctrl-D (on Windows Ctrl-Z, Enter) ends")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not in {error.encoding.upper()}: {error.reason}") from error


class Neural:
    """A GPT or an encoder: called with texts, it returns their probabilities of being positive."""

    def __init__(self, script, folder, settings, device):
        from finetuning.loop import Classifier
        from finetuning.runtime import select_device, select_precision
        device = select_device(device)
        # What is learned in bf16 may be used where bf16 is slow or absent, what is learned in fp32 stays in fp32.
        precision = select_precision("auto", device)[0] if settings["precision"] == "bf16" else "fp32"
        model, read_logits, self.dataset = script.load_saved(folder, settings)
        self.classifier = Classifier(model.to(device), read_logits, device, precision)

    def __call__(self, texts):
        from finetuning.loop import predict
        return predict(self.dataset(texts), self.classifier).double().softmax(dim=-1)[:, 1].numpy()


class Linear:
    """A logistic regression; it can give its reasons."""

    def __init__(self, script, folder, settings, device):
        self.vectorizer, self.model = script.load_saved(folder, settings)
        self.names = cache(self.vectorizer.get_feature_names_out)

    def __call__(self, texts):
        return self.model.predict_proba(self.vectorizer.transform(texts))[:, 1]

    def reasons(self, texts):
        """For each text the lines that explain its log-odds: what pushes to either label most, and the intercept."""
        pushes = self.vectorizer.transform(texts).multiply(self.model.coef_).tocsr()
        return [self.lines(row.indices, row.data) for row in pushes]

    def lines(self, columns, pushes):
        """The strongest of a text's pushes, to 1 where positive, as a line for each label, and the rest in a sum."""
        lines, order = [], np.argsort(-np.abs(pushes), kind="stable")
        for label, name in enumerate(LABELS):
            strongest = [place for place in order if (pushes[place] > 0) == label][:REASONS]
            names = self.names()[columns[strongest]]
            words = ", ".join(f"{name} {pushes[place]:+.2f}" for name, place in zip(names, strongest, strict=True))
            lines.append(f"{name}: {words or 'nothing'}")
        intercept = self.model.intercept_[0]
        return [*lines, f"all {len(pushes)} together {pushes.sum():+.2f}, with any text's {intercept:+.2f}: "
                        f"log-odds {pushes.sum() + intercept:+.2f}"]


# How a model is run, and which script reads its files, by the family that its settings name.
FAMILIES = {"gpt": ("train_gpt", Neural), "encoder": ("train_bert_hf", Neural),
            "linear": ("train_sklearn_logreg", Linear)}

if __name__ == "__main__":
    run(main)
