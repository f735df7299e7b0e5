import pytest
import torch
from helpers import make_reviews
from pretend_device import pretend_device
from tiny_models import CPU, gpt_dataset, make_gpt_classifier, train_with_adamw
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor

import train_gpt
from finetuning.data.batching import length_buckets
from finetuning.performance import device as devices
from finetuning.performance.device import select_saved_precision
from finetuning.performance.inference import Classifier
from finetuning.system.errors import UserError


def test_auto_device_prefers_cuda_then_mps(monkeypatch):
    for available, expected in [({"cuda", "mps", "cpu"}, "cuda"), ({"mps", "cpu"}, "mps"), ({"cpu"}, "cpu")]:
        monkeypatch.setattr(devices, "device_count", lambda kind, available=available: int(kind in available))
        assert devices.select_device().type == expected


@pytest.mark.parametrize("name", ["cuda:1", "cuda:7"])
def test_unavailable_device_raises_user_error(monkeypatch, name):
    monkeypatch.setattr(devices, "device_count", lambda kind: {"cuda": 1, "cpu": 1}.get(kind, 0))
    assert devices.select_device("cuda").type == "cuda"
    with pytest.raises(UserError, match=f"--device {name} is not on this machine; it has: cuda, cpu"):
        devices.select_device(name)


