"""Submitted runs: on this machine for real, and under a Slurm of our own that has the real one's manners."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import cli_error, small_recipe
from launching import finish, pretrain, start, tensors, write_recipe

import sslkit
from sslkit import cluster
from sslkit.cluster import Resources
from sslkit.cluster.job import Pretraining
from sslkit.cluster.submission import batch_file, minutes
from sslkit.data.loading.loader import cores_of_a_process
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import read_lines

pytest.importorskip("submitit")
STEPS = 60
HERE = Path(__file__).parent


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its state folder; its commands are on the path."""
    commands, state = tmp_path / "bin", tmp_path / "slurm"
    for folder in (commands, state):
        folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "fake_slurm.py"} {name} "$@"\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, train={"max_steps": STEPS})
    process = start(pretrain(recipe, folder / "run"), processes=2)
    said = finish(process)
    assert process.returncode == 0, said
    return folder / "run"


def submit(recipe: Path, output: Path, *words: str) -> str:
    """What it prints; a file takes it, as the job would hold a pipe open."""
    command = [sys.executable, "-m", "sslkit", "submit", str(recipe), "--output", str(output), *words]
    with output.with_name("said").open("w+") as file:
        subprocess.run(command, stdout=file, stderr=file, timeout=120, check=False)
        file.seek(0)
        said = file.read()
    assert said.startswith("job "), said
    return said


