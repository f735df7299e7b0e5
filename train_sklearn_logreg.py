"""The baselines without a neural network: a dummy, and logistic regression on word counts or n-grams.

    python train_sklearn_logreg.py
    python train_sklearn_logreg.py --features nb-ngrams

give the published logistic regression row, and a stronger one.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from finetuning import records
from finetuning.cli import ArgumentParser, add_run_arguments, note, run
from finetuning.console import accuracy_lines
from finetuning.errors import UserError
from finetuning.files import held
from finetuning.machine import cpu_name, process_peak_memory, usable_cpus
from finetuning.ngrams import NBLogCountRatio
from finetuning.plots import draw_run
from finetuning.reviews import copies_in_training_set, count_line, load_dataframes
from finetuning.saved import save_model

WORDS, ARRAYS = "vocabulary.json", "arrays.safetensors"


def count_vectorizer(vocabulary=None):
    """Return a CountVectorizer, with a fixed vocabulary if one is given."""
    return CountVectorizer(vocabulary=vocabulary, dtype=float)  # floats, since LogisticRegression would convert ints


def ngram_vectorizer(words, ngram_keys, log_count_ratio):
    """Return a fitted NBLogCountRatio from its saved state."""
    vectorizer = NBLogCountRatio()
    vectorizer.vocabulary_ = {word: index for index, word in enumerate(words, 1)}
    vectorizer.ngram_keys_, vectorizer.log_count_ratio_ = pd.Index(ngram_keys), log_count_ratio
    return vectorizer


@dataclass(frozen=True)
class Features:
    """A vectorizer, the settings of the logistic regression on its features, and how its state is saved."""

    title: str
    vectorizer: Callable
    settings: dict
    state: Callable  # fitted vectorizer -> (list of words, {name: array})
    restore: Callable  # (list of words, **arrays) -> fitted vectorizer


FEATURES = {
    # The published solver, lbfgs, stops near the optimum of this convex loss; Newton's method comes closer
    # in a third of the time, within 0.02 points of the accuracies at the optimum.
    "counts": Features(
        "Logistic regression classifier:", count_vectorizer, {"solver": "newton-cg"},
        state=lambda vectorizer: (vectorizer.get_feature_names_out().tolist(), {}), restore=count_vectorizer),
    # Settings chosen on the validation set.
    "nb-ngrams": Features(
        "N-gram logistic regression classifier:", NBLogCountRatio,
        {"solver": "liblinear", "dual": True, "C": 100, "tol": 0.1},
        state=lambda vectorizer: ([*vectorizer.vocabulary_], {"ngram_keys": vectorizer.ngram_keys_.to_numpy(),
                                                              "log_count_ratio": vectorizer.log_count_ratio_}),
        restore=ngram_vectorizer),
}


def main(argv=None):
    args = parse_args(argv)
    name = run_name(args)
    folder = records.run_folder(args, name)
    with held(folder, "--output_dir"):
        run_baselines(args, name, folder)


def run_baselines(args, name, folder):
    """Fit both classifiers, print the published log, and leave the run's record."""
    train, validation, test = load_dataframes(args.data_dir)
    facts = records.facts(args)
    records.check_replaceable(folder, facts)
    note(count_line(len(train), len(validation), len(test)))

    started = time.perf_counter()
    features = FEATURES[args.features]
    vectorizer = features.vectorizer()
    try:
        # Free the texts: the solver needs the memory.
        train_set = vectorizer.fit_transform(train.pop("text"), train["label"]), train["label"]
    except ValueError as error:
        raise UserError(f"cannot compute --features {args.features} of the training set: {error}") from error
    dummy = DummyClassifier(strategy="most_frequent").fit(*train_set)
    model = logistic_regression(args.features, args.seed).fit(*train_set)
    trained = time.perf_counter()

    sets = [train_set, *((vectorizer.transform(frame["text"]), frame["label"]) for frame in (validation, test))]
    print("Dummy classifier:")
    eval_model(dummy, *sets)
    print(f"\n\n{features.title}")
    accuracies = eval_model(model, *sets)
    finished = time.perf_counter()

    counts = {"train": len(train), "validation": len(validation), "test": len(test)}
    seconds = {"training": trained - started, "evaluation": finished - trained}
    records.write_record(folder, {
        **facts, "name": name, "hardware": f"{cpu_name()}, {usable_cpus()} CPUs", "precision": None,
        "parameters": dict.fromkeys(("all", "trainable"), model.coef_.size + model.intercept_.size),
        "losses": [], "curve": [], "epochs": [], "accuracy": accuracies, "reviews": counts, "seconds": seconds,
        "reviews_per_second": {"training": counts["train"] / seconds["training"],
                               "evaluation": sum(counts.values()) / seconds["evaluation"]},
        "peak_memory": process_peak_memory(),
    }, copies_in_training_set(args.data_dir), test["label"], model.predict_proba(sets[2][0])[:, 1])
    if args.save_model:
        save_model(folder, partial(save, args.features, vectorizer, model), precision=None)
    draw_run(folder)
    note(f"Record: {folder / records.RECORD}")


def parse_args(argv=None):
    parser = ArgumentParser(description="Dummy and logistic regression baselines on the IMDb movie reviews.")
    parser.add_argument("--features", choices=list(FEATURES), default="counts",
                        help="counts: of words, as published; nb-ngrams: 1- to 3-grams weighted by naive Bayes")
    add_run_arguments(parser)
    return parser.parse_args(argv)


def run_name(args):
    """The run's name: features and seed."""
    return f"logreg-{args.features}-seed{args.seed}"


def logistic_regression(features, seed=None):
    """A LogisticRegression with the settings for these features."""
    return LogisticRegression(max_iter=1000, random_state=seed, **FEATURES[features].settings)


def save(features, vectorizer, model, folder):
    """Write the files of a fitted model to a folder; returns what else they mean."""
    words, arrays = FEATURES[features].state(vectorizer)
    (folder / WORDS).write_text(json.dumps(words), encoding="utf-8")
    save_file({"coefficients": model.coef_, "intercept": model.intercept_, **arrays}, folder / ARRAYS)
    return {"family": "linear", "features": features}


def load_saved(folder, settings):
    """A model that `save` wrote: (vectorizer, LogisticRegression)."""
    arrays = load_file(folder / ARRAYS)
    model = logistic_regression(settings["features"])
    model.coef_, model.intercept_ = arrays.pop("coefficients"), arrays.pop("intercept")
    model.classes_ = np.arange(2)
    words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
    return FEATURES[settings["features"]].restore(words, **arrays), model


def eval_model(model, train, validation, test):
    """Print and return a fitted model's accuracies; each set is `(features, labels)`."""
    accuracies = {"train": model.score(*train), "validation": model.score(*validation), "test": model.score(*test)}
    print(accuracy_lines(accuracies, "Accuracy"))
    return accuracies


if __name__ == "__main__":
    run(main)
