import pandas as pd
import pytest

from finetuning.data.reviews import (
    count_line,
    duplicated_in_training_set,
    iterate_reviews,
    load_dataframes,
    read_reviews,
)
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


def unquoted(rows, header="text,label", end="\n"):
    return end.join([header, *rows, ""])


FINE = [f"fine {i},{i % 2}" for i in range(26)]


@pytest.mark.parametrize(
    ("content", "review", "rows"),
    [
        (unquoted(["good,1", '"Great film,1', *FINE, '"Bad film,0', "dull,0"]), 2, 27),
        (unquoted(['"Great film,1', '"Bad" film,0', "dull,0"]), 1, 1),
        (unquoted(['"Great film,1', "bad,0", 'a so-called "film",0', "dull,0"]), 1, 2),
        (unquoted(['"Great film,1', "bad,0", '"Bad film,0'], end="\r\n"), 1, 2),
        (unquoted(['"Great film,1', "bad,0", '"Bad film,0'], end="\r"), 1, 2),
        (unquoted(['"Great film, 1 ', "bad,0", '"Bad film,0'], "text, label"), 1, 2),
        (unquoted(['1,"Great film', "0,bad", '0,"Bad film'], "label,text"), 1, 2),
        (unquoted(['7,"Great film,1,x', "8,bad,0,y", '9,"Bad film,0,z'], "id,text,label,more"), 1, 2),
        (unquoted(['"Alien,great,1', "Brazil,bad,0", '"Clue,dull,0'], "title,text,label"), 1, 2),
        (unquoted([*FINE] * 200 + ['"Great film,1', "bad,0", '"Bad film,0']), 5201, 2),
    ],
)
def test_texts_with_a_stray_leading_quote_are_refused(tmp_path, content, review, rows):
    (tmp_path / "a.csv").write_text(content, newline="")
    with pytest.raises(UserError, match=f"a.csv, review {review}: the quotation mark .* swallows {rows} of the foll"):
        read_reviews(tmp_path / "a.csv")


@pytest.mark.parametrize(("end", "refused"), [('"Bad film', True), ('Bad film"', False)])
def test_stray_quotes_are_detected_without_a_label_column(tmp_path, end, refused):
    (tmp_path / "a.csv").write_text(f'text\n"Great film\nfine\n{end}\n')
    frames = iterate_reviews(tmp_path / "a.csv", ["text"])
    if refused:
        with pytest.raises(UserError, match="review 1: the quotation mark it begins with swallows 2"):
            next(frames)
    else:
        assert [text for frame in frames for text in frame["text"]] == ["Great film\nfine\nBad film"]


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
