import shutil

import pytest
from helpers import REPOSITORY, folder_contents

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
    (tmp_path / pages.BENCHMARKS).parent.mkdir()
    shutil.copy(REPOSITORY / pages.BENCHMARKS, tmp_path / pages.BENCHMARKS)
    return tmp_path


def test_committed_pages_and_figures_match_the_records(project_copy):
    before = folder_contents(project_copy)
    pages.write_pages(project_copy)
    after = folder_contents(project_copy)
    assert [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)] == []


def test_write_pages_shows_a_dash_for_a_deleted_record(project_copy):
    shutil.rmtree(project_copy / "results" / "logreg-counts-seed123")
    before = folder_contents(project_copy)
    pages.write_pages(project_copy)
    after = folder_contents(project_copy)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {*pages.PAGES, pages.FIGURE.as_posix()}
    assert "88.85% | – |" in (project_copy / "README.md").read_text(encoding="utf-8")
