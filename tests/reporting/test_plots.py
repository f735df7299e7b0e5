import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import REPOSITORY, write_example_record
from matplotlib import font_manager

from finetuning.reporting import plots
from finetuning.reporting.plots import Point
from finetuning.reporting.records import PREDICTIONS
from finetuning.system.errors import UserError


@pytest.mark.parametrize(("changes", "panels"), [({}, 2), ({"losses": [], "eval_history": []}, 1)])
def test_plot_run_shows_losses_only_if_there_are_any(tmp_path, changes, panels):
    write_example_record(tmp_path, **changes)
    plots.plot_run(tmp_path)
    figure = ElementTree.parse(tmp_path / plots.CURVES)
    assert len([group for group in figure.iter() if group.get("id", "").startswith("axes_")]) == panels


def test_plot_run_writes_identical_files_for_the_same_record(tmp_path):
    write_example_record(tmp_path)
    written = []
    for _ in range(2):
        plots.plot_run(tmp_path)
        written.append((tmp_path / plots.CURVES).read_bytes())
    assert written[0] == written[1]


def test_plot_run_refuses_a_run_without_predictions(tmp_path):
    write_example_record(tmp_path)
    (tmp_path / PREDICTIONS).unlink()
    with pytest.raises(UserError, match=PREDICTIONS):
        plots.plot_run(tmp_path)
    assert not (tmp_path / plots.CURVES).exists()


def test_plot_experiments_takes_measured_and_published_points(tmp_path):
    points = [Point("8 measured", 0.3, 0.88, (0.87, 0.89)), Point("1 published", 9.5, 0.92)]
    plots.plot_experiments(points, "a footnote", tmp_path / "experiments.svg")
    assert b"<svg" in (tmp_path / "experiments.svg").read_bytes()


@pytest.mark.parametrize("settings", ["text.usetex: True\nfont.size: 40\n", "\xff\xfe"])
def test_figures_do_not_depend_on_the_users_matplotlib_settings(settings, tmp_path):
    """A notebook's backend, a home folder that is not writable, and a bad matplotlibrc have no effect."""
    (tmp_path / "matplotlibrc").write_text(settings, encoding="latin-1")
    nowhere = os.path.join(os.devnull, "home")
    environment = {
        **os.environ,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "HOME": nowhere,
        "MPLCONFIGDIR": nowhere,
        "PYTHONPATH": str(REPOSITORY),
    }
    code = """if True:
        import os, pathlib
        from finetuning.reporting import plots
        point = plots.Point("8", 0.3, 0.88, (0.87, 0.89))
        plots.plot_experiments([point], "a footnote", pathlib.Path("experiments.svg"))
        assert "inline" in os.environ["MPLBACKEND"]  # child processes inherit it
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    written = (tmp_path / "experiments.svg").read_bytes()
    plots.plot_experiments([Point("8", 0.3, 0.88, (0.87, 0.89))], "a footnote", tmp_path / "experiments.svg")
    assert written == (tmp_path / "experiments.svg").read_bytes()


def install_font(path, name, characters):
    """Install a font that has only these characters, each drawn as a square."""
    pen = TTGlyphPen(None)
    for step, point in [(pen.moveTo, (0, 0)), (pen.lineTo, (0, 900)), (pen.lineTo, (900, 900)), (pen.lineTo, (900, 0))]:
        step(point)
    pen.closePath()
    names = [".notdef", *(f"u{ord(character):x}" for character in characters)]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): f"u{ord(character):x}" for character in characters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": name, "styleName": "Regular", "psName": name.replace(" ", "")})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    font_manager.fontManager.addfont(path)


@pytest.fixture
def bundled_fonts(monkeypatch):
    """Hide all fonts of this machine except those that Matplotlib includes."""
    bundled = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("\u5317\u4eac-seed1", r"\u5317\u4eac-seed1"),
        ("\u30e2\u30c7\u30eb", r"\u30e2\u30c7\u30eb"),
        ("\uff22\uff25\uff32\uff34 \u338f", "BERT kg"),  # full-width letters, and a unit as one character
        ("\U0001f3ac", r"\U0001f3ac"),
        ("\u05e1\u05e8\u05d8 \u0641\u0644\u0645 \u0416", "\u05e1\u05e8\u05d8 \u0641\u0644\u0645 \u0416"),
        ("$\\frac{$ 100% \\n", "$\\frac{$ 100% \\n"),
        ("two\nlines\tof <text> & more", "two lines of <text> & more"),
        ("a\x07\udc80", r"a\x07\udc80"),
    ],
)
def test_drawable_writes_characters_without_a_font_in_ascii(tmp_path, bundled_fonts, name, expected):
    # Matplotlib warns about missing glyphs, and a warning fails the test.
    assert plots.drawable(name)[0] == expected
    write_example_record(tmp_path, name=name)
    plots.plot_run(tmp_path)
    ElementTree.parse(tmp_path / plots.CURVES)
    plots.plot_experiments([Point(name, 0.3, 0.88, (0.87, 0.89))], name, tmp_path / "experiments.svg")
    ElementTree.parse(tmp_path / "experiments.svg")


def test_drawable_chooses_the_fonts_that_have_the_characters(tmp_path, bundled_fonts):
    install_font(tmp_path / "a.ttf", "Few Characters", "\u5317")
    install_font(tmp_path / "b.ttf", "Many Characters", "\u5317\u4eac\x07")
    install_font(tmp_path / "c.ttf", "Film Characters", "\u7247")
    install_font(tmp_path / "d.ttf", "Last Resort Test", "\u5317\u4eac\u7247\u9910")
    text, style = plots.drawable("\u5317\u4eac \u7247 \u9910\x07")
    assert text == "\u5317\u4eac \u7247 \\u9910\\x07"
    assert style["fontfamily"][1:] == ["Many Characters", "Film Characters"]
    write_example_record(tmp_path, name="\u5317\u4eac \u7247")
    plots.plot_run(tmp_path)
    figure = (tmp_path / plots.CURVES).read_text(encoding="utf-8")
    assert "#ManyCharacters-" in figure
    assert "#FilmCharacters-" in figure


def test_plot_run_wraps_wide_characters_earlier(tmp_path, bundled_fonts, monkeypatch):
    install_font(tmp_path / "a.ttf", "Film", "\u7247")
    titles = []
    monkeypatch.setattr(plots.Figure, "suptitle", lambda figure, title, **style: titles.append(title))
    for name in ("x" * 100, "\u7247" * 100):
        write_example_record(tmp_path, name=name)
        plots.plot_run(tmp_path)
    assert [max(map(len, title.splitlines())) for title in titles] == [108, 55]
