import pytest
import torch
from conftest import reviews
from pretend_device import pretend_device
from test_loop import gpt, gpt_dataset, train
from torch import nn
from torch._dynamo.testing import CompileCounter

import train_gpt
from finetuning import runtime
from finetuning.batches import few_lengths
from finetuning.errors import UserError
from finetuning.loop import Classifier

CPU = torch.device("cpu")


def test_auto_takes_the_best_device_there_is(monkeypatch):
    for devices, expected in [({"cuda", "mps", "cpu"}, "cuda"), ({"mps", "cpu"}, "mps"), ({"cpu"}, "cpu")]:
        monkeypatch.setattr(runtime, "device_count", lambda kind, devices=devices: int(kind in devices))
        assert runtime.select_device().type == expected


@pytest.mark.parametrize("name", ["cuda:1", "cuda:7"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(runtime, "device_count", lambda kind: {"cuda": 1, "cpu": 1}.get(kind, 0))
    assert runtime.select_device("cuda").type == "cuda"
    with pytest.raises(UserError, match=f"--device {name} is not on this machine; it has: cuda, cpu"):
        runtime.select_device(name)


@pytest.mark.parametrize(("name", "current"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_the_chosen_gpu_is_the_current_one(name, current):
    """Its generator alone is saved, put back and drawn from."""
    with pretend_device("cuda", count=2):
        device = runtime.select_device(name)
        assert torch.cuda.current_device() == current
        other = torch.cuda.get_rng_state(1 - current)
        state = runtime.random_state(device)
        drawn = torch.rand(3, device=device).tolist()
        assert torch.equal(torch.cuda.get_rng_state(1 - current), other)
        runtime.set_random_state(state, device)
        assert torch.rand(3, device=device).tolist() == drawn


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
def test_a_name_that_is_no_device_is_refused(name):
    with pytest.raises(UserError, match="is no device"):
        runtime.select_device(name)


@pytest.mark.parametrize(("flags", "speedup", "precision"), [
    ({"avx512_bf16"}, 1.8, "bf16"), ({"amx_bf16", "avx512_bf16"}, 5.0, "bf16"), ({"avx512_bf16"}, 0.6, "fp32"),
    ({"avx2"}, 9.9, "fp32"), (set(), 9.9, "fp32")])
def test_auto_precision_on_the_cpu_needs_native_bf16_that_is_faster(monkeypatch, flags, speedup, precision):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: flags)
    monkeypatch.setattr(runtime, "cpu_bf16_speedup", lambda: speedup)
    chosen, why = runtime.select_precision("auto", CPU)
    assert chosen == precision
    assert why


def test_bf16_is_not_even_tried_without_the_cpus_flags(monkeypatch):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(runtime, "cpu_bf16_speedup", lambda: pytest.fail("tried"))
    assert runtime.select_precision("auto", CPU)[0] == "fp32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_cuda(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.select_precision("auto", torch.device("cuda"))[0] == precision


def test_mps_stays_in_fp32_unless_asked():
    assert runtime.select_precision("auto", torch.device("mps"))[0] == "fp32"
    assert runtime.select_precision("bf16", torch.device("mps"))[0] == "bf16"


@pytest.mark.parametrize(("precision", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_of_the_arithmetic_not_of_weights_or_logits(precision, inside):
    seen = []
    model = nn.Linear(4, 2)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    classifier = Classifier(model, lambda model, batch: model(batch), CPU, precision)
    assert classifier(torch.ones(1, 4)).dtype == torch.float32
    assert seen == [inside]
    assert model.weight.dtype == torch.float32


def test_tf32_is_for_cuda():
    with pytest.raises(UserError, match="is for CUDA, not for cpu"):
        runtime.select_precision("tf32", CPU)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_tf32_needs_ampere(capability, refused):
    with pretend_device("cuda", capability=capability):
        if not refused:
            assert runtime.select_precision("tf32", torch.device("cuda")) == ("tf32", "as asked")
            return
        with pytest.raises(UserError, match=r"tf32 needs compute capability 8\.0 or more; Pretend GPU has 7\.5"):
            runtime.select_precision("tf32", torch.device("cuda"))


def test_emulated_bf16_says_so(monkeypatch):
    for flags, emulated in (({"avx2"}, True), ({"avx512_bf16"}, False), (set(), False)):  # none: not known
        monkeypatch.setattr(runtime, "cpu_flags", lambda flags=flags: flags)
        assert ("this CPU emulates bf16" in runtime.select_precision("bf16", CPU)[1]) == emulated
    with pretend_device("cuda", capability=(7, 5)):
        assert "this GPU emulates bf16" in runtime.select_precision("bf16", torch.device("cuda"))[1]


@pytest.mark.parametrize(("kind", "parts", "mode"), [
    ("cuda", 1, "reduce-overhead"), ("cuda", 2, None), ("cpu", 1, None), ("mps", 1, None)])
def test_cuda_graphs_are_for_batches_in_one_part(kind, parts, mode, monkeypatch):
    chosen = []
    monkeypatch.setattr(nn.Module, "compile", lambda model, dynamic, mode: chosen.append(mode))
    runtime.compile_model(nn.Linear(1, 1), torch.device(kind), parts)
    assert chosen == [mode]


def test_random_state_is_put_back():
    state = runtime.random_state(CPU)
    drawn = torch.rand(3)
    runtime.set_random_state(state, CPU)
    assert torch.equal(torch.rand(3), drawn)


def test_a_model_is_compiled_for_a_few_shapes_only(monkeypatch):
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model, dynamic, mode: compile_module(
        model, backend=counter, dynamic=dynamic))
    model, layers = gpt()
    plain, plain_layers = gpt()
    runtime.compile_model(model, CPU)
    dataset = gpt_dataset(reviews(50))
    dataset.pad_to = few_lengths(24)
    losses = train(model, layers.head, train_gpt.read_last_real, dataset).losses
    # Batches of 8 reviews padded to 6, 12, 18 or 24 tokens, and all 50 at once for a log line.
    assert 2 <= counter.frame_count <= 5
    dataset.pad_to = None
    expected = train(plain, plain_layers.head, train_gpt.read_last_real, dataset).losses
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in expected], abs=1e-5)


def test_keeping_freed_memory_is_harmless_anywhere(monkeypatch):
    runtime.keep_freed_memory()
    assert torch.ones(1 << 20).sum() == 1 << 20

    def absent(name):
        raise OSError(f"no {name}")
    monkeypatch.setattr(runtime.ctypes, "CDLL", absent)
    runtime.keep_freed_memory()


@pytest.mark.parametrize(("device", "error", "message"), [
    ("cuda", "TritonMissing: Cannot find a working triton installation.\n\nSet TORCHDYNAMO_VERBOSE=1",
     r"RuntimeError: TritonMissing: Cannot find a working triton installation\.; install Triton, or leave"),
    ("cpu", "CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp:1:10: fatal error: Python.h: "
            "No such file\n", "this machine: x.cpp:1:10: fatal error: Python.h: No such file; install"),
])
def test_a_compiler_that_does_not_work_is_one_line(device, error, message, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError(error)
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_function(function, backend=backend))
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    with pytest.raises(UserError, match=message) as raised:
        runtime.check_compiler(torch.device(device))
    assert "\n" not in str(raised.value)
