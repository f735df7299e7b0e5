import shutil

import matplotlib
import pytest
from helpers import REPOSITORY, folder_contents, write_sized_example

from finetuning.reporting import pages
from finetuning.system.errors import UserError


def test_replace_sections_changes_only_what_is_between_the_markers(tmp_path):
    page = tmp_path / "README.md"
    start, end = pages.markers("results")
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    pages.replace_sections(page, {"results": "new"})
    assert page.read_text() == f"before\n{start}\nnew\n{end}\nafter\n"
    with pytest.raises(UserError, match="must have the lines"):
        pages.replace_sections(page, {"results": "newer", "splits": "none"})
    assert page.read_text() == f"before\n{start}\nnew\n{end}\nafter\n"


@pytest.fixture
def project_copy(tmp_path):
    """Copy of the pages, the records and the benchmarks."""
    (tmp_path / "docs").mkdir()
    for page in pages.PAGES:
        shutil.copy(REPOSITORY / page, tmp_path / page)
    shutil.copytree(REPOSITORY / "results", tmp_path / "results")
    (tmp_path / "benchmarks").mkdir()
    for path in pages.BENCHMARKS:
        shutil.copy(REPOSITORY / path, tmp_path / path)
    return tmp_path


def changed_files(before, after):
    """Return the paths that differ."""
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def comparable(paths):
    """Leave out the figures if another version of Matplotlib has drawn the committed ones."""
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").split()
    is_pinned = f"matplotlib=={matplotlib.__version__}" in pinned
    return {path for path in paths if is_pinned or not path.endswith(".svg")}


def test_committed_pages_and_figures_match_the_records(project_copy):
    before = folder_contents(project_copy)
    pages.write_pages(project_copy)
    assert comparable(changed_files(before, folder_contents(project_copy))) == set()


def test_write_pages_shows_a_dash_for_a_deleted_record(project_copy):
    shutil.rmtree(project_copy / "results" / "logreg-counts-seed123")
    before = folder_contents(project_copy)
    pages.write_pages(project_copy)
    changed = changed_files(before, folder_contents(project_copy))
    assert comparable(changed) == comparable({*pages.PAGES, pages.FIGURE.as_posix()})
    assert "88.85% | – |" in (project_copy / "README.md").read_text(encoding="utf-8")


def test_figure_shows_each_seed_and_names_the_model_once(tmp_path):
    for seed, accuracy in [(123, 0.88), (124, 0.89)]:
        write_sized_example(tmp_path / f"logreg-counts-seed{seed}", accuracy, seconds={"training": 6, "evaluation": 0})
    points = [point[:3] for point in pages.accuracy_points(tmp_path) if point.interval]
    assert points == [("8 Logistic Regression Baseline", 0.1, 0.88), ("8, seed 124", 0.1, 0.89)]
