"""The baselines without a neural network: a dummy, and logistic regression on word counts.

    python train_sklearn_logreg.py

gives the published logistic regression row.
"""

import time

from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from finetuning import records
from finetuning.cli import ArgumentParser, add_run_arguments, note, run
from finetuning.machine import cpu_name, process_peak_memory, usable_cpus
from finetuning.reviews import load_dataframes


def main(argv=None):
    args = parse_args(argv)
    train, validation, test = load_dataframes(args.data_dir)
    facts = records.facts(args)
    name = f"logreg-counts-seed{args.seed}"
    folder = records.run_folder(args, name)
    records.make_folder(folder)

    started = time.perf_counter()
    vectorizer = CountVectorizer(dtype=float)  # LogisticRegression would convert counts to floats anyway
    train_set = vectorizer.fit_transform(train["text"]), train["label"]
    dummy = DummyClassifier(strategy="most_frequent").fit(*train_set)
    # The published solver, lbfgs, stops near the optimum of this convex loss; Newton's method comes
    # closer in half the time, so close that rounding does not show in the printed digits.
    model = LogisticRegression(solver="newton-cg", tol=1e-6, max_iter=1000, random_state=args.seed).fit(*train_set)
    trained = time.perf_counter()

    sets = [train_set, *((vectorizer.transform(frame["text"]), frame["label"]) for frame in (validation, test))]
    print("Dummy classifier:")
    eval_model(dummy, *sets)
    print("\nLogistic regression classifier:")
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
    }, test["label"], model.predict_proba(sets[2][0])[:, 1])
    note(f"Record: {folder / records.RECORD}")


def parse_args(argv=None):
    parser = ArgumentParser(description="Dummy and logistic regression baselines on the IMDb movie reviews.")
    add_run_arguments(parser)
    return parser.parse_args(argv)


def eval_model(model, train, validation, test):
    """Print and return a fitted model's accuracies; each set is `(features, labels)`."""
    accuracies = {"train": model.score(*train), "validation": model.score(*validation), "test": model.score(*test)}
    print(f"Training Accuracy: {accuracies['train']:.2%}")
    print(f"Validation Accuracy: {accuracies['validation']:.2%}")
    print(f"Test Accuracy: {accuracies['test']:.2%}")
    return accuracies


if __name__ == "__main__":
    run(main)