@pytest.mark.parametrize(("name", "current"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_selected_gpu_becomes_the_current_device(name, current):
    """Only its generator is used, saved and restored."""
    with pretend_device("cuda", count=2):
        device = devices.select_device(name)
        assert torch.cuda.current_device() == current
        other = torch.cuda.get_rng_state(1 - current)
        state = devices.get_rng_state(device)
        numbers = torch.rand(3, device=device).tolist()
        assert torch.equal(torch.cuda.get_rng_state(1 - current), other)
        devices.set_rng_state(state, device)
        assert torch.rand(3, device=device).tolist() == numbers


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
def test_unknown_device_name_raises_user_error(name):
    with pytest.raises(UserError, match=f"--device {name} is not a device; choose auto"):
        devices.select_device(name)


@pytest.mark.parametrize(
    ("flags", "speedup", "precision"),
    [
        ({"avx512_bf16"}, 1.8, "bf16"),
        ({"amx_bf16", "avx512_bf16"}, 5.0, "bf16"),
        ({"avx512_bf16"}, 0.6, "fp32"),
        ({"avx2"}, 9.9, "fp32"),
        (set(), 9.9, "fp32"),
    ],
)
def test_auto_precision_on_cpu_needs_native_and_faster_bf16(monkeypatch, flags, speedup, precision):
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    monkeypatch.setattr(devices, "cpu_bf16_speedup", lambda: speedup)
    selected, reason = devices.select_precision("auto", CPU)
    assert selected == precision
    assert reason


def test_auto_precision_runs_no_bf16_trial_without_native_support(monkeypatch):
    monkeypatch.setattr(devices, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(devices, "cpu_bf16_speedup", lambda: pytest.fail("ran a trial"))
    assert devices.select_precision("auto", CPU)[0] == "fp32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_cuda_depends_on_compute_capability(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.select_precision("auto", torch.device("cuda"))[0] == precision


def test_auto_precision_on_mps_is_fp32():
    assert devices.select_precision("auto", torch.device("mps"))[0] == "fp32"
    assert devices.select_precision("bf16", torch.device("mps"))[0] == "bf16"


@pytest.mark.parametrize(("precision", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_bf16_leaves_weights_and_logits_in_float32(precision, inside):
    dtypes = []
    model = nn.Linear(4, 2)
    model.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    classifier = Classifier(model, lambda model, batch: model(batch), CPU, precision)
    assert classifier(torch.ones(1, 4)).dtype == torch.float32
    assert dtypes == [inside]
    assert model.weight.dtype == torch.float32


def test_tf32_raises_user_error_without_cuda():
    with pytest.raises(UserError, match="tf32 is for CUDA, not for cpu"):
        devices.select_precision("tf32", CPU)


@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_tf32_needs_ampere(capability, supported):
    with pretend_device("cuda", capability=capability):
        if supported:
            assert devices.select_precision("tf32", torch.device("cuda")) == ("tf32", "as requested")
            return
        with pytest.raises(UserError, match=r"tf32 needs compute capability 8\.0 or higher; Pretend GPU has 7\.5"):
            devices.select_precision("tf32", torch.device("cuda"))


def test_precision_reason_mentions_emulated_bf16(monkeypatch):
    for flags, emulated in (({"avx2"}, True), ({"avx512_bf16"}, False), (set(), False)):  # an empty set: unknown
        monkeypatch.setattr(devices, "cpu_flags", lambda flags=flags: flags)
        assert ("this CPU emulates bf16" in devices.select_precision("bf16", CPU)[1]) == emulated
    with pretend_device("cuda", capability=(7, 5)):
        assert "this GPU emulates bf16" in devices.select_precision("bf16", torch.device("cuda"))[1]


@pytest.mark.parametrize(
    ("kind", "accumulates", "mode"),
    [("cuda", False, "reduce-overhead"), ("cuda", True, None), ("cpu", False, None), ("mps", False, None)],
)
def test_cuda_graphs_are_not_used_with_micro_batches(kind, accumulates, mode, monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda model, dynamic, mode: modes.append(mode))
    devices.compile_model(nn.Linear(1, 1), torch.device(kind), accumulates)
    assert modes == [mode]


def test_set_rng_state_restores_the_random_state():
    state = devices.get_rng_state(CPU)
    numbers = torch.rand(3)
    devices.set_rng_state(state, CPU)
    assert torch.equal(torch.rand(3), numbers)


def test_training_compiles_for_few_shapes_and_gives_the_same_losses(monkeypatch):
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda model, dynamic, mode: compile_module(model, backend=counter, dynamic=dynamic)
    )
    model, _layers = make_gpt_classifier()
    plain, _plain_layers = make_gpt_classifier()
    devices.compile_model(model, CPU)
    dataset = gpt_dataset(make_reviews(50))
    dataset.pad_to = length_buckets(24)
    losses = train_with_adamw(model, train_gpt.last_non_padding_logits, dataset).losses
    # Batches of 8 reviews padded to 6, 12, 18 or 24 tokens, and all 50 at once for a log line.
    assert 2 <= counter.frame_count <= 5
    dataset.pad_to = None
    expected = train_with_adamw(plain, train_gpt.last_non_padding_logits, dataset).losses
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in expected], abs=1e-5)


def test_tune_malloc_works_without_glibc(monkeypatch):
    devices.tune_malloc()
    assert torch.ones(1 << 20).sum() == 1 << 20

    def absent(name):
        raise OSError(f"no {name}")

    monkeypatch.setattr(devices.ctypes, "CDLL", absent)
    devices.tune_malloc()


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        (
            "cuda",
            "TritonMissing: Cannot find a working triton installation.\n\nSet TORCHDYNAMO_VERBOSE=1",
            r"RuntimeError: TritonMissing: Cannot find a working triton installation\.; install Triton, or leave",
        ),
        (
            "cpu",
            "CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp:1:10: fatal error: Python.h: "
            "No such file\n",
            "this machine: x.cpp:1:10: fatal error: Python.h: No such file; install",
        ),
    ],
)
def test_check_compiler_reports_errors_in_one_line(device, error, message, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError(error)

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_function(function, backend=backend))
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    with pytest.raises(UserError, match=message) as raised:
        devices.check_compiler(torch.device(device))
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by the imports of PyTorch's compiler
def test_missing_compiler_is_reported_before_anything_is_downloaded(data_dir, tmp_path, failing, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_config", lambda size: pytest.fail("too late"))
    torch._dynamo.reset()  # forgets what other tests have compiled
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler")), "force_disable_caches": True}):
        message = failing(
            train_gpt.main, "--compile", "--device", "cpu", "--data_dir", data_dir, "--output_dir", tmp_path / "run"
        )
    assert "--compile does not work on this machine: InvalidCxxCompiler: No working C++ compiler found" in message
    assert message.endswith("; install a C++ compiler (or set CXX), or leave out --compile")
    assert not (tmp_path / "run").exists()


def test_select_saved_precision_keeps_the_precision_only_on_the_same_hardware(monkeypatch):
    monkeypatch.setattr("finetuning.performance.device.cpu_name", lambda: "Xeon")
    for native, expected in ((set(), "fp32"), ({"avx512_bf16"}, "bf16")):
        monkeypatch.setattr("finetuning.performance.device.cpu_flags", lambda native=native: native)
        monkeypatch.setattr("finetuning.performance.device.cpu_bf16_speedup", lambda: 2.0)
        cpu = torch.device("cpu")
        assert select_saved_precision("bf16", "2 processes, each on Xeon, 2 threads", cpu) == "bf16"
        assert select_saved_precision("bf16", "NVIDIA A100", cpu) == expected
        assert select_saved_precision("fp32", "NVIDIA A100", cpu) == "fp32"
        assert select_saved_precision("tf32", "NVIDIA A100", cpu) == "fp32"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100")
    assert select_saved_precision("tf32", "NVIDIA A100", torch.device("cuda")) == "tf32"
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert select_saved_precision("bf16", "arm64", torch.device("mps")) == "bf16"
    assert select_saved_precision("bf16", "NVIDIA A100", torch.device("mps")) == "fp32"
