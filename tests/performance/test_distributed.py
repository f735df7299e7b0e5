import pytest
import torch

from finetuning import cli
from finetuning.performance import distributed
from finetuning.performance.device import select_device
from finetuning.system import environment
from finetuning.system.errors import UserError


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "several"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"TORCHELASTIC_RUN_ID": "previous", "WORLD_SIZE": "2", "RANK": "0"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    ],
)
def test_environment_variables_of_other_launchers_are_ignored(variables, monkeypatch):
    for name in (*environment.TORCHRUN_VARIABLES, *variables):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with distributed.process_group():
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert cli.ArgumentParser(prog="script.py").parse_args([]).command == "python script.py"
    cli.run_main(lambda: None)


@pytest.fixture
def process(monkeypatch):
    """Return a function that makes this process the given rank of `size`."""

    def pretend(rank, size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))

    return pretend


def test_shards_partition_a_batch(process):
    shards = []
    for rank in range(3):
        process(rank, 3)
        shards.append(distributed.shard(torch.arange(8)).tolist())
    assert shards == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_seed_per_rank_depends_on_seed_rank_and_step_only(process):
    def draw(rank, seed, step):
        process(rank, 2)
        torch.manual_seed(5)
        distributed.seed_per_rank(seed, step)
        return torch.rand(())

    torch.manual_seed(5)
    assert torch.rand(()) == draw(0, 123, 4)  # the main process keeps its random state
    numbers = [draw(0, 123, 4), draw(1, 123, 4), draw(1, 123, 5), draw(1, 124, 4)]
    assert len(set(map(float, numbers))) == 4
    assert draw(1, 123, 4) == numbers[1]


def test_each_process_uses_the_gpu_of_its_local_rank(process, monkeypatch):
    selected = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    process(1, 2)
    assert select_device("cuda") == torch.device("cuda", 1)
    assert selected == [torch.device("cuda", 1)]
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
    process(2, 3)
    with pytest.raises(UserError, match="--nproc_per_node 3 is more than this machine's 2 GPUs"):
        distributed.local_device(torch.device("cuda"))


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_device_without_support_for_several_processes_raises_user_error(process, name):
    process(0, 2)
    with pytest.raises(UserError, match=f"--device {name}: under torchrun choose cpu or cuda"):
        distributed.local_device(torch.device(name))
