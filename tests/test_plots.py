import xml.etree.ElementTree as ElementTree

import pytest
from conftest import write_example

from finetuning import plots
from finetuning.errors import UserError
from finetuning.records import PREDICTIONS


@pytest.mark.parametrize(("changes", "panels"), [({}, 2), ({"losses": [], "curve": []}, 1)])
def test_a_run_is_drawn_with_what_it_has(tmp_path, changes, panels):
    write_example(tmp_path, **changes)
    plots.draw_run(tmp_path)
    picture = ElementTree.parse(tmp_path / plots.CURVES)
    assert len([group for group in picture.iter() if group.get("id", "").startswith("axes_")]) == panels


def test_the_same_record_gives_the_same_file(tmp_path):
    write_example(tmp_path)
    drawn = []
    for _ in range(2):
        plots.draw_run(tmp_path)
        drawn.append((tmp_path / plots.CURVES).read_bytes())
    assert drawn[0] == drawn[1]


def test_nothing_is_drawn_from_a_broken_run(tmp_path):
    write_example(tmp_path)
    (tmp_path / PREDICTIONS).unlink()
    with pytest.raises(UserError, match=PREDICTIONS):
        plots.draw_run(tmp_path)
    assert not (tmp_path / plots.CURVES).exists()


def test_rows_are_drawn_measured_and_published(tmp_path):
    plots.draw_rows([("8 measured", 0.3, 0.88, [0.87, 0.89]), ("1 published", 9.5, 0.92, None)], "a footnote",
                    tmp_path / "rows.svg")
    assert b"<svg" in (tmp_path / "rows.svg").read_bytes()
