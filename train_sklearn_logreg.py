"""Train the baselines without a neural network: a dummy, and logistic regression on word counts or n-grams.

    python train_sklearn_logreg.py
    python train_sklearn_logreg.py --features nb-ngrams

run the published logistic regression baseline and a stronger one.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.base import TransformerMixin
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from finetuning.cli import ArgumentParser, add_run_arguments, run_main
from finetuning.data.ngrams import NBLogCountRatio
from finetuning.data.reviews import count_line, duplicated_in_training_set, load_dataframes
from finetuning.reporting import records
from finetuning.reporting.plots import plot_run
from finetuning.reporting.published_log import accuracy_lines
from finetuning.reporting.saved_models import save_model
from finetuning.system.console import print_status
from finetuning.system.environment import cpu_name, peak_rss, usable_cpus
from finetuning.system.errors import UserError
from finetuning.system.files import exclusive_dir

WORDS, ARRAYS = "vocabulary.json", "arrays.safetensors"  # files of a saved model


def count_vectorizer(vocabulary: list[str] | None = None) -> CountVectorizer:
    """Return a CountVectorizer, with a fixed vocabulary if one is given."""
    return CountVectorizer(vocabulary=vocabulary, dtype=float)  # LogisticRegression would copy integer counts


def ngram_vectorizer(words: list[str], ngram_keys: np.ndarray, log_count_ratio: np.ndarray) -> NBLogCountRatio:
    """Return a fitted NBLogCountRatio from its saved state."""
    vectorizer = NBLogCountRatio()
    vectorizer.vocabulary_ = {word: index for index, word in enumerate(words, 1)}
    vectorizer.ngram_keys_, vectorizer.log_count_ratio_ = pd.Index(ngram_keys), log_count_ratio
    return vectorizer


@dataclass(frozen=True)
class Features:
    """A vectorizer, the settings of the logistic regression on its features, and how its state is saved."""

    title: str  # of the classifier in the log
    vectorizer: Callable  # () -> unfitted vectorizer
    settings: dict  # of LogisticRegression
    state: Callable  # fitted vectorizer -> (list of words, {name: array})
    restore: Callable  # (list of words, **arrays) -> fitted vectorizer


FEATURES = {
    # The published solver, lbfgs, stops near the optimum of this convex loss; Newton's method comes closer
    # in a third of the time, and its accuracies are within 0.02 points of those at the optimum.
    "counts": Features(
        title="Logistic regression classifier:",
        vectorizer=count_vectorizer,
        settings={"solver": "newton-cg"},
        state=lambda vectorizer: (vectorizer.get_feature_names_out().tolist(), {}),
        restore=count_vectorizer,
    ),
    # Settings chosen on the validation set.
    "nb-ngrams": Features(
        title="N-gram logistic regression classifier:",
        vectorizer=NBLogCountRatio,
        settings={"solver": "liblinear", "dual": True, "C": 100, "tol": 0.1},
        state=lambda vectorizer: (
            [*vectorizer.vocabulary_],
            {"ngram_keys": vectorizer.ngram_keys_.to_numpy(), "log_count_ratio": vectorizer.log_count_ratio_},
        ),
        restore=ngram_vectorizer,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and evaluate the dummy classifier and logistic regression, then write the record."""
    args = parse_args(argv)
    name = run_name(args)
    folder = records.run_folder(args, name)
    with exclusive_dir(folder, "--output_dir"):
        train, validation, test = load_dataframes(args.data_dir)
        metadata = records.run_metadata(args)
        records.check_replaceable(folder, metadata)
        counts = {"train": len(train), "validation": len(validation), "test": len(test)}
        print_status(count_line(*counts.values()))

        started = time.perf_counter()
        vectorizer = FEATURES[args.features].vectorizer()
        train_set = fit_features(vectorizer, train, args.features)
        dummy = DummyClassifier(strategy="most_frequent").fit(*train_set)
        model = logistic_regression(args.features, args.seed).fit(*train_set)
        trained = time.perf_counter()

        validation_set, test_set = ((vectorizer.transform(df["text"]), df["label"]) for df in (validation, test))
        print("Dummy classifier:")
        eval_model(dummy, train_set, validation_set, test_set)
        print(f"\n\n{FEATURES[args.features].title}")
        accuracies = eval_model(model, train_set, validation_set, test_set)
        seconds = {"training": trained - started, "evaluation": time.perf_counter() - trained}

        record = {
            **metadata,
            "name": name,
            **model_info(model),
            "accuracy": accuracies,
            "reviews": counts,
            "seconds": seconds,
            "reviews_per_second": records.reviews_per_second(counts["train"], sum(counts.values()), seconds),
            "peak_memory": peak_rss(),
        }
        probabilities = model.predict_proba(test_set[0])[:, 1]
        records.write_record(folder, record, duplicated_in_training_set(args.data_dir), test["label"], probabilities)
        if args.save_model:
            save_model(folder, partial(save, args.features, vectorizer, model), precision=None, hardware=None)
        plot_run(folder)
        print_status(f"Record: {folder / records.RECORD}")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description="Dummy and logistic regression baselines on the IMDb movie reviews.")
    features = "counts: word counts, as published; nb-ngrams: 1- to 3-grams weighted by naive Bayes"
    parser.add_argument("--features", choices=list(FEATURES), default="counts", help=features)
    add_run_arguments(parser)
    return parser.parse_args(argv)


