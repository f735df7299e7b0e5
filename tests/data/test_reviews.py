import pandas as pd
import pytest
from bad_inputs import POINTER, TWO_REVIEWS, bad_csv, parameters

from finetuning.data.reviews import count_line, duplicated_in_training_set, load_dataframes, read_reviews
from finetuning.system.errors import UserError


def test_load_dataframes_reads_the_three_files(data_dir):
    train, validation, test = load_dataframes(data_dir)
    assert (len(train), len(validation), len(test)) == (48, 16, 20)
    assert set(train["label"]) == {0, 1}
    assert pd.api.types.is_integer_dtype(train["label"])


def test_missing_file_error_names_the_command_that_creates_it(data_dir):
    (data_dir / "test.csv").unlink()
    with pytest.raises(UserError) as error:
        load_dataframes(data_dir)
    assert f"cannot find {data_dir / 'test.csv'};" in str(error.value)
    assert f"python download_prepare_dataset.py --data_dir {data_dir}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text,label\nNA,1\nnull,0\n", ["NA", "null"]),
        ("\ufefftext,label\ngood,1\nbad,0\n", ["good", "bad"]),
        ('label,text,more\n1,"two\nlines, ""quoted""",x\n', ['two\nlines, "quoted"']),
        ("text,label\n\N{GRINNING FACE} \u05d8\u05d5\u05d1,1\n", ["\N{GRINNING FACE} \u05d8\u05d5\u05d1"]),
        ("text, label\ngood, 1\nbad,0 \n", ["good", "bad"]),
        (' label , text\n1, "good, very"\n0,bad\n', ["good, very", "bad"]),
        (",text,label\n0,good,1\n1,bad,0\n", ["good", "bad"]),
        ("text,label,,\ngood,1,,\n", ["good"]),
        ("\n\ntext,label\n\ngood,1\n\n", ["good"]),
        ("text,label\rgood,1\rbad,0\r", ["good", "bad"]),
        # Lines that look like rows, in texts with valid quotes.
        ('text,label\n"Plot: 1,0\ngood, 1\nof 2\nall in all",1\n', ["Plot: 1,0\ngood, 1\nof 2\nall in all"]),
        ('text,label\n"Note: 8,1\nfine",1\n', ["Note: 8,1\nfine"]),
        ('label,text\n1,"fine\n1, 2, 3"\n', ["fine\n1, 2, 3"]),
        ('text,label\n"""Plot,1\n""good""",1\n', ['"Plot,1\n"good"']),
        ("text,label\n" + '"' + "x" * 140_000 + ',1\ny",1\n', ["x" * 140_000 + ",1\ny"]),
    ],
)
def test_read_reviews_accepts_unusual_but_valid_files(tmp_path, content, texts):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8", newline="")
    assert read_reviews(tmp_path / "a.csv")["text"].tolist() == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
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
        (b"text,text,label\na,b,1\n", "has the column text 2 times"),
        (b"text,label, label\na,1,0\n", "has the column label 2 times"),
        (b"id,text,label,id\n1,a,1,1\n", "has the column id 2 times"),
        (b"text;label\na;1\n", "its columns are: text;label .separated by semicolons, not by commas"),
        (b"text\tlabel\na\t1\n", "separated by tabs"),
        ("text,label\na,1\n".encode("utf-16"), "it is UTF-16 text"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "it is a Git LFS pointer, .*git lfs pull",
        ),
        (b"<html>\n", "it is a web page"),
        (b"text,label\ngood, 10\n", "label '10' is neither|label ' 10' is neither"),
    ],
)
def test_read_reviews_refuses_malformed_files(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_reviews(tmp_path / "a.csv")


def test_labels_after_spaces_are_integers(tmp_path):
    (tmp_path / "a.csv").write_text("text, label\ngood, 1\nbad,0 \n")
    assert read_reviews(tmp_path / "a.csv")["label"].tolist() == [1, 0]


def test_count_line_states_the_reviews_of_each_file():
    assert count_line(35_000, 5_000, 10_000) == "Reviews: 35,000 training, 5,000 validation, 10,000 test"


def test_duplicated_in_training_set_finds_exact_duplicates_only(tmp_path):
    sets = {"train": ["a film", "a plot"], "validation": ["dull"], "test": ["a plot", "A plot", "dull"]}
    for split, texts in sets.items():
        pd.DataFrame({"text": texts, "label": 1}).to_csv(tmp_path / f"{split}.csv", index=False)
    assert duplicated_in_training_set(tmp_path).tolist() == [True, False, False]


CASES = [
    bad_csv(
        "no CSV", None, "cannot find data/train.csv; create the CSV files with: python download_prepare_dataset.py"
    ),
    bad_csv("no test CSV", None, "cannot find data/test.csv", split="test"),
    bad_csv("an empty CSV", b"", "train.csv is not a CSV file in UTF-8"),
    bad_csv("no rows", b"text,label\n", "train.csv holds no reviews"),
    bad_csv("no text column", b"review,label\ngood,1\n", "has no column text; its columns are: review, label"),
    bad_csv("no label column", b"text,sentiment\ngood,1\n", "has no column label", split="validation"),
    bad_csv("no header", b"good,1\nbad,0\n", "has no column text and no column label"),
    bad_csv("another separator", b"text;label\ngood;1\n", "has no column text and no column label"),
    bad_csv("label pos", TWO_REVIEWS + b"fine,pos\n", "train.csv, review 3: label 'pos' is neither 0 (negative) nor 1"),
    bad_csv("label 2", TWO_REVIEWS + b"fine,2\n", "review 3: label '2'"),
    bad_csv("label 1.0", TWO_REVIEWS + b"fine,1.0\n", "review 3: label '1.0'"),
    bad_csv("label NaN", TWO_REVIEWS + b"fine,NaN\n", "review 3: label 'NaN'"),
    bad_csv("an empty label", TWO_REVIEWS + b"fine,\n", "review 3: label ''"),
    bad_csv("an empty text", TWO_REVIEWS + b",1\n", "review 3: the text is empty"),
    bad_csv("a blank text", TWO_REVIEWS + b'" \t\n",1\n', "review 3: the text is empty"),
    bad_csv("an unclosed quote", TWO_REVIEWS + b'"fine,1\nfine,0\n', "not a CSV file in UTF-8"),
    bad_csv("too many fields", TWO_REVIEWS + b"fine,1,1,1\n", "not a CSV file in UTF-8"),
    bad_csv(
        "one field more in each row", b"text,label\n1,good,1\n2,bad,0\n", "rows have more fields than its first line"
    ),
    bad_csv("a truncated row", TWO_REVIEWS + b"fine", "review 3: label ''"),
    bad_csv("Latin-1", TWO_REVIEWS + "caf\u00e9,1\n".encode("latin-1"), "not a CSV file in UTF-8"),
    bad_csv("UTF-16", TWO_REVIEWS.decode().encode("utf-16"), "not a CSV file in UTF-8"),
    bad_csv(
        "a NUL byte",
        TWO_REVIEWS + b"fi\0ne,1\n",
        "line 4 holds a NUL byte; the file is damaged",
        split="test",
    ),
    bad_csv("NUL bytes only", bytes(4096), "it is a file of zero bytes"),
    bad_csv("a Git LFS pointer", POINTER, "data/train.csv is not a CSV file in UTF-8: it is a Git LFS pointer"),
    bad_csv("a column twice", b"text,label,text\ngood,1,bad\n", "train.csv has the column text 2 times"),
    bad_csv("a zip file", b"PK\x03\x04\x14\0\0\0\x08\0\xff\xfe", "not a CSV file in UTF-8"),
    bad_csv("one class", b"text,label\n" + b"good,1\n" * 48, "train.csv holds positive reviews only"),
    bad_csv("the other class", b"text,label\n" + b"bad,0\n" * 48, "train.csv holds negative reviews only"),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_bad_csv_file_ends_in_one_line_and_changes_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