def wait_for(what: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what.exists():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for_steps(run: Path, count: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    file = run / "metrics.jsonl"
    while not (file.is_file() and file.read_text().count("\n") >= count):
        logs = "".join(log.read_text() for log in run.with_name(f"{run.name}.jobs").glob("*_log.out"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.01)


def assert_the_same_bits(run: Path, whole: Path) -> None:
    one, other = tensors(whole, STEPS), tensors(run, STEPS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [read_lines(each / "metrics.jsonl") for each in (whole, run)]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_here_it_is_stopped_started_again_and_ends_with_the_same_bits(tmp_path: Path, whole: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps": STEPS})
    said = submit(recipe, tmp_path / "run", "--cluster", "local", "--tasks-per-node", "2")
    job = int(said.split()[1].rstrip(":"))
    wait_for_steps(tmp_path / "run", 5)
    for task in children(job):
        os.kill(task, signal.SIGUSR1)
    wait_for(tmp_path / f"run.jobs/{job}_0_result.pkl")
    log = (tmp_path / f"run.jobs/{job}_0_log.out").read_text()
    assert "by SIGUSR1" in log
    assert log.count("continuing") == 1, log
    assert_the_same_bits(tmp_path / "run", whole)


@pytest.mark.slow
def test_slurm_stops_it_on_two_nodes_and_it_queues_itself_again(tmp_path: Path, slurm: Path, whole: Path) -> None:
    """The warning comes to every task, and the first node is where they meet."""
    recipe = write_recipe(tmp_path, train={"max_steps": STEPS})
    said = submit(recipe, tmp_path / "run", "--nodes", "2", "--partition", "cpu", "--cpus-per-task", "1")
    assert "scancel 4711" in said
    recipe.write_text("not what was submitted")
    assert_it_is_stopped_and_goes_on(tmp_path / "run", slurm)
    assert_the_same_bits(tmp_path / "run", whole)


@pytest.mark.slow
def test_slurm_stops_a_process_and_it_queues_itself_again(tmp_path: Path, slurm: Path) -> None:
    recipe = small_recipe("moco_v2", "test_resnet", train={"max_steps": STEPS})
    sslkit.train(recipe, tmp_path / "whole")
    cluster.submit(recipe, tmp_path / "run", Resources(cpus_per_task=1))
    assert_it_is_stopped_and_goes_on(tmp_path / "run", slurm)
    assert_the_same_bits(tmp_path / "run", tmp_path / "whole")


def assert_it_is_stopped_and_goes_on(run: Path, slurm: Path) -> None:
    wait_for_steps(run, 5)
    for task in (slurm / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    wait_for(slurm / "ended")
    log = run.with_name("run.jobs").joinpath("4711_0_log.out").read_text()
    assert (slurm / "ended").read_text() == "0", log
    assert "by SIGUSR1" in log
    calls = (slurm / "calls").read_text().splitlines()
    assert [line.split()[0] for line in calls] == ["sbatch", "job", "srun", "scontrol", "srun"]
    assert "scontrol requeue 4711" in calls


def test_bad_input_ends_a_job_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that are gone when the job starts; the batch script does not queue that again."""
    monkeypatch.setattr("sslkit.cluster.job.join_tasks", lambda: None)
    monkeypatch.setattr("sslkit.cluster.job.signal.signal", lambda *_: None)
    recipe = small_recipe(data={"path": str(tmp_path / "gone")})
    with pytest.raises(SystemExit) as ended:
        Pretraining(recipe.to_toml(), str(tmp_path / "run"))()
    assert ended.value.code == 2
    assert "gone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    """A batch file in whose place of srun stands ``$TASKS``, and the run folder."""
    run = tmp_path / "a run"
    (tmp_path / "a run.jobs").mkdir()
    text = batch_file(small_recipe(), run, Resources(retries=2))
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    file = tmp_path / "job.sh"
    file.write_text(text.replace(line, 'sh -c "$TASKS"').replace("scontrol", "echo scontrol"))
    return file, run


def start_job(file: Path, tasks: str) -> tuple[int, bool]:
    """Exit code, and whether it was queued again."""
    env = os.environ | {"SLURM_JOB_ID": "7", "TASKS": tasks}
    done = subprocess.run(["bash", str(file)], capture_output=True, text=True, env=env, check=False)
    return done.returncode, "scontrol requeue 7" in done.stdout


@pytest.mark.parametrize("code", [0, 2, 143])
def test_what_ended_for_good_is_not_queued_again(job: tuple[Path, Path], code: int) -> None:
    assert start_job(job[0], f"exit {code}") == (code, False)


@pytest.mark.parametrize("code", [1, 75, 137])
def test_starts_that_get_nowhere_are_bounded(job: tuple[Path, Path], code: int) -> None:
    """A crash and a stop alike are queued again as long as checkpoints come, and twice in a row without one at most."""
    file, run = job
    latest = shlex.quote(str(run / "checkpoints/latest"))
    (run / "checkpoints").mkdir(parents=True)
    for step in range(4):
        assert start_job(file, f"echo step-{step} > {latest}; exit {code}")[1]
    assert start_job(file, f"exit {code}")[1]
    assert start_job(file, f"echo step-9 > {latest}; exit {code}")[1]
    assert start_job(file, f"exit {code}")[1]
    assert start_job(file, f"exit {code}") == (code, False)


def test_the_batch_file_says_what_was_asked(tmp_path: Path) -> None:
    asked = Resources(2, 8, time="2-12:30", mem="64G", cpus_per_task=12, partition="gpu", account="lab")
    text = batch_file(small_recipe(), tmp_path / "run", asked)
    lines = text.splitlines()
    for option in (
        *("nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=12", "time=3630", "mem=64G"),
        *("partition=gpu", "account=lab", "requeue", "signal=USR1@120", "open-mode=append", "job-name=run"),
    ):
        assert f"#SBATCH --{option}" in lines, text
    assert "wckey" not in text
    assert " --cpus-per-task=12 " in next(line for line in lines if line.startswith("srun "))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [("90", 90), ("90:30", 90), ("2:30:00", 150), ("1-0", 1440), ("2-12", 3600), ("1-2:30", 1590), ("1-2:30:59", 1590)],
)
def test_times_are_slurms(words: str, expected: int) -> None:
    assert minutes(words) == expected


def test_a_task_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun binds each task, so what the kernel shows of cores is not to be shared once more; torchrun does not."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)))
    assert cores_of_a_process(4) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert cores_of_a_process(4) == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")  # not bound: the node shows all cores of the job
    assert cores_of_a_process(4) == 6
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert cores_of_a_process(4) == 3


def test_an_unknown_time() -> None:
    with pytest.raises(UserError, match="--time tomorrow: write minutes"):
        minutes("tomorrow")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "3"], "batch_size: 32 images cannot be split evenly over 3 processes"),
        (["--set", "train.processes=4"], "processes = 4, but --nodes and --gpus-per-node make 1"),
        (["--mem", "much"], "--mem much: write a number"),
        (["--time", "2"], "--time 2: leaves no time to train"),
        (["--sbatch", "qos="], "--sbatch qos=: must be name=value"),
        (["--sbatch", "q s=1"], "--sbatch 'q s': write the long name"),
        (["--sbatch", "ntasks_per_node=3"], "--sbatch ntasks_per_node: use --gpus-per-node or --tasks-per-node"),
        (["--sbatch", "nodes=7"], "--sbatch nodes: use --nodes, which is checked"),
        (["--sbatch", "qos=a\nrm -rf b"], "--sbatch qos: write one line"),
        (
            ["--partition", "gpu\n#SBATCH --account=x"],
            "--partition: write one line without control characters, not 'gpu\\n#SBATCH --account=x'",
        ),
        (["--output", "/"], "--output /: logs are written next to the run folder"),
        (["--output", "runs/50%j"], "Slurm interprets %"),
        (["--cluster", "local", "--dry-run"], "--dry-run: prints an sbatch file"),
        (["--sbatch", "signal=TERM"], "--sbatch signal: is set by sslkit"),
        (["--cluster", "pbs"], "--cluster: must be slurm or local, not 'pbs'"),
        (["--cluster", "local", "--nodes", "2"], "--cluster local runs on this machine only"),
        (
            ["--partition", "nowhere"],
            "the cluster refuses the job: sbatch: error: invalid partition specified",
        ),
    ],
)
def test_what_cannot_be_submitted(words: list[str], sentence: str, tmp_path: Path, slurm: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert sentence in cli_error(["submit", str(recipe), "--output", str(tmp_path / "run"), *words])
    assert not (tmp_path / "run").exists()
    assert not (slurm / "ended").exists()


def test_a_run_that_the_job_could_not_continue(tmp_path: Path, slurm: Path) -> None:
    """Told at once, and not after hours in a queue."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    run.joinpath("recipe.toml").write_text(small_recipe().to_toml())
    assert "holds a run of another recipe" in cli_error(["submit", str(recipe), "--output", str(run)])
    run.joinpath("recipe.toml").rename(run / "notes.txt")
    assert "holds something that is not a run" in cli_error(["submit", str(recipe), "--output", str(run)])
    assert not run.with_name("run.jobs").exists()


def test_the_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (".", "other/.."):
        lines = batch_file(small_recipe(), output, Resources(sbatch={"exclusive": True})).splitlines()
        assert f"#SBATCH --job-name={tmp_path.name}" in lines
        assert f"#SBATCH --output={tmp_path}.jobs/%j_0_log.out" in lines
        assert "#SBATCH --exclusive" in lines


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "sbatch is not installed here" in cli_error(["submit", str(write_recipe(tmp_path))])


def test_no_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    said = cli_error(["submit", str(write_recipe(tmp_path)), "--cluster", "local", "--output", str(tmp_path / "run")])
    assert "pip install submitit" in said
