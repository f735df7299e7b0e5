"""The experiments as data: their commands, published results and run folders."""

from pathlib import Path
from typing import NamedTuple

SEED = 123


class PublishedLog(NamedTuple):
    """Accuracies in percent and minutes of a published log; the test accuracy is the Experiment's."""

    train: float
    validation: float
    minutes: float | None = None  # of training
    epoch: tuple[float, float] | None = None  # training and validation accuracy after the epoch, on 20 batches
    losses: tuple[tuple[float, float], ...] = ()  # training and validation loss at each of log_sections.PUBLISHED_STEPS
    dummy: tuple[float, float, float] | None = None  # accuracies of the dummy classifier, by split


class Experiment(NamedTuple):
    """A command to run, with the published result if there is one."""

    number: int
    title: str
    command: str
    name: str  # of the run, without its seed
    hub_id: str | None = None  # of the pretrained model
    published: float | None = None  # test accuracy in percent
    log: PublishedLog | None = None
    benchmark: str | None = None  # key in benchmarks/speed.json
    former_name: str | None = None  # of the run, in records from before it was renamed
    data_dir: str = "."  # folder of the CSV files

    def run_folder(self, seed: int) -> str:
        """Return the folder of the run with this seed, relative to the project's."""
        return Path("results", self.data_dir, f"{self.name}-seed{seed}").as_posix()

    def command_line(self, seed: int) -> str:
        """Return the command of the run with this seed, as the run records it."""
        seed_flag = f" --seed {seed}" if seed != SEED else ""
        split = f" --data_dir {self.data_dir} --output_dir {self.run_folder(seed)}" if self.data_dir != "." else ""
        return self.command + seed_flag + split


