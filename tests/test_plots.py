import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import REPOSITORY, write_example

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


@pytest.mark.parametrize("settings", ["text.usetex: True\nfont.size: 40\n", "\xff\xfe"])
def test_figures_do_not_depend_on_matplotlibs_settings(settings, tmp_path):
    """The backend is that of a notebook; the home folder cannot be written to."""
    (tmp_path / "matplotlibrc").write_text(settings, encoding="latin-1")
    nowhere = os.path.join(os.devnull, "home")
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": nowhere,
                   "MPLCONFIGDIR": nowhere, "PYTHONPATH": str(REPOSITORY)}
    code = """if True:
        import os, pathlib
        from finetuning import plots
        plots.draw_rows([("8", 0.3, 0.88, [0.87, 0.89])], "a footnote", pathlib.Path("rows.svg"))
        assert "inline" in os.environ["MPLBACKEND"]  # for whatever this process starts
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    drawn = (tmp_path / "rows.svg").read_bytes()
    plots.draw_rows([("8", 0.3, 0.88, [0.87, 0.89])], "a footnote", tmp_path / "rows.svg")
    assert drawn == (tmp_path / "rows.svg").read_bytes()
