"""CPU, memory, package versions and git commit of a run, read without importing torch."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Set by torchrun and read by this project.
TORCHRUN_VARIABLES = {"TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                      "MASTER_PORT"}  # fmt: skip
# Of a control group: the files of its limit and usage, and the key of its inactive page cache in memory.stat.
CGROUP_V1_FILES = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
CGROUP_V2_FILES = "memory.max", "memory.current", "inactive_file"
PACKAGES = ("torch", "transformers", "tokenizers", "tiktoken", "scikit-learn", "pandas", "numpy")


def under_torchrun() -> bool:
    """Return whether torchrun has started this process; some variables can be left from another launch."""
    return os.environ.keys() >= TORCHRUN_VARIABLES


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture if the system does not tell the name."""
    return read_proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Return the lower-case names of an x86 CPU's instruction sets on Linux; empty on other systems."""
    return set(read_proc("cpuinfo", "flags").split())


def read_proc(file: str, key: str) -> str:
    """Return the first value of a key in a file of /proc, or "" if there is none."""
    with contextlib.suppress(OSError):
        for line in (PROC / file).read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of memory that are free, within a container's limit; 0 if the system is not Linux."""
    available = read_proc("meminfo", "MemAvailable").removesuffix("kB")
    return max(0, min([int(available) * 1024, *cgroup_free_bytes()])) if available else 0


def cgroup_free_bytes() -> Iterator[int]:
    """Yield the free bytes within each memory limit of this process's control groups (v1, v2) and their parents."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, names = CGROUPS, CGROUP_V2_FILES
            elif "memory" in controllers.split(","):
                root, names = CGROUPS / "memory", CGROUP_V1_FILES
            else:
                continue
            group = root / path.lstrip("/")
            while group.is_relative_to(root):
                # A container does not see its parents' files; an unlimited group has the limit "max".
                with contextlib.suppress(OSError, ValueError):
                    yield free_in_cgroup(group, *names)
                group = group.parent


def free_in_cgroup(group: Path, limit: str, usage: str, cache: str) -> int:
    """Return the bytes that a control group may still allocate; inactive page cache counts as free."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    return int((group / limit).read_text()) - int((group / usage).read_text()) + int(statistics.get(cache, 0))


def peak_rss() -> int | None:
    """Return the peak resident memory of this process in bytes, or None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed PACKAGES."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def git_commit() -> str | None:
    """Return the commit of this code, with "+" appended if files differ from it; None if git does not track it.

    Records of runs and benchmarks do not count: a run that replaces one does not change the code.
    """

    def git(arguments: str) -> str:
        command, folder = ["git", *arguments.split()], Path(__file__).parents[2]
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()

    try:
        git("ls-files --error-unmatch finetuning/system/environment.py")  # fails in the checkout of another project
        commit = git("rev-parse HEAD")
        changes = git("status --porcelain --untracked-files=no -- . :!results :!benchmarks/*.json")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")
