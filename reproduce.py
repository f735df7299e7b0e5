"""The experiments as data, and the README's results table made from their records.

    python reproduce.py --table

writes the table between the two markers in README.md anew. Every measured number in it comes
from a record under results/; where there is none, the table says so.
"""

from pathlib import Path
from typing import NamedTuple

from finetuning.cli import ArgumentParser, run
from finetuning.errors import UserError
from finetuning.files import written_whole
from finetuning.records import RECORD, read_record

MARKERS = "<!-- results: written by reproduce.py --table -->", "<!-- end of results -->"

REVIEWS = {"train": 35_000, "validation": 5_000, "test": 10_000}


class Experiment(NamedTuple):
    """A row of the results table."""

    number: int
    title: str  # as published
    loads: str  # what the command loads
    published: float | None  # test accuracy in percent; None for a row of this project's own
    command: str
    name: str  # of the run, and of its folder under results/


EXPERIMENTS = (
    Experiment(1, "124M GPT-2 Baseline", "`openai-community/gpt2`, 124.4M", 91.88,
               "python train_gpt.py --trainable_layers all --num_epochs 1", "gpt2-small-124M-all-seed123"),
    Experiment(2, "340M BERT", "`google-bert/bert-base-uncased`, 109.5M", 90.89,
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model bert", "bert-all-seed123"),
    Experiment(3, "66M DistilBERT", "`distilbert/distilbert-base-uncased`, 67.0M", 91.40,
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model distilbert",
               "distilbert-all-seed123"),
    Experiment(4, "355M RoBERTa", "`FacebookAI/roberta-large`, 355.4M", 92.95,
               "python train_bert_hf.py --trainable_layers last_block --num_epochs 1 --model roberta",
               "roberta-last_block-seed123"),
    Experiment(5, "304M DeBERTa-v3", "`microsoft/deberta-v3-base`, 184.4M", 94.69,
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model deberta-v3-base",
               "deberta-v3-base-all-seed123"),
    Experiment(6, "149M ModernBERT Base", "`answerdotai/ModernBERT-base`, 149.6M", 93.79,
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-base",
               "modernbert-base-all-seed123"),
    Experiment(7, "395M ModernBERT Large", "`answerdotai/ModernBERT-large`, 395.8M", 95.07,
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-large",
               "modernbert-large-all-seed123"),
    Experiment(8, "Logistic Regression Baseline", "scikit-learn, bag of words", 88.85,
               "python train_sklearn_logreg.py", "logreg-counts-seed123"),
    Experiment(9, "N-gram Logistic Regression", "scikit-learn, 1- to 3-grams weighted by naive Bayes", None,
               "python train_sklearn_logreg.py --features nb-ngrams", "logreg-nb-ngrams-seed123"),
)


def main(argv=None):
    parse_args(argv)
    folder = Path(__file__).parent
    update(folder / "README.md", results_table(folder / "results"))


def parse_args(argv=None):
    parser = ArgumentParser(description="Write the README's results table from the records under results/.")
    parser.add_argument("--table", action="store_true", required=True, help="write the table in README.md anew")
    return parser.parse_args(argv)


def results_table(results):
    """The Markdown table of all experiments, measured values from the records in the folder `results`."""
    lines = ["| # | model | what the command loads | published | measured here (95% interval) | on, in |",
             "|---|---|---|---|---|---|"]
    for row in EXPERIMENTS:
        measured = measured_cells(results, row)
        published = f"{row.published:.2f}%" if row.published else "(own row)"
        lines.append(f"| {row.number} | {row.title} | {row.loads} | {published} | {measured} |")
    return "\n".join(lines)


def measured_cells(results, row):
    """The cells of a row that come from its record."""
    folder = results / row.name
    if not folder.exists():
        return "not measured yet | "
    record = read_record(folder)
    if record["reviews"] != REVIEWS:
        raise UserError(f"{folder / RECORD} is not of the published split: it has {record['reviews']} reviews")
    low, high = record["test_interval_95"]
    minutes = sum(record["seconds"].values()) / 60
    return (f"[{record['accuracy']['test']:.2%}]({folder.parent.name}/{row.name}/{RECORD}) ({low:.2%} to {high:.2%}) "
            f"| {record['hardware']}, {minutes:.1f} min")


def update(page, table):
    """Replace what stands between the markers of a page; raises UserError where it has no markers."""
    text = page.read_text(encoding="utf-8")
    start, end = MARKERS
    if text.count(start) != 1 or text.count(end) != 1:
        raise UserError(f"{page} must have the lines {start} and {end} once each")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    with written_whole(page) as (temporary,):
        temporary.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    run(main)
