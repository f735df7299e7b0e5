import subprocess

import pytest

from finetuning import machine


def test_the_commit_is_marked_if_code_differs_but_not_if_records_do(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()
    for path in ("finetuning/file", "results/file", "benchmarks/results.json", "benchmarks/run.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("one")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "finetuning" / "machine.py"))
    assert machine.git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert machine.git_commit() == git("rev-parse", "HEAD")
    for record in ("results/file", "benchmarks/results.json"):
        (tmp_path / record).write_text("two")
        assert machine.git_commit() == git("rev-parse", "HEAD")
    for code in ("finetuning/file", "benchmarks/run.py"):
        (tmp_path / code).write_text("two")
        assert machine.git_commit() == git("rev-parse", "HEAD") + "+"
        (tmp_path / code).write_text("one")


def test_versions_and_memory():
    assert machine.versions().keys() >= {"python", "torch", "transformers", "scikit-learn"}
    assert machine.process_peak_memory() > 10_000_000


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a pretend Linux with 1,000,000 KiB available; returns a function that writes more of them."""
    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    write({"proc/meminfo": "MemTotal:  2000000 kB\nMemAvailable:  1000000 kB\n"})
    return write


def v2(folder, limit, current, cached):
    return {f"cgroup/{folder}memory.max": limit, f"cgroup/{folder}memory.current": current,
            f"cgroup/{folder}memory.stat": f"anon 7\ninactive_file {cached}\n"}


V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n",
      "cgroup/memory/docker/x/memory.limit_in_bytes": "300000",
      "cgroup/memory/docker/x/memory.usage_in_bytes": "200000",
      "cgroup/memory/docker/x/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n",
      "cgroup/memory/memory.limit_in_bytes": "9223372036854771712", "cgroup/memory/memory.usage_in_bytes": "400000",
      "cgroup/memory/memory.stat": "total_inactive_file 0\n"}
LIMITED = {"proc/self/cgroup": "0::/a/b\n"}


@pytest.mark.parametrize(("files", "available"), [
    ({}, 1024 * 10**6),
    ({"proc/self/cgroup": "0::/\n"}, 1024 * 10**6),
    (LIMITED | v2("a/b/", "max\n", "10", 0), 1024 * 10**6),
    (LIMITED | v2("a/b/", "600000\n", "500000\n", 30_000), 130_000),  # files kept in memory make room
    (LIMITED | v2("a/b/", "max\n", "10", 0) | v2("a/", "700000\n", "500000\n", 0), 200_000),  # of the group above
    (LIMITED | v2("a/b/", "600000\n", "500000\n", 0) | v2("", "450000\n", "400000\n", 0), 50_000),
    ({"proc/self/cgroup": "0::/../host/path\n"} | v2("", "450000\n", "400000\n", 0), 50_000),  # in a container
    (LIMITED | v2("a/b/", "100\n", "200\n", 0), 0),
    (V1, 150_000)])
def test_a_containers_limit_counts(files, available, system):
    system(files)
    assert machine.available_memory() == available


def test_nothing_is_known_without_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.available_memory() == 0
