import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import REPOSITORY, write_example
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

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


def font(path, name, characters):
    """Install a font in which each of some characters is a square."""
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
def fonts(monkeypatch):
    """The fonts that Matplotlib brings along, and no others, whatever this machine has; more can be added."""
    bundled = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)


@pytest.mark.parametrize(("name", "drawn"), [
    ("\u5317\u4eac-seed1", r"\u5317\u4eac-seed1"),
    ("\u30e2\u30c7\u30eb", r"\u30e2\u30c7\u30eb"),
    ("\uff22\uff25\uff32\uff34 \u338f", "BERT kg"),  # full-width letters, and a unit in one character
    ("\U0001f3ac", r"\U0001f3ac"),
    ("\u05e1\u05e8\u05d8 \u0641\u0644\u0645 \u0416", "\u05e1\u05e8\u05d8 \u0641\u0644\u0645 \u0416"),
    ("$\\frac{$ 100% \\n", "$\\frac{$ 100% \\n"),
    ("two\nlines\tof <text> & more", "two lines of <text> & more"),
    ("a\x07\udc80", r"a\x07\udc80"),
])
def test_a_name_without_a_font_for_it_becomes_ascii(tmp_path, fonts, name, drawn):
    """A glyph that is missing would be a warning, which is an error here."""
    assert plots.drawable(name)[0] == drawn
    write_example(tmp_path, name=name)
    plots.draw_run(tmp_path)
    ElementTree.parse(tmp_path / plots.CURVES)
    plots.draw_rows([(name, 0.3, 0.88, [0.87, 0.89])], name, tmp_path / "rows.svg")
    ElementTree.parse(tmp_path / "rows.svg")


def test_a_name_is_drawn_with_the_fonts_that_have_it(tmp_path, fonts):
    font(tmp_path / "a.ttf", "Few Characters", "\u5317")
    font(tmp_path / "b.ttf", "Many Characters", "\u5317\u4eac\x07")
    font(tmp_path / "c.ttf", "Film Characters", "\u7247")
    font(tmp_path / "d.ttf", "Last Resort Test", "\u5317\u4eac\u7247\u9910")
    text, style = plots.drawable("\u5317\u4eac \u7247 \u9910\x07")
    assert text == "\u5317\u4eac \u7247 \\u9910\\x07"
    assert style["fontfamily"][1:] == ["Many Characters", "Film Characters"]
    write_example(tmp_path, name="\u5317\u4eac \u7247")
    plots.draw_run(tmp_path)
    picture = (tmp_path / plots.CURVES).read_text(encoding="utf-8")
    assert "#ManyCharacters-" in picture and "#FilmCharacters-" in picture


def test_a_long_name_of_wide_characters_takes_more_lines(tmp_path, fonts, monkeypatch):
    font(tmp_path / "a.ttf", "Film", "\u7247")
    titles = []
    monkeypatch.setattr(plots.Figure, "suptitle", lambda figure, title, **style: titles.append(title))
    for name in ("x" * 100, "\u7247" * 100):
        write_example(tmp_path, name=name)
        plots.draw_run(tmp_path)
    assert [max(map(len, title.splitlines())) for title in titles] == [108, 55]
