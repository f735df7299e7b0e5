import pandas as pd
import pytest

from finetuning.errors import UserError
from finetuning.reviews import copies_in_training_set, load_dataframes, read_reviews


def test_reads_the_three_sets(data_dir):
    train, validation, test = load_dataframes(data_dir)
    assert (len(train), len(validation), len(test)) == (48, 16, 20)
    assert set(train["label"]) == {0, 1}
    assert pd.api.types.is_integer_dtype(train["label"])


def test_a_missing_file_gives_the_command_that_makes_it(data_dir):
    (data_dir / "test.csv").unlink()
    with pytest.raises(UserError) as error:
        load_dataframes(data_dir)
    assert f"cannot find {data_dir / 'test.csv'};" in str(error.value)
    assert f"python download_prepare_dataset.py --data_dir {data_dir}" in str(error.value)


@pytest.mark.parametrize(("content", "texts"), [
    ("text,label\nNA,1\nnull,0\n", ["NA", "null"]),
    ("\ufefftext,label\ngood,1\nbad,0\n", ["good", "bad"]),
    ('label,text,more\n1,"two\nlines, ""quoted""",x\n', ['two\nlines, "quoted"']),
    ("text,label\n\N{GRINNING FACE} \u05d8\u05d5\u05d1,1\n", ["\N{GRINNING FACE} \u05d8\u05d5\u05d1"]),
])
def test_unusual_but_good_files(tmp_path, content, texts):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    assert read_reviews(tmp_path / "a.csv")["text"].tolist() == texts


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a CSV file"),
    (b"text,label\n", "holds no reviews"),
    (b"text\ngood\n", "no column label"),
    (b"review,sentiment\ngood,1\n", "no column text and no column label"),
    (b"text,label\ngood,1\nbad,2\n", "review 2: label '2' is neither 0"),
    (b"text,label\ngood,pos\n", "review 1: label 'pos'"),
    (b"text,label\ngood,\n", "review 1: label ''"),
    (b"text,label\n  ,1\n", "review 1: the text is empty"),
    (b"text,label\ncaf\xe9,1\n", "not a CSV file in UTF-8"),
    (b"text,label\na,1,x\nb,0,y,z\n", "not a CSV file"),
])
def test_bad_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_reviews(tmp_path / "a.csv")


def test_copies_are_exact(tmp_path):
    sets = {"train": ["a film", "a plot"], "validation": ["dull"], "test": ["a plot", "A plot", "dull"]}
    for split, texts in sets.items():
        pd.DataFrame({"text": texts, "label": 1}).to_csv(tmp_path / f"{split}.csv", index=False)
    assert copies_in_training_set(tmp_path).tolist() == [True, False, False]