# From step 4300 on, the published logs of RoBERTa and DeBERTa-v3 are swapped relative to the published table.
# They are swapped back here. The lines of steps 0 and 50 were published in the right place.
PUBLISHED_SPLIT = (
    Experiment(
        number=1,
        title="124M GPT-2 Baseline",
        hub_id="openai-community/gpt2",
        published=91.88,
        log=PublishedLog(
            epoch=(95.62, 95.00),
            minutes=9.48,
            train=95.64,
            validation=92.32,
            losses=((3.706, 3.853), (0.682, 0.706), (0.199, 0.285), (0.188, 0.208)),
        ),
        command="python train_gpt.py --trainable_layers all --num_epochs 1",
        name="gpt2-small-124M-all",
        benchmark="gpt2-all",
    ),
    Experiment(
        number=2,
        title="340M BERT",
        hub_id="google-bert/bert-base-uncased",
        published=90.89,
        log=PublishedLog(
            epoch=(92.50, 88.75),
            minutes=7.65,
            train=94.35,
            validation=90.74,
            losses=((0.848, 0.775), (0.655, 0.682), (0.146, 0.318), (0.204, 0.217)),
        ),
        command="python train_bert_hf.py --trainable_layers all --num_epochs 1 --model bert",
        name="bert-all",
        benchmark="bert-all",
    ),
    Experiment(
        number=3,
        title="66M DistilBERT",
        hub_id="distilbert/distilbert-base-uncased",
        published=91.40,
        log=PublishedLog(
            epoch=(95.62, 91.25),
            minutes=4.26,
            train=95.30,
            validation=91.12,
            losses=((0.693, 0.688), (0.452, 0.460), (0.179, 0.272), (0.199, 0.182)),
        ),
        command="python train_bert_hf.py --trainable_layers all --num_epochs 1 --model distilbert",
        name="distilbert-all",
        benchmark="distilbert-all",
    ),
    Experiment(
        number=4,
        title="355M RoBERTa",
        hub_id="FacebookAI/roberta-large",
        published=92.95,
        log=PublishedLog(
            epoch=(92.50, 94.38),
            minutes=7.20,
            train=93.44,
            validation=93.02,
            losses=((0.695, 0.698), (0.670, 0.690), (0.083, 0.098), (0.170, 0.086)),
        ),
        command="python train_bert_hf.py --trainable_layers last_block --num_epochs 1 --model roberta",
        name="roberta-last_block",
        benchmark="roberta-last_block",
    ),
    Experiment(
        number=5,
        title="304M DeBERTa-v3",
        hub_id="microsoft/deberta-v3-base",
        published=94.69,
        log=PublishedLog(
            epoch=(98.12, 96.88),
            minutes=11.22,
            train=96.23,
            validation=94.52,
            losses=((0.689, 0.694), (0.673, 0.683), (0.126, 0.149), (0.211, 0.138)),
        ),
        command="python train_bert_hf.py --trainable_layers all --num_epochs 1 --model deberta-v3-base",
        name="deberta-v3-base-all",
        benchmark="deberta-v3-base-all",
    ),
    Experiment(
        number=6,
        title="149M ModernBERT Base",
        hub_id="answerdotai/ModernBERT-base",
        published=93.79,
        log=PublishedLog(
            epoch=(95.62, 93.75),
            minutes=10.27,
            train=95.72,
            validation=94.00,
            losses=((0.699, 0.698), (0.564, 0.606), (0.086, 0.168), (0.160, 0.131)),
        ),
        command="python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-base",
        name="modernbert-base-all",
        benchmark="modernbert-base-all",
    ),
    Experiment(
        number=7,
        title="395M ModernBERT Large",
        hub_id="answerdotai/ModernBERT-large",
        published=95.07,
        log=PublishedLog(
            epoch=(96.88, 95.62),
            minutes=27.69,
            train=97.04,
            validation=95.30,
            losses=((0.666, 0.662), (0.548, 0.556), (0.083, 0.115), (0.154, 0.116)),
        ),
        command="python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-large",
        name="modernbert-large-all",
        benchmark="modernbert-large-all",
    ),
    Experiment(
        number=8,
        title="Logistic Regression Baseline",
        published=88.85,
        log=PublishedLog(train=99.80, validation=88.62, dummy=(50.01, 50.14, 49.91)),
        command="python train_sklearn_logreg.py",
        name="logreg-counts",
    ),
    Experiment(
        number=9,
        title="N-gram Logistic Regression",
        command="python train_sklearn_logreg.py --features nb-ngrams",
        name="logreg-nb-ngrams",
    ),
    Experiment(
        number=10,
        title="22.7M MiniLM",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        command="python train_bert_hf.py --model minilm --learning_rate 5e-5 --eval_freq 250",
        name="minilm-all-learning_rate_5e-05",
        former_name="all-MiniLM-L6-v2-all-learning_rate_5e-05",
    ),
    Experiment(
        number=11,
        title="124M GPT-2, Muon",
        hub_id="openai-community/gpt2",
        published=92.40,
        log=PublishedLog(epoch=(98.12, 91.88), minutes=23.01, train=97.45, validation=92.52),
        command="python train_gpt.py --trainable_layers all --num_epochs 1 --optimizer muon",
        name="gpt2-small-124M-all-optimizer_muon",
    ),
    Experiment(
        number=12,
        title="124M GPT-2, last non-padding token",
        hub_id="openai-community/gpt2",
        command="python train_gpt.py --trainable_layers all --num_epochs 1 --trainable_token_pos flexible",
        name="gpt2-small-124M-all-trainable_token_pos_flexible",
        benchmark="gpt2-flexible",
    ),
    Experiment(
        number=13,
        title="149M ModernBERT Base, 1,024 tokens",
        hub_id="answerdotai/ModernBERT-base",
        command="python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-base "
        "--context_length 1024",
        name="modernbert-base-all-context_length_1024",
    ),
)
OFFICIAL_SPLIT = tuple(
    experiment._replace(
        number=14, title=f"{experiment.title}, official split", published=None, log=None, data_dir="official"
    )
    for experiment in PUBLISHED_SPLIT
    if experiment.number in (8, 9, 10)
)
EXPERIMENTS = PUBLISHED_SPLIT + OFFICIAL_SPLIT
