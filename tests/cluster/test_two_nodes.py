"""Two machines, as far as the kernel can play them: network namespaces that reach each other by one cable only."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import finish, pretrain, start, tensors, wait_for_lines, write_recipe

from sslkit.files.jsonl_reader import read_lines

STEPS = 12
PORT = "29533"
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as in elastic.sh, which says why


@dataclass(frozen=True)
class Node:
    """A network namespace; its only other device is ``node``, with this address."""

    name: str
    address: str

    def start(self, launcher: list[str], recipe: Path, output: Path, log: Path) -> subprocess.Popen[str]:
        """One process on this node, under torchrun."""
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", *launcher]
        # Elsewhere a machine's name leads to its address.
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "node"} | ELASTIC
        with log.open("a") as file:
            command = ["ip", "netns", "exec", self.name, *words, *pretrain(recipe, output)]
            return subprocess.Popen(command, stdout=file, stderr=file, env=env, text=True)

    def die(self) -> None:
        """Every process on it, launcher and run alike, without a chance to say anything."""
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    made = [Node(f"sslkit-{os.getpid()}-{index}", f"10.77.0.{index + 1}") for index in range(2)]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip")
    try:
        try:
            for node in made:
                ip("netns", "add", node.name)
            ip("link", "add", "node", "netns", made[0].name, "type", "veth", "peer", "node", "netns", made[1].name)
            for node in made:
                ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "node")
                for device in ("lo", "node"):
                    ip("-n", node.name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr}")
        yield made[0], made[1]
    finally:
        there = ip("netns", "list")
        for node in made:
            if node.name in there:
                node.die()
                ip("netns", "delete", node.name)


def assert_the_same_bits(one: Path, other: Path) -> None:
    mine, theirs = tensors(one, STEPS), tensors(other, STEPS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    rows = [read_lines(run / "metrics.jsonl") for run in (one, other)]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


def train_on_one_machine(recipe: Path, output: Path) -> None:
    process = start(pretrain(recipe, output), processes=2)
    said = finish(process)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_two_nodes_equal_one_of_two_processes(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """Started by hand on each, as docs/clusters.md says."""
    recipe = write_recipe(tmp_path, train={"max_steps": STEPS})
    meeting = ["--nnodes", "2", "--master_addr", nodes[0].address, "--master_port", PORT]
    processes = [
        node.start([*meeting, "--node_rank", str(rank)], recipe, tmp_path / "run", tmp_path / f"log-{rank}")
        for rank, node in enumerate(nodes)
    ]
    codes = [process.wait(200) for process in processes]
    assert codes == [0, 0], [(tmp_path / f"log-{rank}").read_text()[-3000:] for rank in range(2)]
    assert "2 processes, cpu" in (tmp_path / "log-0").read_text()
    train_on_one_machine(recipe, tmp_path / "whole")
    assert_the_same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_node_that_dies_and_comes_back(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """Elastic, as docs/examples/launch/elastic.sh: the node that is left waits for it, and both continue."""
    recipe = write_recipe(tmp_path, train={"max_steps": STEPS}, checkpoint={"every_steps": 3})
    meeting = ["--nnodes", "2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    meeting += ["--rdzv-endpoint", f"{nodes[0].address}:{PORT}"]

    def join(rank: int) -> subprocess.Popen[str]:
        own = ["--local-addr", nodes[rank].address, "--rdzv-conf", f"is_host={rank == 0}"]
        return nodes[rank].start([*meeting, *own], recipe, tmp_path / "run", tmp_path / f"log-{rank}")

    first, second = join(0), join(1)
    wait_for_lines(tmp_path / "run/metrics.jsonl", 5, first)
    nodes[1].die()
    assert second.wait(20) == -signal.SIGKILL
    time.sleep(1)
    codes = [process.wait(240) for process in (join(1), first)]
    logs = [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], [log[-4000:] for log in logs]
    assert "continuing" in "".join(logs)
    train_on_one_machine(recipe, tmp_path / "whole")
    assert_the_same_bits(tmp_path / "whole", tmp_path / "run")
