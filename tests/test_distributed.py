"""Two processes against one: gradients, statistics, batches, and whole runs under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lirpa_fastwarmup as fw
from lirpa_fastwarmup import cli, distributed
from lirpa_fastwarmup.distributed import all_reduce, differentiable_all_reduce, local_device, process_group
from lirpa_fastwarmup.experiments import data
from lirpa_fastwarmup.experiments.report.records import read_history
from lirpa_fastwarmup.experiments.training import load_model
from lirpa_fastwarmup.storage import read_json, weights_sum
from lirpa_fastwarmup.verification import evaluate
from tests import ranks

SMALL = (
    *("--width", "2", "--hidden", "8", "--epochs", "3", "--ramp-length", "2", "--data-limit", "301", "--lr", "5e-3"),
    *("--eps", "0.01", "--pgd-steps", "1", "--pgd-restarts", "1", "--seed", "3"),
)


pytestmark = pytest.mark.usefixtures("digits_for_processes")


@pytest.fixture(scope="module", autouse=True)
def _processes_end():
    yield
    ranks.end_processes(2)


def assert_close(found, expected, largest):
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), rtol=0, atol=1e-5 * largest), name


@pytest.mark.parametrize("network", ranks.NETWORKS)
def test_gradients_of_two_processes_are_those_of_one_with_batchnorm_in_evaluation_mode(network):
    options = {"network": network, "training": False, "regularised": False}
    first, second = ranks.results_of(2, ranks.shared_step, 16, False, options)
    alone = ranks.step_of(ranks.objective(**options), *ranks.batch(16))
    largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
    for found in (first, second):
        assert_close(found["gradients"], alone["gradients"], largest)


@pytest.mark.parametrize(
    ("network", "bound", "regularised"),
    [
        ("convolutional", "ibp", True),
        ("residual", "ibp", True),
        ("convolutional", "crown-ibp-fused", True),
        ("convolutional", "sabr", True),
        ("residual", "mtl-ibp", True),
        ("residual", "ibp", False),
    ],
)
def test_gradients_are_those_of_one_with_statistics_over_all_processes(network, bound, regularised):
    options = {"network": network, "training": True, "regularised": regularised, "bound": bound}
    first, second = ranks.results_of(2, ranks.shared_step, 16, True, options)
    alone = ranks.step_of(ranks.objective(**options), *ranks.batch(16))
    largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
    for found in (first, second):
        assert_close(found["gradients"], alone["gradients"], largest)
        assert_close(found["state"], alone["state"], 1.0)
        assert found["terms"] == pytest.approx(alone["terms"], rel=1e-5)
    if regularised:
        assert alone["terms"]["tightness"] > 0


def test_without_them_statistics_are_each_process_own():
    options = {"network": "convolutional", "training": True, "regularised": True}
    first, second = ranks.results_of(2, ranks.shared_step, 16, False, options)
    assert first["terms"] != second["terms"]
    for name, gradient in first["gradients"].items():  # Averaged, and so the same on both.
        assert torch.equal(gradient, second["gradients"][name])


@pytest.mark.slow
def test_gradients_of_compiled_steps_are_averaged_as_those_of_eager_ones():
    options = {"network": "convolutional", "training": True, "regularised": True}
    first, second = ranks.results_of(2, ranks.compiled_step, 16, options)
    eager, _ = ranks.results_of(2, ranks.shared_step, 16, False, options)
    largest = max(float(gradient.abs().max()) for gradient in eager["gradients"].values())
    assert first["recordings"] == 1
    assert_close(first["gradients"], second["gradients"], 0.0)
    assert_close(first["gradients"], eager["gradients"], 10 * largest)


def test_steps_with_statistics_over_all_processes_are_not_compiled():
    for found in ranks.results_of(2, ranks.compiled_over_ranks):
        assert len(found) == 1
        assert "several processes" in found[0]


@pytest.mark.parametrize(
    ("change", "message"), [("settings", "other settings"), ("data", "other data"), ("nothing", "")]
)
def test_processes_of_different_runs_are_refused_on_all_of_them(change, message):
    for found in ranks.results_of(2, ranks.joined_runs, change):
        assert message in found
        assert bool(found) == bool(message)


@pytest.mark.parametrize(("samples", "batch", "size"), [(40, 8, 2), (37, 8, 2), (41, 8, 3), (33, 16, 4)])
def test_shards_make_up_the_batches_of_one_process(samples, batch, size):
    images = torch.arange(samples * 3 * 6 * 6, dtype=torch.int64).remainder(251).view(samples, 3, 6, 6).byte()
    split = data.Split(images, torch.arange(samples) % 5)

    def batches(shard):
        augmentation = data.Augmentation(flip=True, crop_padding=1, generator=torch.Generator().manual_seed(2))
        return data.Batches(
            *(split, batch),
            generator=torch.Generator().manual_seed(1),
            augment=augmentation,
            shard=shard,
            drop_single=True,
        )

    alone = list(batches((0, 1)))
    shards = [list(batches((rank, size))) for rank in range(size)]
    assert len({len(shard) for shard in shards}) == 1
    for place, parts in enumerate(zip(*shards, strict=True)):
        x, y = alone[place]
        assert batches((0, size)).samples_in(place) == len(y) == sum(len(part) for _, part in parts)
        for rank, (part_x, part_y) in enumerate(parts):
            assert torch.equal(part_x, x[rank::size])
            assert torch.equal(part_y, y[rank::size])
            assert len(part_y) >= 2  # Which BatchNorm needs.


def test_batches_that_are_too_small_for_the_processes_are_refused():
    split = data.Split(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"in batches of 5 leave no batch with two samples .* for each of 3 process"):
        data.Batches(split, 5, drop_single=True, shard=(0, 3))
    assert len(data.Batches(split, 6, drop_single=True, shard=(0, 3))) == 6  # Four samples are left over.


def test_a_pytorch_without_nccl_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name != "nccl")
    with pytest.raises(NotImplementedError, match="connected by nccl"), process_group(torch.device("cuda")):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU, as there are 1"):
        local_device(torch.device("cuda"))


def test_alone_sums_are_what_there_is():
    with process_group(torch.device("cpu")) as found:
        assert (found.rank, found.size, found.is_rank_zero) == (0, 1, True)
    values = torch.ones(2, requires_grad=True)
    assert all_reduce(values) is values
    assert differentiable_all_reduce(values) is values


def torchrun(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ),
            *("-m", "lirpa_fastwarmup", *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )


def alone(*arguments):
    """The same command in this process, as processes of torchrun run it: with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main([str(argument) for argument in arguments]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, digits_for_processes):
    """A run of two processes with statistics over both, and the same by one."""
    folder = tmp_path_factory.mktemp("pair")
    done = torchrun("train", "mnist5k", "--out", folder / "two", *SMALL, "--sync-batchnorm", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    alone("train", "mnist5k", "--out", folder / "one", *SMALL, "--device", "cpu")
    return folder, done.stdout


def assert_histories_agree(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one["eps"] == other["eps"]
        for name in ("loss", "clean_loss", "robust_loss", "tightness"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5, nan_ok=True), name
        assert one["train_clean_error"] == pytest.approx(other["train_clean_error"], abs=0.02)
        # So short a training leaves logits close together, where the last bit decides of the class.
        assert one["standard_error"] == pytest.approx(other["standard_error"], abs=0.15)


def test_the_summary_is_that_of_the_saved_model_where_each_process_has_its_own_statistics(tmp_path):
    """Evaluated are rank 0's running statistics on all ranks, as they are saved."""
    out = tmp_path / "run"
    done = torchrun("train", "mnist5k", "--out", out, *SMALL, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    model, test = load_model(out / "model.pt"), data.load("mnist5k").test
    bounded = fw.BoundedModule(model, test.inputs[:2])
    found = evaluate(bounded, data.Batches(test, 250), 0.01, pgd_steps=1, restarts=1, seed=3)
    summary, last = read_json(out / "summary.json"), read_history(out / "history.csv")[-1]
    assert summary["weights"] == weights_sum(model.state_dict())
    for kept in (summary, last):
        assert kept["standard_error"] == found.standard_error.value
        assert kept["verified_error"] == found.verified_error.value
    assert summary["pgd_error"] == found.pgd_error.value


def test_half_precision_leaves_statistics_over_processes_exact():
    first, second = ranks.results_of(2, ranks.half_precision_step, 16)
    for found in (first, second):
        assert all(bool(gradient.isfinite().all()) for gradient in found["gradients"].values())
    values = torch.linspace(0, 1, 96_100).bfloat16().float()
    for mean, var in ranks.results_of(2, ranks.half_precision_count):
        assert float(mean) == pytest.approx(float(values.mean()), rel=1e-5)
        assert float(var) == pytest.approx(float(values.var(correction=0)), rel=1e-4)


def test_ranks_wait_for_one_another_after_work_of_unequal_length(tmp_path):
    assert ranks.results_of(2, ranks.after_unequal_work, str(tmp_path)) == [[0, 1], [0, 1]]


def test_the_first_rank_downloads_and_the_others_find(tmp_path):
    assert ranks.results_of(2, ranks.found_by_leader, str(tmp_path)) == [False, True]


@pytest.mark.parametrize(
    ("error", "renamed"),
    [
        (RuntimeError("Connection pool of my dataset is full"), False),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
    ],
)
def test_only_a_lost_process_is_called_so(error, renamed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "_meet", lambda backend: None)
    with pytest.raises(ConnectionError if renamed else RuntimeError) as raised, process_group(torch.device("cpu")):
        raise error
    assert (raised.value is not error) is renamed


def test_a_run_of_two_processes_is_that_of_one(pair):
    folder, out = pair
    histories = [read_history(folder / name / "history.csv") for name in ("two", "one")]
    assert_histories_agree(*histories)
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("two", "one")]
    assert [summary["processes"] for summary in summaries] == [2, 1]
    assert [summary["test_samples"] for summary in summaries] == [1000, 1000]
    for summary in summaries:
        assert summary["standard_error"] <= summary["pgd_error"] <= summary["verified_error"]
    assert out.count("epoch 3/3") == 1  # Rank 0 alone tells.


def test_certificates_of_two_processes_are_those_of_one(pair, tmp_path):
    folder, _ = pair
    options = (
        "--limit",
        90,
        "--batch-size",
        20,
        "--pgd-steps",
        3,
        "--pgd-restarts",
        1,
        "--eps",
        0.005,
        0.01,
        "--device",
        "cpu",
    )
    verify = ("verify", folder / "one", *options, "--out")
    alone(*verify, tmp_path / "1")
    done = torchrun(*verify, tmp_path / "2")
    assert done.returncode == 0, done.stderr
    for out in ("1", "2"):
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == ["certificates.csv", "verification.json"]
    rows = [(tmp_path / name / "certificates.csv").read_text().splitlines() for name in ("1", "2")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 181
    radius = (
        *("verify", folder / "one", "--radius", "--limit", 30, "--batch-size", 8, "--methods", "IBP"),
        *("--pgd-steps", 2, "--device", "cpu", "--out"),
    )
    alone(*radius, tmp_path / "a")
    done = torchrun(*radius, tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "radii.csv").read_text() == (tmp_path / "b" / "radii.csv").read_text()


def pid_of(rank, folder):
    """The process that trains into ``folder`` as ``rank``."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and f"RANK={rank}".encode() in environment and b"lirpa_fastwarmup" in words:
            return int(process.name)
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_rank_that_is_killed_is_restarted_and_the_run_ends_as_unbroken(pair, tmp_path):
    folder, _ = pair
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
        ),
        *("-m", "lirpa_fastwarmup", "train", "mnist5k", "--out", str(tmp_path / "run"), *SMALL, "--sync-batchnorm"),
        *("--device", "cpu"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        said = ""
        for line in process.stdout:
            said += line
            if "epoch 1/3" in line and said.count("epoch 1/3") == 1:
                time.sleep(0.1)  # Somewhere in the second epoch.
                os.kill(pid_of(1, tmp_path / "run"), signal.SIGKILL)
        assert process.wait(timeout=100) == 0, said
    assert "-9" in said  # torchrun tells how rank 1 ended.
    assert "lost the connection" in said
    unbroken = read_history(folder / "two" / "history.csv")
    assert_histories_agree(read_history(tmp_path / "run" / "history.csv"), unbroken)


def test_a_checkpoint_of_two_processes_resumes_on_one(pair, tmp_path):
    folder, _ = pair
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "lirpa_fastwarmup", "train", "mnist5k", "--out", str(tmp_path / "run"), *SMALL, "--sync-batchnorm"),
        *("--device", "cpu"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if "epoch 1/3" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) != 0
    assert not (tmp_path / "run" / "summary.json").exists()
    alone("train", "--resume", "--out", tmp_path / "run", "--device", "cpu")
    assert_histories_agree(read_history(tmp_path / "run" / "history.csv"), read_history(folder / "two" / "history.csv"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "3"), "in batches of 3 leave no batch"),
        (("--lr", "1e30"), "loss is"),
        (("--dataset", "npz", "--data-dir", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_all_processes_with_their_reason(options, message, tmp_path):
    begun = time.monotonic()
    done = torchrun("train", "mnist5k", "--out", tmp_path / "run", *SMALL, *options, "--device", "cpu")
    assert done.returncode != 0
    assert message in done.stderr
    assert "rank 0" in done.stderr
    assert time.monotonic() - begun < 120  # Nothing waits for those that have ended.


UNEVEN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(1, 2, 5, 4), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        for part in list(self)[:5]:
            x = part(x)
        return x
"""


def test_uneven_parts_and_unused_parameters_are_trained_by_two_processes(tmp_path):
    """The last batch of 7 leaves 4 and 3 samples, of which BatchNorm takes two micro-batches and one."""
    (tmp_path / "net.py").write_text(UNEVEN)
    options = [*SMALL, "--data-limit", "47", "--batch-size", "40", "--accumulate", "2", "--sync-batchnorm"]
    network = ["--model", f"{tmp_path / 'net.py'}:Net", "--no-bn"]
    done = torchrun("train", "mnist5k", "--out", tmp_path / "run", *options, *network, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(read_history(tmp_path / "run" / "history.csv")) == 3
