"""Device, compute precision, compilation, random state and memory of a process."""

import contextlib
import ctypes
import platform
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from finetuning.performance import distributed
from finetuning.system.environment import cpu_flags, cpu_name, peak_rss
from finetuning.system.errors import UserError

DEVICE_TYPES = ("cuda", "mps", "cpu")  # in order of preference
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # x86 flags of native bf16 arithmetic, as Linux lists them
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's `mallopt`, from malloc.h
RECOMPILE_LIMIT = 64  # per model: training and evaluation, with and without mask, a few lengths each
MIN_BF16_SPEEDUP = 1.2  # a smaller gain does not justify the lower accuracy of bf16


def select_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" selects CUDA if available, else MPS, else the CPU.

    Under torchrun each process gets its own GPU. Raises UserError if the device is not available.
    """
    available = [kind for kind in DEVICE_TYPES if device_count(kind)]
    if name == "auto":
        name = available[0]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; choose auto, cpu, mps, cuda or cuda:1") from error
    if (device.index or 0) >= device_count(device.type):
        raise UserError(f"--device {name} is not on this machine; it has: {', '.join(available)}")
    if distributed.world_size() > 1:
        device = distributed.local_device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for `synchronize` and libraries, which use the current device
    return device


def device_count(device_type: str) -> int:
    """Return how many devices of a type PyTorch can use."""
    return torch.get_device_module(device_type).device_count() if device_type in DEVICE_TYPES else 0


def select_precision(name: str, device: torch.device) -> tuple[str, str]:
    """Return (precision, reason): "fp32", "tf32" or "bf16"; "auto" selects bf16 if it is native and faster.

    The precision is that of the computation; weights are float32 either way. Raises UserError for "tf32"
    (fp32 with matrix products rounded to TF32) unless the device is a CUDA GPU of compute capability 8.0 or higher.
    """
    if name == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 is for CUDA, not for {device.type}; use --precision fp32")
    if name == "tf32" and not is_ampere_or_later(device):
        raise UserError(
            f"--precision tf32 needs compute capability 8.0 or higher; {device_name(device)} has "
            f"{compute_capability(device)}: use --precision fp32"
        )
    if name == "bf16" and emulates_bf16(device):
        kind = "GPU" if device.type == "cuda" else "CPU"
        return name, f"as requested; this {kind} emulates bf16, which is slower than fp32, possibly by far"
    if name != "auto":
        return name, "as requested"
    if device.type == "cuda":
        precision = "bf16" if is_ampere_or_later(device) else "fp32"
        return precision, f"compute capability {compute_capability(device)}; bf16 is native from 8.0 on"
    if device.type == "cpu":
        return select_cpu_precision()
    return "fp32", f"the default on {device.type}; --precision bf16 requests bf16"


def select_cpu_precision() -> tuple[str, str]:
    """Return (precision, reason): bf16 if this CPU supports it natively and a trial is faster than fp32."""
    # Emulated bf16 can be hundreds of times slower, so check the CPU's flags before any trial.
    native = " and ".join(sorted(CPU_BF16_FLAGS & cpu_flags()))
    if not native:
        return "fp32", "the CPU has no native bf16"
    speedup = cpu_bf16_speedup()  # some CPUs have the instructions and are still faster in fp32
    reason = f"the CPU has {native}; a trial ran {speedup:.1f} times as fast as in fp32"
    return ("bf16" if speedup > MIN_BF16_SPEEDUP else "fp32"), reason


def compute_capability(device: torch.device) -> str:
    """Return a GPU's compute capability, such as "7.5"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def is_ampere_or_later(device: torch.device) -> bool:
    """Return whether a GPU is of the Ampere generation or later, the first with TF32 and bf16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def emulates_bf16(device: torch.device) -> bool:
    """Return whether the device is known to emulate bf16 in float32; the flags of some CPUs are unknown."""
    if device.type == "cuda":
        return not is_ampere_or_later(device)
    return device.type == "cpu" and bool(cpu_flags()) and not CPU_BF16_FLAGS & cpu_flags()


def cpu_bf16_speedup(repeats: int = 7) -> float:
    """Measure the speedup of bf16 over fp32 for a transformer-sized matrix product, in about 50 ms."""
    x, weight = torch.ones(512, 768), torch.ones(768, 768)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        operands = x.to(dtype), weight.to(dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            F.linear(*operands)
            times.append(time.perf_counter() - start)
        seconds[dtype] = statistics.median(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which forward passes run in the chosen precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def tune_malloc() -> None:
    """Keep freed memory in the process; do nothing without glibc.

    By default glibc returns large blocks to the system, which has to clear them page by page when
    the next training step allocates them again: a tenth of a GPT-2 step's time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot build a small kernel for the device, which takes a few seconds."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the compiler warns about PyTorch's own code
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(2, device=device))
    except Exception as error:  # compilers raise errors of any type
        lines = [line for line in str(error).splitlines() if line and not line.endswith(" raised:")] or [repr(error)]
        reason = next((line for line in lines if " error: " in line), lines[0])
        tool = {"cpu": "a C++ compiler (or set CXX)", "cuda": "Triton"}.get(device.type, "what is missing")
        raise UserError(
            f"--compile does not work on this machine: {reason}; install {tool}, or leave out --compile"
        ) from error


def compile_model(model: nn.Module, device: torch.device, accumulates_gradients: bool = False) -> None:
    """Compile a model for each input shape; on CUDA use CUDA graphs unless gradients are accumulated."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Advice of the compiler; TF32 is the user's choice (--precision tf32).
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    # The next replay of a CUDA graph would overwrite the gradients of the previous micro-batch.
    uses_cuda_graphs = device.type == "cuda" and not accumulates_gradients
    model.compile(dynamic=False, mode="reduce-overhead" if uses_cuda_graphs else None)


def is_compiled(model: nn.Module) -> bool:
    """Return whether `compile_model` was called on the model or on one that it wraps."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def device_name(device: torch.device) -> str:
    """Return the name of the hardware as a results table states it, with the number of processes and threads."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    processes = f"{distributed.world_size()} processes, each on " if distributed.world_size() > 1 else ""
    return processes + hardware_model(device) + threads


def hardware_model(device: torch.device) -> str:
    """Return the model name of a GPU or CPU."""
    names = {"cuda": lambda: torch.cuda.get_device_name(device), "mps": platform.machine, "cpu": cpu_name}
    return names[device.type]()


def select_saved_precision(precision: str, hardware: str, device: torch.device) -> str:
    """Return the precision to run a saved model in: that of its training run if `hardware` names this device.

    On other hardware, "auto" replaces bf16, which can be slow there, and fp32 replaces tf32.
    """
    if hardware_model(device) in hardware:
        return precision
    return select_precision("auto", device)[0] if precision == "bf16" else "fp32"


def set_matmul_precision(precision: str) -> None:
    """Allow TF32 matrix products on CUDA if the precision is "tf32"."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work, as timing requires."""
    torch.get_device_module(device).synchronize()


def empty_cache(device: torch.device) -> None:
    """Release the memory that PyTorch's allocator caches on a GPU."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory so far in bytes: of the GPU on CUDA, else of the process; None if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()


def get_rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of every generator that training uses: {device type: uint8 tensor}."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what `get_rng_state` returned for a device of the same type."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], device)
