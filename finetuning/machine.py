"""Facts about the machine and the software a run used, found without importing torch."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
PACKAGES = ("torch", "transformers", "tokenizers", "tiktoken", "scikit-learn", "pandas", "numpy")


def cpu_name():
    """The CPU's model name where the system tells, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags():
    """The instruction sets of an x86 CPU on Linux, as a set of lower-case names; empty elsewhere."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(key):
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def usable_cpus():
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def available_memory():
    """Bytes of memory that are free for use, also by a container's limit; 0 where only Linux would tell."""
    with contextlib.suppress(OSError):
        for line in (PROC / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return max(0, min([int(line.split()[1]) * 1024, *cgroup_memory()]))
    return 0


def cgroup_memory():
    """Yield the bytes that each memory limit of this process's control groups, and of those above them, leaves free."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes",
                                                   "total_inactive_file")
            else:
                continue
            group = root / path.lstrip("/")
            while group.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError):  # a container does not show what is above it; "max"
                    yield free_in_cgroup(group, *names)
                group = group.parent


def free_in_cgroup(group, limit, usage, cache):
    """Bytes that a control group may still take, the files that the system keeps in memory for it not counted."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    return int((group / limit).read_text()) - int((group / usage).read_text()) + int(statistics.get(cache, 0))


def process_peak_memory():
    """The most memory this process has held at once, in bytes; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions():
    """Versions of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit():
    """The commit this code stands at, with "+" appended if its files differ from it; None outside a checkout.

    Records, of runs and of benchmarks, are no code: a run that replaces one leaves the commit as it is.
    """
    repository = Path(__file__).parent.parent
    try:
        commit, status = (
            subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=True,
                           timeout=10).stdout.strip()
            for arguments in (["rev-parse", "HEAD"],
                              ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results",
                               ":!benchmarks/*.json"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if status else "")
