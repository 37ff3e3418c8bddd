"""A Slurm of one machine, as far as a job sees it: called as sbatch, srun or scontrol, it does what they would.

sbatch starts the job in the background; srun starts its tasks here, with a node for each if there are several, and
returns the highest exit code; scontrol requeue ends the job and starts it again. State lies in ``$FAKE_SLURM``: what
was called, the tasks' process ids, and how the job ended.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["FAKE_SLURM"])
JOB = "4711"


def options(file: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", Path(file).read_text(), flags=re.M)
    return {name: shlex.split(value)[0] if value else "" for name, value in found}


def sbatch(file: str) -> None:
    asked = options(file)
    if asked.get("partition") == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    quiet = subprocess.DEVNULL  # what waits for sbatch waits until its pipes are closed
    subprocess.Popen([sys.executable, __file__, "job", file], start_new_session=True, stdout=quiet, stderr=quiet)
    print(f"Submitted batch job {JOB}")


def run_job(file: str) -> None:
    asked, restarts = options(file), 0
    while True:
        nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
        env = os.environ | {"SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(nodes * tasks)}
        env |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": str(nodes), "SLURM_RESTART_COUNT": str(restarts)}
        with Path(asked["output"].replace("%j", JOB)).open("a") as log:
            code = subprocess.run(["bash", file], env=env, stdout=log, stderr=log, check=False).returncode
        if not (STATE / "requeue").exists():
            (STATE / "ended").write_text(str(code))
            return
        (STATE / "requeue").unlink()
        restarts += 1


def srun(words: list[str]) -> None:
    output = words[words.index("--output") + 1]
    command = words[next(index for index, word in enumerate(words) if word.endswith("python")) :]
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    tasks = []
    for task in range(count):
        node, local = divmod(task, count // nodes)
        env = os.environ | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        with Path(output.replace("%j", JOB).replace("%t", str(task))).open("a") as log:
            tasks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    (STATE / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def main() -> None:
    called, words = sys.argv[1], sys.argv[2:]
    with (STATE / "calls").open("a") as calls:
        calls.write(shlex.join([called, *words]) + "\n")
    if called == "sbatch":
        sbatch(words[0])
    elif called == "job":
        run_job(words[0])
    elif called == "srun":
        srun(words)
    else:
        (STATE / words[0]).touch()


main()