def run_name(args: Namespace) -> str:
    """Return the run's name: features and seed."""
    return f"logreg-{args.features}-seed{args.seed}"


def fit_features(vectorizer: TransformerMixin, train: pd.DataFrame, name: str) -> tuple[sparse.csr_matrix, pd.Series]:
    """Fit the vectorizer and return (features, labels); raises UserError if the texts give no features."""
    try:
        # Free the texts: the solver needs the memory.
        return vectorizer.fit_transform(train.pop("text"), train["label"]), train["label"]
    except ValueError as error:
        raise UserError(f"cannot compute --features {name} of the training set: {error}") from error


def logistic_regression(features: str, seed: int | None = None) -> LogisticRegression:
    """Return an unfitted LogisticRegression with the settings for these features."""
    return LogisticRegression(max_iter=1000, random_state=seed, **FEATURES[features].settings)


def eval_model(model, train, validation, test):
    """Print and return a fitted model's accuracies; each set is (features, labels)."""
    accuracies = {"train": model.score(*train), "validation": model.score(*validation), "test": model.score(*test)}
    print(accuracy_lines(accuracies, "Accuracy"))
    return accuracies


def model_info(model: LogisticRegression) -> dict:
    """Return what a record says of the hardware and the model."""
    num_parameters = model.coef_.size + model.intercept_.size
    return {
        "hardware": f"{cpu_name()}, {usable_cpus()} CPUs",
        "precision": None,
        "parameters": {"total": num_parameters, "trainable": num_parameters},
        "losses": [],
        "eval_history": [],
        "epoch_metrics": [],
    }


def save(features: str, vectorizer: TransformerMixin, model: LogisticRegression, folder: Path) -> dict:
    """Write a fitted model to a folder; return the settings to load it with."""
    words, arrays = FEATURES[features].state(vectorizer)
    (folder / WORDS).write_text(json.dumps(words), encoding="utf-8")
    save_file({"coefficients": model.coef_, "intercept": model.intercept_, **arrays}, folder / ARRAYS)
    return {"model_type": "linear", "features": features}


def load_finetuned(folder: Path, settings: dict) -> tuple[TransformerMixin, LogisticRegression]:
    """Load what `save` wrote: (vectorizer, LogisticRegression)."""
    arrays = load_file(folder / ARRAYS)
    model = logistic_regression(settings["features"])
    model.coef_, model.intercept_ = arrays.pop("coefficients"), arrays.pop("intercept")
    model.classes_ = np.arange(2)
    words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
    return FEATURES[settings["features"]].restore(words, **arrays), model


if __name__ == "__main__":
    run_main(main)
