import subprocess

import pytest

from finetuning.system import environment


def test_git_commit_is_marked_if_code_changes_but_not_if_records_do(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    for path in ("finetuning/system/environment.py", "results/file", "benchmarks/speed.json", "benchmarks/speed.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("one")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "finetuning" / "system" / "environment.py"))
    assert environment.git_commit() is None
    git("init", "-q")
    git("commit", "-qm", "another project", "--allow-empty")
    assert environment.git_commit() is None
    git("add", ".")
    git("commit", "-qm", "one")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    for record in ("results/file", "benchmarks/speed.json"):
        (tmp_path / record).write_text("two")
        assert environment.git_commit() == git("rev-parse", "HEAD")
    for code in ("finetuning/system/environment.py", "benchmarks/speed.py"):
        (tmp_path / code).write_text("two")
        assert environment.git_commit() == git("rev-parse", "HEAD") + "+"
        (tmp_path / code).write_text("one")


def test_versions_include_the_installed_packages():
    assert environment.versions().keys() >= {"python", "torch", "transformers", "scikit-learn"}


def test_peak_rss_is_in_bytes():
    assert environment.peak_rss() > 10_000_000


@pytest.fixture
def linux_files(tmp_path, monkeypatch):
    """Simulate a Linux with 1,000,000 KiB available; return a function that writes more of its files."""

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    monkeypatch.setattr(environment, "PROC", tmp_path / "proc")
    monkeypatch.setattr(environment, "CGROUPS", tmp_path / "cgroup")
    write({"proc/meminfo": "MemTotal:  2000000 kB\nMemAvailable:  1000000 kB\n"})
    return write


def cgroup_v2(folder, limit, current, cached):
    """Return the files of a control group."""
    return {
        f"cgroup/{folder}memory.max": limit,
        f"cgroup/{folder}memory.current": current,
        f"cgroup/{folder}memory.stat": f"anon 7\ninactive_file {cached}\n",
    }


CGROUP_V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n",
    "cgroup/memory/docker/x/memory.limit_in_bytes": "300000",
    "cgroup/memory/docker/x/memory.usage_in_bytes": "200000",
    "cgroup/memory/docker/x/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n",
    "cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "cgroup/memory/memory.usage_in_bytes": "400000",
    "cgroup/memory/memory.stat": "total_inactive_file 0\n",
}
IN_CGROUP = {"proc/self/cgroup": "0::/a/b\n"}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 1024 * 10**6),
        ({"proc/self/cgroup": "0::/\n"}, 1024 * 10**6),
        (IN_CGROUP | cgroup_v2("a/b/", "max\n", "10", 0), 1024 * 10**6),
        (IN_CGROUP | cgroup_v2("a/b/", "600000\n", "500000\n", 30_000), 130_000),  # page cache counts as free
        (
            IN_CGROUP | cgroup_v2("a/b/", "max\n", "10", 0) | cgroup_v2("a/", "700000\n", "500000\n", 0),
            200_000,
        ),  # limit of the parent group
        (IN_CGROUP | cgroup_v2("a/b/", "600000\n", "500000\n", 0) | cgroup_v2("", "450000\n", "400000\n", 0), 50_000),
        (
            {"proc/self/cgroup": "0::/../host/path\n"} | cgroup_v2("", "450000\n", "400000\n", 0),
            50_000,
        ),  # in a container
        (IN_CGROUP | cgroup_v2("a/b/", "100\n", "200\n", 0), 0),
        (CGROUP_V1, 150_000),
    ],
)
def test_available_memory_respects_cgroup_limits(files, available, linux_files):
    linux_files(files)
    assert environment.available_memory() == available


def test_available_memory_is_zero_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PROC", tmp_path)
    assert environment.available_memory() == 0
