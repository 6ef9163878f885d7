"""Launchers other than Lightning's own: torchrun on one machine, and between two hosts."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from meap_lit.cli import main
from meap_lit.data.prepare.text import PrepareText
from meap_lit.errors import UserError
from meap_lit.parallel.strategies import follow_launcher
from meap_lit.recipe.cli import RecipeCLI
from tests.support.checkpoints import read
from tests.support.toy_module import fork

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def arguments(recipe, *overrides):
    return ["fit", "--config", str(recipe), "--data.micro_batch_size", "2", *overrides]


def assert_like_one_process(recipe, run, micro_batch_size=2):
    """The run's last checkpoint has the weights of a run of a single process."""
    words = [*arguments(recipe)[:-1], str(micro_batch_size)]
    alone = RecipeCLI.run(words).model.decoder.state_dict()
    state = read(run / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in alone.items():
        torch.testing.assert_close(state[f"decoder.{name}"], value, atol=5e-6, rtol=1e-4)


def test_torchrun(toy_recipe, tmp_path):
    overlay = ["--config", "recipes/strategy/ddp.yaml"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "meap_lit", *arguments(toy_recipe, *overlay)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("clean validation loss") == 1, "one summary, not one a process"
    assert_like_one_process(toy_recipe, tmp_path / "runs" / "toy" / "version_0")


def test_a_rank_that_reads_another_dataset_is_named(toy_recipe, prepared, tmp_path, capfd):
    other = str(tmp_path / "other")
    options = {"input": ["README.md", "docs/*.md"], "tokenizer": prepared.tokenizer, "val_share": 0.1, "num_workers": 1}
    PrepareText(output=other, **options).run()
    for rank, dataset in enumerate((prepared.dataset, other)):
        (tmp_path / f"node{rank}").mkdir()
        (tmp_path / f"node{rank}" / "dataset").symlink_to(dataset)
    overlay = ["--config", str(ROOT / "recipes/strategy/ddp.yaml"), "--trainer.devices", "2"]
    words = arguments(toy_recipe, *overlay, "--data.datasets", "dataset")

    def fit():
        os.chdir(tmp_path / f"node{os.environ['LOCAL_RANK']}")
        sys.exit(main(words))

    assert fork(fit, 2, timeout=300)[0] == 2  # the other is killed, or ends by itself
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: dataset dataset on rank 1 is not that of rank 0 (contents differ); all ranks must"
    ), line


def test_a_failure_of_the_first_rank_leaves_none_behind(toy_recipe, tmp_path):
    """On a GPU the others do not notice that it has gone, and hold their devices for minutes."""
    words = arguments(toy_recipe, "--config", "recipes/strategy/ddp.yaml", "--trainer.devices", "2")
    words += ["--trainer.callbacks+=tests.support.interruption.FailOnFirstRank"]
    command = [sys.executable, "-m", "meap_lit", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("RuntimeError: as asked")
    running = [process for process in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _read(process)]
    assert not running


def _read(file):
    try:
        return file.read_text()
    except OSError:
        return ""


SRUN = """\
#!/usr/bin/env bash
# Starts the tasks of a job as srun does, on one machine: what SLURM tells a task is in its environment.
[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 64
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS
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
def slurm_job(monkeypatch, tmp_path):
    """The environment of a job of one task, whose current folder is `tmp_path`."""
    job = {"JOB_ID": "4711", "JOB_NAME": "meap", "NNODES": "1", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    job |= {"PROCID": "0", "NODEID": "0", "LOCALID": "0", "NODELIST": "127.0.0.1"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir(tmp_path)


def test_sigusr1_saves_and_requeues_a_job_which_goes_on(slurm_job, toy_recipe, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/usr/bin/env bash\necho "$@" >> scontrol\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("REQUEUE", "1")
    told = ["--trainer.callbacks+=tests.support.interruption.SignalAt", "--trainer.callbacks.batch", "13"]
    told += ["--trainer.callbacks.number", str(int(signal.SIGUSR1))]
    checkpoint = tmp_path / "runs" / "toy" / "job_4711" / "checkpoints" / "step=7.ckpt"

    def run(*words):
        command = ["bash", str(ROOT / "docs/slurm.sh"), "--config", str(toy_recipe), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    stopped = run(*told)
    assert stopped.returncode == 138, stopped.stderr
    assert f"SIGUSR1: stopped after optimizer step 7, saved {checkpoint}; resume with: python -m" in stopped.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert not list(tmp_path.rglob("*hpc*"))
    resumed = run()
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint: {checkpoint}" in resumed.stdout
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n", "a job that is done stays out of the queue"
    assert_like_one_process(toy_recipe, tmp_path / "runs" / "toy" / "job_4711", micro_batch_size=4)


@pytest.mark.parametrize("folder", [".", "runs"])
def test_no_run_starts_from_what_lightning_saved_to_requeue_another(slurm_job, toy_recipe, tmp_path, capsys, folder):
    """Lightning itself restores any hpc_ckpt_*.ckpt of the current folder when a job begins."""
    ntp = ["fit", "--config", str(toy_recipe), "--model.mask_ratio", "0", "--budget.max_steps", "3"]
    alone = RecipeCLI.run(ntp).model.decoder.state_dict()
    meap = RecipeCLI.run(["fit", "--config", str(toy_recipe), "--budget.max_steps", "2"]).trainer
    shutil.copytree(meap.checkpoint_callback.best_model_path, tmp_path / folder / "hpc_ckpt_1.ckpt")
    if folder == "runs":  # Lightning would look here
        assert main(ntp) == 2
        assert "error: Lightning would start this run from runs/hpc_ckpt_1.ckpt" in capsys.readouterr().err
        return
    beside = RecipeCLI.run(ntp).model.decoder.state_dict()
    for name, value in alone.items():
        assert torch.equal(value, beside[name]), name
    assert main([*ntp, "--ckpt_path", "hpc"]) == 2
    assert "hpc" in capsys.readouterr().err.splitlines()[-1]


TORCHRUN_OF_TWO_NODES = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM_OF_TWO_NODES = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "x"}
SLURM_OF_TWO_NODES |= {"SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize("launcher", [TORCHRUN_OF_TWO_NODES, SLURM_OF_TWO_NODES])
@pytest.mark.parametrize("devices", ["auto", -1, "-1", 4, "4", [0, 1, 2, 3], "0,1,2,3"])
def test_devices_and_nodes_follow_the_launcher(monkeypatch, launcher, devices):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    options = {"devices": devices, "num_nodes": 1, "plugins": None}
    follow_launcher(options)
    assert options["devices"] == (4 if str(devices) in ("auto", "-1") else devices)
    assert options["num_nodes"] == 2
    if launcher is SLURM_OF_TWO_NODES:
        assert [plugin.auto_requeue for plugin in options["plugins"]] == [False]


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        (TORCHRUN_OF_TWO_NODES, {"devices": 2}, "trainer.devices 2 contradicts torchrun, .* --nproc_per_node 4; leave"),
        (TORCHRUN_OF_TWO_NODES, {"num_nodes": 3}, "trainer.num_nodes 3 contradicts torchrun, .* with --nnodes 2"),
        (TORCHRUN_OF_TWO_NODES | {"WORLD_SIZE": "7"}, {}, "torchrun started 4 of 7 processes on this node"),
        (SLURM_OF_TWO_NODES, {"devices": 8}, "trainer.devices 8 contradicts SLURM, .* --ntasks-per-node 4; leave"),
        (SLURM_OF_TWO_NODES, {"num_nodes": 4}, "trainer.num_nodes 4 contradicts SLURM, .* with --nodes 2"),
        (SLURM_OF_TWO_NODES | {"SLURM_NTASKS": "7"}, {}, "SLURM started 7 tasks on 2 nodes, not --ntasks-per-node 4"),
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "x"},
            {},
            "SLURM started 2 tasks .* give --ntasks-per-node",
        ),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x"}, {}, "SLURM started this process alone; start all .* with srun"),
    ],
)
def test_contradictions_to_the_launcher(monkeypatch, launcher, options, message):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        follow_launcher({"devices": "auto", "num_nodes": 1, "plugins": None, **options})


def test_without_a_launcher_nothing_changes():
    options = {"devices": "auto", "num_nodes": 1, "plugins": None}
    follow_launcher(options)
    assert options == {"devices": "auto", "num_nodes": 1, "plugins": None}


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
        overlay = ["--config", "recipes/strategy/fsdp.yaml"]
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
