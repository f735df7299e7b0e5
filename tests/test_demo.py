import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pandas as pd
import pytest
from helpers import REPOSITORY
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import reproduce
from finetuning import demo
from finetuning.demo import ADJECTIVES, LABEL_NOISE, NEUTRAL, demo_reviews
from finetuning.reporting import tables
from finetuning.reporting.records import read_record
from finetuning.reporting.saved_models import MODEL
from finetuning.system.errors import UserError

NEGATIONS = r"\b(not|never|hardly|but)\b"
NEUTRAL_PATTERN = "|".join(re.sub(r"\\{\w+\\}", "[a-zA-Z ]+", re.escape(sentence)) for sentence in NEUTRAL)


def opinions(text):
    """Return the opinions of a review by the rules of its grammar: 1 for positive, 0 for negative."""
    labels = []
    for sentence in re.split(r"(?<=[.!]) ", text):
        if not re.fullmatch(NEUTRAL_PATTERN, sentence):
            (adjective_label,) = {
                label for label in (0, 1) for word in ADJECTIVES[label] if re.search(rf"\b{word}\b", sentence)
            }
            labels.append(1 - adjective_label if re.search(NEGATIONS, sentence) else adjective_label)
    return labels


def test_opinions_agree_with_the_label_except_for_label_noise():
    reviews = demo_reviews(4000, seed=5)
    labels = reviews["text"].map(opinions)
    assert all(len(set(each)) == 1 or sum(each) * 2 != len(each) for each in labels)
    agreement = (labels.map(lambda each: sum(each) * 2 > len(each)) == reviews["label"]).mean()
    assert agreement == pytest.approx(1 - LABEL_NOISE, abs=0.008)  # three standard errors
    assert reviews["label"].mean() == pytest.approx(0.5, abs=0.01)
    assert labels.map(lambda each: len(set(each)) == 2).mean() == pytest.approx(0.5, abs=0.025)  # mixed opinions
    assert reviews["text"].str.contains(NEGATIONS.replace("(", "(?:")).mean() > 0.5


def test_bag_of_words_accuracy_is_limited_by_negation():
    train, test = demo_reviews(6000, seed=0), demo_reviews(2000, seed=1)
    words = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train["text"]), train["label"])
    assert 0.6 < model.score(words.transform(test["text"]), test["label"]) < 0.75


def test_seed_determines_the_reviews():
    assert demo_reviews(50, seed=1).equals(demo_reviews(50, seed=1))
    assert not demo_reviews(50, seed=1).equals(demo_reviews(50, seed=2))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project folder with the real scripts, a demo of few reviews and steps, and no network."""
    for script in ("train_sklearn_logreg.py", "train_gpt.py", "train_bert_hf.py"):
        (tmp_path / script).symlink_to(REPOSITORY / script)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "REVIEWS", {"train": 200, "validation": 40, "test": 60})
    monkeypatch.setattr(
        reproduce,
        "DEMO",
        {
            name: re.sub(r"--num_epochs \d+", "--max_steps 3 --eval_iter 1", command)
            for name, command in reproduce.DEMO.items()
        },
    )
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return tmp_path


def test_demo_runs_all_models_and_prints_their_records(root, capfd):
    before = set(root.iterdir())
    reproduce.main(["--demo"])
    out, err = capfd.readouterr()
    assert {path.name for path in set(root.iterdir()) - before} == {"demo"}

    # The dummy's accuracy is the one that the scikit-learn script printed, the others come from the records.
    dummy = re.search(r"Dummy classifier:\n.*\n.*\nTest Accuracy: (\S+)", out)[1]
    table = out[out.index("DEMO results, on 60 synthetic reviews") :].splitlines()
    assert table[2].split() == ["DEMO-dummy", "0", dummy]
    for name, line in zip(reproduce.DEMO, table[3:6], strict=True):
        record = read_record(root / "demo" / "results" / name)
        assert line.split()[:3] == [name, f"{record['parameters']['total']:,}", f"{record['accuracy']['test']:.2%}"]
        assert record["command"] in err.replace("'", "")  # the printed command is the one that ran
        assert (root / "demo" / "results" / name / MODEL).is_dir()
    assert "python download_prepare_dataset.py\n  python reproduce.py 8" in "\n".join(table)

    figure = ElementTree.parse(root / "demo" / "DEMO-curves.svg")
    assert len([group for group in figure.iter() if group.get("id", "").startswith("axes_")]) == 2

    # No record of the demo can be used for an experiment, whatever folder it is copied to.
    for row, other in pairwise([*reproduce.EXPERIMENTS, reproduce.EXPERIMENTS[0]]):
        assert not tables.load_records(row, root / "demo" / "results")
        target = root / "results" / row.data_dir / f"{row.name}-seed123"
        shutil.copytree(root / "demo" / "results" / "DEMO-logreg", target)
        with pytest.raises(UserError, match="has other numbers of reviews"):
            tables.results_table([row, other], root / "results")
        shutil.rmtree(target)


def test_demo_sizes_differ_from_those_of_every_split():
    assert demo.REVIEWS not in tables.REVIEWS.values()


def test_failed_command_stops_the_demo(root, capfd, monkeypatch):
    monkeypatch.setattr(reproduce, "DEMO", {"DEMO-logreg": "python train_sklearn_logreg.py --features none"})
    with pytest.raises(UserError, match=r"this command failed: python train_sklearn_logreg\.py --features none"):
        reproduce.main(["--demo"])
    assert "invalid choice: 'none'" in capfd.readouterr().err


def test_demo_files_and_saved_models_are_ignored_by_git():
    paths = ["demo/results/DEMO-gpt/record.json", "demo/test.csv", "results/some-run/model/config.json"]
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ignored.stdout.splitlines() == paths


def test_tokenizers_cover_all_words_of_the_reviews(tmp_path, monkeypatch):
    """Each word is one token of the GPT and a known token of the encoder."""
    import transformers

    monkeypatch.setattr(demo, "REVIEWS", {"train": 2000, "validation": 10, "test": 300})
    demo.write_inputs(tmp_path)
    from train_gpt import load_config, load_encoding

    encoding = load_encoding(tmp_path / demo.GPT)
    assert load_config(tmp_path / demo.GPT)["vocab_size"] == encoding.n_vocab
    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path / demo.ENCODER)
    longest = 0
    for text in pd.read_csv(tmp_path / "test.csv")["text"]:
        ids = encoding.encode_ordinary(text)
        assert all(len(encoding.decode_single_token_bytes(id)) > 1 or id in b".!AI" for id in ids)
        assert encoder.unk_token_id not in encoder(text)["input_ids"]
        longest = max(longest, len(ids), len(encoder(text)["input_ids"]))
    assert 30 < longest < demo.CONTEXT_LENGTH
