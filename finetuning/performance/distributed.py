"""Data-parallel training: each rank processes a shard of every batch; results match a single process.

    torchrun --nproc_per_node 2 train_gpt.py

The main process, rank 0, draws the order of the reviews, and only it prints and writes. Without
torchrun the only process is the main process and communication functions return their input.
"""

import functools
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetuning.system.environment import under_torchrun
from finetuning.system.errors import UserError
from finetuning.system.signals import Terminated


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def is_main_process() -> bool:
    """Return whether this process has rank 0."""
    return rank() == 0


@functools.cache
def store() -> dist.Store:
    """Return torchrun's key-value store, which all ranks share and which outlives each of them."""
    return next(dist.rendezvous("env://"))[0]


@contextmanager
def process_group() -> Iterator[None]:
    """Connect torchrun's processes while the block runs; silence all but the main process."""
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    # Gradients are reduced between GPUs, objects are exchanged between CPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(
        backend, store=store(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    store().set(f"process {rank()}", f"{platform.node()} {os.getpid()}")
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        stdout, stderr = (sys.stdout, sys.stderr) if is_main_process() else (devnull, devnull)
        with redirect_stdout(stdout), redirect_stderr(stderr):
            yield
    # Only after success: destroying the group after a failure could wait for the other ranks.
    store().set(f"process {rank()}", "")
    dist.destroy_process_group()


def wait_for_main_process() -> None:
    """Wait, unless this is the main process, until the main process calls `release_other_processes`."""
    while not is_main_process() and not store().check(["released"]):
        time.sleep(0.1)  # poll in Python, because store().wait() would block torchrun's SIGTERM


def release_other_processes() -> None:
    """Let the other processes continue, now that the main process has downloaded and cached the files."""
    if is_main_process() and world_size() > 1:
        store().set("released", "")


@contextmanager
def report_first_failure() -> Iterator[None]:
    """Raise the error of the first rank that fails; exit the other ranks silently.

    The other ranks fail for the same reason or as a consequence. Raises UserError if a rank was killed.
    """
    status = 0
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it while this process is already ending
        if not register_failure():
            # If a rank is killed, the connections of the others break or torchrun terminates them.
            if isinstance(error, (RuntimeError, Terminated)) and (killed := killed_ranks()):
                raise UserError(
                    f"process {' and '.join(map(str, killed))} was killed, probably because the machine ran out of "
                    "memory; try fewer processes (--nproc_per_node) or a smaller --micro_batch_size"
                ) from error
            raise
        status = 2
    # Skip the interpreter's shutdown: gloo's threads outlive it, which occasionally aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def killed_ranks() -> list[int]:
    """Return the ranks on this machine whose processes have ended without leaving the process group."""
    killed = []
    with suppress(RuntimeError):  # torchrun has ended
        time.sleep(1)  # connections break shortly before a process has ended
        for number in range(int(os.environ["WORLD_SIZE"])):
            if store().check([f"process {number}"]):
                host, _, pid = store().get(f"process {number}").decode().partition(" ")
                if host == platform.node() and not is_running(int(pid)):
                    killed.append(number)
    return killed


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    if os.name == "nt":  # where os.kill(pid, 0) sends Ctrl-C
        return True
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # without Linux's /proc a zombie cannot be recognized
        return True


def register_failure() -> int:
    """Register this rank's failure; return how many ranks failed before it."""
    try:
        return store().add("failures", 1) - 1
    except RuntimeError:  # torchrun has ended
        return rank()


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: on CUDA the GPU of its local rank.

    Raises UserError if there are fewer GPUs than processes or the device does not support several.
    """
    if device.index is not None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun choose cpu or cuda; each process uses its own GPU")
    if device.type == "cpu":
        return device
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= num_gpus:
        num_processes = os.environ["LOCAL_WORLD_SIZE"]
        raise UserError(f"--nproc_per_node {num_processes} is more than this machine's {num_gpus} GPUs")
    return torch.device("cuda", local_rank)


def seed_per_rank(seed: int, step: int) -> None:
    """Seed every rank but the main process differently, so that dropout differs between shards.

    The seed depends only on `seed`, rank and step, so that no random state has to be saved for these
    ranks. The main process keeps the random state of a single-process run.
    """
    if not is_main_process():
        torch.manual_seed(int(np.random.SeedSequence((seed, rank(), step)).generate_state(1, np.uint64)[0]))


def broadcast(value: Any) -> Any:
    """Return the main process's `value` in every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def shard(items: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a tensor's rows; shard sizes differ by at most one."""
    return items.tensor_split(world_size())[rank()]


def all_gather(items: list) -> list:
    """Return the concatenated lists of all ranks in every process."""
    lists = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over the ranks, without synchronizing with the GPU."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor / world_size()


def wrap_ddp(model: nn.Module, has_unused_parameters: Callable[[], bool]) -> nn.Module:
    """Return the model in DistributedDataParallel if there are several processes, otherwise the model.

    `has_unused_parameters()` returns whether a trainable parameter gets no gradient; DDP then has to
    search for such parameters in every step, which takes time.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=broadcast(has_unused_parameters()))


def sync_gradients(model: Any, enabled: bool) -> AbstractContextManager:
    """Return the context of a forward and backward pass after which the ranks average gradients if `enabled`."""
    return nullcontext() if enabled or world_size() == 1 else model.no_sync()
