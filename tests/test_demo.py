"""The DEMO: a grammar that bags of words find hard, inputs that the real scripts take, and no way into the tables."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pandas as pd
import pytest
from conftest import REPOSITORY
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import reproduce
from finetuning import demo, report
from finetuning.demo import ADJECTIVES, LABEL_NOISE, NEUTRAL, demo_reviews
from finetuning.errors import UserError
from finetuning.records import read_record
from finetuning.saved import MODEL

DENIALS = r"\b(not|never|hardly|but)\b"
ASIDES = "|".join(re.sub(r"\\{\w+\\}", "[a-zA-Z ]+", re.escape(sentence)) for sentence in NEUTRAL)


def opinions(text):
    """The opinions of a review, as its grammar means them: 1 for praise, 0 for blame."""
    found = []
    for sentence in re.split(r"(?<=[.!]) ", text):
        if not re.fullmatch(ASIDES, sentence):
            (label,) = {label for label in (0, 1) for word in ADJECTIVES[label] if re.search(rf"\b{word}\b", sentence)}
            found.append(1 - label if re.search(DENIALS, sentence) else label)
    return found


def test_the_opinions_tell_the_label_but_for_the_wrong_ones():
    reviews = demo_reviews(4000, seed=5)
    found = reviews["text"].map(opinions)
    assert all(len(set(each)) == 1 or sum(each) * 2 != len(each) for each in found)
    right = (found.map(lambda each: sum(each) * 2 > len(each)) == reviews["label"]).mean()
    assert right == pytest.approx(1 - LABEL_NOISE, abs=0.008)  # three standard errors
    assert reviews["label"].mean() == pytest.approx(0.5, abs=0.01)
    assert found.map(lambda each: len(set(each)) == 2).mean() == pytest.approx(0.5, abs=0.025)  # mixed opinions
    assert reviews["text"].str.contains(DENIALS.replace("(", "(?:")).mean() > 0.5


def test_a_bag_of_words_finds_them_hard():
    train, test = demo_reviews(6000, seed=0), demo_reviews(2000, seed=1)
    words = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train["text"]), train["label"])
    assert 0.6 < model.score(words.transform(test["text"]), test["label"]) < 0.75


def test_the_seed_decides_the_reviews():
    assert demo_reviews(50, seed=1).equals(demo_reviews(50, seed=1))
    assert not demo_reviews(50, seed=1).equals(demo_reviews(50, seed=2))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project folder with the real scripts, a DEMO of few reviews and few updates, and no network at all."""
    for script in ("train_sklearn_logreg.py", "train_gpt.py", "train_bert_hf.py"):
        (tmp_path / script).symlink_to(REPOSITORY / script)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "REVIEWS", {"train": 200, "validation": 40, "test": 60})
    monkeypatch.setattr(reproduce, "DEMO", {
        name: re.sub(r"--num_epochs \d+", "--max_steps 3 --eval_iter 1", command)
        for name, command in reproduce.DEMO.items()})
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return tmp_path


def test_the_whole_demo(root, capfd):
    before = set(root.iterdir())
    reproduce.main(["--demo"])
    out, err = capfd.readouterr()
    assert {path.name for path in set(root.iterdir()) - before} == {"demo"}

    # The dummy's accuracy is the one that the scikit-learn script printed, the others are those of the records.
    dummy = re.search(r"Dummy classifier:\n.*\n.*\nTest Accuracy: (\S+)", out)[1]
    table = out[out.index("DEMO results, on 60 synthetic reviews"):].splitlines()
    assert table[2].split() == ["DEMO-dummy", "0", dummy]
    for name, line in zip(reproduce.DEMO, table[3:6], strict=True):
        record = read_record(root / "demo" / "results" / name)
        assert line.split()[:3] == [name, f"{record['parameters']['all']:,}", f"{record['accuracy']['test']:.2%}"]
        assert record["command"] in err.replace("'", "")  # what was shown is what was run
        assert (root / "demo" / "results" / name / MODEL).is_dir()
    assert "python download_prepare_dataset.py\n  python reproduce.py 8" in "\n".join(table)

    picture = ElementTree.parse(root / "demo" / "DEMO-curves.svg")
    assert len([group for group in picture.iter() if group.get("id", "").startswith("axes_")]) == 2

    # No record of it can stand for a row, whatever folder it is put into.
    for row, other in pairwise([*reproduce.EXPERIMENTS, reproduce.EXPERIMENTS[0]]):
        assert not report.recorded(row, root / "demo" / "results")
        target = root / "results" / row.data_dir / f"{row.name}-seed123"
        shutil.copytree(root / "demo" / "results" / "DEMO-logreg", target)
        with pytest.raises(UserError, match="not of the split it stands for"):
            report.results_table([row, other], root / "results")
        shutil.rmtree(target)


def test_full_size_is_no_splits_size():
    assert demo.REVIEWS not in report.REVIEWS.values()


def test_a_failing_command_stops_the_demo(root, capfd, monkeypatch):
    monkeypatch.setattr(reproduce, "DEMO", {"DEMO-logreg": "python train_sklearn_logreg.py --features none"})
    with pytest.raises(UserError, match="this command failed: python train_sklearn_logreg.py --features none"):
        reproduce.main(["--demo"])
    assert "invalid choice: 'none'" in capfd.readouterr().err


def test_what_it_makes_is_never_committed():
    paths = ["demo/results/DEMO-gpt/record.json", "demo/test.csv", "results/some-run/model/config.json"]
    ignored = subprocess.run(["git", "check-ignore", *paths], cwd=REPOSITORY, capture_output=True, text=True,
                             check=False)
    assert ignored.stdout.splitlines() == paths


def test_no_word_of_the_reviews_is_unknown(tmp_path, monkeypatch):
    """Each word of a review is one token to the GPT, and one that the encoder knows."""
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
    assert 30 < longest < demo.TOKENS
