"""Launchers other than Lightning's own: torchrun on one machine, and between two hosts."""

import os
import shutil
import socket
import subprocess
import sys
import uuid

import pytest
import torch

from meap_lit.recipe import RecipeCLI

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def arguments(recipe, *overrides):
    return ["fit", "--config", str(recipe), "--data.micro_batch_size", "2", *overrides]


def assert_like_one_process(recipe, run):
    """The run's last checkpoint has the weights of a run of a single process."""
    alone = RecipeCLI.run(arguments(recipe)).model.decoder.state_dict()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in alone.items():
        torch.testing.assert_close(state[f"decoder.{name}"], value, atol=5e-6, rtol=1e-4)


def test_torchrun(toy_recipe, tmp_path):
    overlay = ["--config", "recipes/strategy/ddp.yaml", "--trainer.devices", "2"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "meap_lit", *arguments(toy_recipe, *overlay)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("clean validation loss") == 1, "one summary, not one a process"
    assert_like_one_process(toy_recipe, tmp_path / "runs" / "toy" / "version_0")


SRUN = """\
#!/usr/bin/env bash
# Starts the tasks of a job as srun does, on one machine: what SLURM tells a task is in its environment.
[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 64
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    export SLURM_PROCID=$task SLURM_NODEID=$((task / SLURM_NTASKS_PER_NODE))
    SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
done
status=0
for task in $(jobs -p); do wait "$task" || status=$?; done
exit $status
"""


def test_the_slurm_script_with_two_nodes_of_a_stand_in_for_srun(toy_recipe, tmp_path):
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    job = {"JOB_ID": "4711", "JOB_NAME": "meap", "NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NODELIST": "127.0.0.1"}
    environment |= {f"SLURM_{name}": value for name, value in job.items()} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["bash", "docs/slurm.sh", *arguments(toy_recipe, "--config", "recipes/strategy/ddp.yaml")[1:]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert "MEMBER: 2/2" in result.stderr, "both tasks are of one run"
    assert result.stdout.count("clean validation loss") == 1
    assert_like_one_process(toy_recipe, tmp_path / "runs" / "toy" / "version_0")
    without_recipe = subprocess.run(["bash", "docs/slurm.sh"], capture_output=True, text=True, check=False)
    assert without_recipe.returncode != 0
    assert "name a recipe: --config RECIPE --config OVERLAY" in without_recipe.stderr


@pytest.fixture
def two_hosts():
    """Two network namespaces that see each other and nothing else: their names, interfaces and addresses."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    name = f"meap{uuid.uuid4().hex[:6]}"
    hosts = [(f"{name}-{n}", f"{name}{n}", f"10.213.77.{n + 1}") for n in range(2)]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)

    if ip("netns", "add", hosts[0][0]).returncode != 0:
        pytest.skip("this machine allows no network namespaces")
    try:
        ip("netns", "add", hosts[1][0])
        ip("link", "add", hosts[0][1], "type", "veth", "peer", "name", hosts[1][1])
        for host, interface, address in hosts:
            ip("link", "set", interface, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", host, "link", "set", interface, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host, _, _ in hosts:
            ip("netns", "del", host)


def test_two_hosts(two_hosts, toy_recipe, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, (host, interface, _) in enumerate(two_hosts):
        overlay = ["--config", "recipes/strategy/fsdp2.yaml", "--trainer.num_nodes", "2", "--trainer.devices", "1"]
        overlay += ["--trainer.strategy.save_distributed_checkpoint", "false"]
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{two_hosts[0][2]}:{port}", "--rdzv_id", host[:-2]]
        # each host says whether it keeps the store: both namespaces have the same host name
        rendezvous += ["--local_addr", two_hosts[rank][2], "--rdzv_conf", f"is_host={int(rank == 0)},read_timeout=60"]
        command = [*TORCHRUN, "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1", *rendezvous]
        command = ["ip", "netns", "exec", host, *command, "-m", "meap_lit", *arguments(toy_recipe, *overlay)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface}
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    assert sum(output.count("clean validation loss") for output, _ in outputs) == 1
    assert_like_one_process(toy_recipe, tmp_path / "runs" / "toy" / "version_0")
