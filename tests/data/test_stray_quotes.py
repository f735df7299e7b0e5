import csv

import pytest
from bad_inputs import TWO_REVIEWS, bad_csv, parameters

from finetuning.data.reviews import ENCODING, iterate_reviews, read_reviews
from finetuning.data.stray_quotes import has_stray_quotes
from finetuning.system.errors import UserError


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


@pytest.mark.parametrize(
    ("row", "stray"),
    [
        ('"Great film",1', False),
        ('"""Great"" film",1', False),
        ('"Great" film,1', True),
        ('"Great film" ,1', True),
        ('A "great" film,1', False),  # a mark within an unquoted text is an ordinary character
    ],
)
def test_has_stray_quotes_finds_text_after_a_closing_mark(tmp_path, row, stray):
    (tmp_path / "a.csv").write_text(f"text,label\n{row}\n")
    limit = csv.field_size_limit()
    assert has_stray_quotes(tmp_path / "a.csv", ENCODING, skip_initial_space=False) == stray
    assert csv.field_size_limit() == limit


def test_has_stray_quotes_reads_only_regular_files(tmp_path):
    assert not has_stray_quotes(tmp_path, ENCODING, skip_initial_space=False)


CASES = [
    bad_csv(
        "rows in a text",
        TWO_REVIEWS + b'"Great film,1\nfine,0\n"Bad film,0\n',
        "review 3: the quotation mark",
        split="test",
    ),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_swallowed_rows_end_in_one_line_and_change_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
