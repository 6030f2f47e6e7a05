"""Who started the processes of a run, and what is done about those that accelerate does not join."""

import pytest

from apart_hf.cli.train import main
from apart_hf.errors import ApartError
from apart_hf.utils.accelerator import start_accelerator
from apart_hf.utils.launcher import LAUNCHERS, launch
from apart_hf.utils.processes import rank

VARIABLES = {variable for one in LAUNCHERS for variable in (one.size, one.rank, one.within) if variable}

LAUNCHED = {  # variables, processes, number of this one
    "torchrun": ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, 1),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, 4, 3),
    "MPICH": ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 2, 1),
    "MVAPICH": ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, 2, 1),
    "srun": ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_STEP_ID": "0"}, 3, 2),
    "srun of fewer tasks than the allocation": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"},
        2,
        1,
    ),
    "mpirun by srun, once a machine": (
        {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        8,
        5,
    ),
}
ALONE = {
    "python": {},
    "torchrun of one": {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"},
    "interactive allocation": {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "interactive step of an allocation": {
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
    },
    "srun of one": {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
    "runs of their own": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "WORLD_SIZE": "1"},
    "no numbers": {"WORLD_SIZE": "", "RANK": "", "PMI_SIZE": "many"},
}


@pytest.fixture
def started(monkeypatch):
    """Sets the variables of a launcher, in the place of those that are there."""

    def start(variables):
        for name in VARIABLES | {"LOCAL_RANK", "MASTER_PORT", "ACCELERATE_DYNAMO_MODE"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize("name", LAUNCHED)
def test_processes_that_are_not_joined_are_refused(name, started):
    """Before, each of them trained by itself into the same folder."""
    variables, processes, number = LAUNCHED[name]
    started(variables)
    assert (launch().processes, rank()) == (processes, number)
    joined = "set ACCELERATE_USE_CPU=true" if name == "torchrun" else "start them by ACCELERATE_USE_CPU=true torchrun"
    with pytest.raises(
        ApartError, match=f"^{processes} processes were started .*={processes}.* joins 1 on cpu"
    ) as raised:
        start_accelerator()
    assert joined in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ALONE)
def test_one_process_is_not_taken_for_several(name, started):
    started(ALONE[name])
    assert (launch().processes, rank()) == (1, 0)
    assert start_accelerator().num_processes == 1


def test_nothing_is_written_by_processes_that_are_not_joined(started, tmp_path, capsys):
    started({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(SystemExit) as raised:
        main(["--model", "test_resnet", "--output", str(tmp_path / "runs"), "--expect-processes", "1"])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.count("\n") == 1 and "2 processes were started (WORLD_SIZE=2)" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variables, wanted, advice, other",
    [
        ({}, 2, "start them by ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2", "accelerate launch"),
        (
            {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_USE_CPU": "True"},  # accelerate launch --cpu
            4,
            "accelerate launch started one; start them by ACCELERATE_USE_CPU=true torchrun --nproc-per-node 4",
            "use accelerate launch",
        ),
        (
            {"WORLD_SIZE": "1", "RANK": "0"},
            2,
            "torchrun starts as many as its --nproc-per-node says, here 1; make them 2",
            "start them by",
        ),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "ACCELERATE_DYNAMO_MODE": "default"},  # accelerate launch --multi_gpu
            3,
            "accelerate launch starts as many as its --num_processes says, here 1; make them 3",
            "torchrun",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            2,
            "srun starts as many as its --ntasks says, here 1; make them 2",
            "torchrun",
        ),
    ],
)
def test_the_advice_is_not_what_was_just_done(variables, wanted, advice, other, started, tmp_path, capsys):
    started(variables)
    with pytest.raises(SystemExit) as raised:
        main(["--model", "test_resnet", "--output", str(tmp_path / "runs"), "--expect-processes", str(wanted)])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.count("\n") == 1
    assert f"1 process(es) were started, not {wanted}; " in error and advice in error and other not in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variable, value, what",
    [
        ("ACCELERATE_TORCH_DEVICE", "gpu", "device"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:99", ""),
        ("ACCELERATE_USE_CPU", "perhaps", "perhaps"),
        ("ACCELERATE_DYNAMO_BACKEND", "perhaps", "PERHAPS"),
    ],
)
def test_what_accelerate_cannot_read_ends_in_one_line(variable, value, what, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ApartError, match="accelerate does not start as it is configured here") as raised:
        start_accelerator()
    assert what in str(raised.value) and "\n" not in str(raised.value)
