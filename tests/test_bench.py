"""The benchmark: that it compares equals, and how it counts. No test looks at a clock."""

import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import protocol, write_parameters
from tiny import real_parameters
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from compendium import bench
from compendium.__main__ import main
from focalcal import calibrate, devices, metrics, networks

CPU = torch.device("cpu")


@pytest.fixture
def two_seconds(monkeypatch):
    """Everything is done once and took two seconds."""
    monkeypatch.setattr(bench, "median_seconds", lambda work, *_: (work(), 2.0)[1])


def logits(n=600, classes=5):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    return (2 * rng.normal(size=(n, classes)) + 3 * np.eye(classes)[labels]).astype(np.float32), labels


def images(n=40, size=8, channels=1):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, size, size, channels)).astype(np.uint8), rng.integers(0, 3, n)


def test_the_loops_compute_what_ours_compute():
    pair = logits()
    loops = [torch.from_numpy(array) for array in pair]
    ours = [metric(*pair) for metric in (metrics.ece, metrics.adaptive_ece, metrics.classwise_ece)]
    loop = bench.looped_metrics(*loops)
    assert (loop[0], loop[2]) == pytest.approx((ours[0], ours[2]), abs=2e-5)
    assert loop[1] == pytest.approx(ours[1], abs=1 / len(pair[1])), "it drops its least confident sample"
    by_nll, by_ece = bench.looped_temperatures(*loops)
    chosen = calibrate.temperatures(*pair)
    assert abs(by_nll - chosen["nll"]) <= 0.05 + 1e-9, "the loop knows tenths only"
    assert metrics.ece(pair[0] / by_ece, pair[1]) == pytest.approx(
        metrics.ece(pair[0] / chosen["ece"], pair[1]), abs=2e-5
    )


def test_the_first_call_does_not_count_and_the_median_does(monkeypatch):
    took = iter([100.0, 1.0, 9.0, 2.0])
    now = [0.0]

    def work():
        now[0] += next(took)

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assert bench.median_seconds(work, 3, CPU) == statistics.median([1.0, 9.0, 2.0])
    assert next(took, None) is None


def test_the_stock_loop_trains():
    pictures, labels = images()
    pictures[:, :4] //= 4
    pictures[labels == 1] = pictures[labels == 1][:, ::-1]  # dark below, where the others are dark above
    data = bench.Pictures(pictures, (labels == 1).astype(int), transforms.ToTensor())
    image, label = data[3]
    assert image.shape == (1, 8, 8) and image.max() <= 1 and label in (0, 1) and len(data) == 40
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    epoch = bench.stock_epoch(model, DataLoader(data, 20, shuffle=True), protocol(reduction="sum"), CPU)
    first, *_, last = [epoch() for _ in range(10)]
    assert last < first


def test_speed_is_all_models_images_over_the_median_time(two_seconds, monkeypatch):
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 1)
    arguments = ("small_resnet", *images(), protocol(batch_size=16, mode="exact"), CPU)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert bench.stock_speed(*arguments) == 20
        assert bench.engine_speed(*arguments) == 20
        assert bench.engine_speed(*arguments, count=3) == 60
    finally:
        torch.use_deterministic_algorithms(before)


def test_operations_and_bytes_of_a_linear_layer_by_hand(monkeypatch):
    def network(classes, channels):
        return nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, classes))

    monkeypatch.setitem(networks.NETWORKS, "linear", network)
    operations, moved = bench.step_cost("linear", (4, 3))
    assert operations == 3 * 2 * 48 * 10, "a product and a sum for each weight, thrice"
    assert moved == 3 * 2 * (48 + 48 + 48 + 10), "two bytes a number, in and out of both layers, thrice"


def test_the_table_has_a_row_for_each_variant_and_goes_into_figures(two_seconds, tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "figures").mkdir()
    write_parameters(tmp_path, real_parameters(["cross_entropy"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "device", lambda: CPU)
    monkeypatch.setattr(bench, "stock_speed", lambda *_: 100.0)
    monkeypatch.setattr(bench, "engine_speed", lambda *_, **__: 250.0)
    main(["bench", "--networks", "small_resnet"])
    table = pd.read_csv(tmp_path / "figures/bench.csv")
    assert list(table.columns) == ["what", "variant", "value", "unit", "ratio", "machine"]
    rows = {(row.what, row.variant): row for row in table.itertuples()}
    assert [variant for what, variant in rows if what == "small_resnet"] == ["stock loop", "exact"]
    assert rows["small_resnet", "stock loop"].ratio == 1 and rows["small_resnet", "exact"].ratio == 2.5
    assert rows["ECE", "focalcal"].value == 2000 and rows["ECE", "focalcal"].unit == "ms"
    assert table.ratio[table.unit == "ms"].eq(1).all() and table.machine.nunique() == 1
    assert (tmp_path / "figures/bench.png").is_file() and "small_resnet, exact: 250 images/s" in capsys.readouterr().out


def test_on_a_gpu_the_table_has_the_roofline_too(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    write_parameters(tmp_path, real_parameters(["cross_entropy"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "ceilings", lambda on: (1e12, 1e9))
    monkeypatch.setattr(bench, "step_cost", lambda name, shape: (2e9, 4e6))
    monkeypatch.setattr(bench, "stock_speed", lambda *_: 100.0)
    monkeypatch.setattr(bench, "engine_speed", lambda *_, count=1, graph=False: 250.0 if graph else 200.0)
    monkeypatch.setattr(bench.shutil, "which", lambda name: name)  # as where there is a C compiler
    rows = {row["variant"]: row for row in bench.training_rows(["resnet20"], torch.device("cuda"))}
    trained = ["stock loop", "exact", "fast, eager", "fast", "fast, compiled", "fast, two at a time", "roofline"]
    assert list(rows) == [*trained, "matrix product", "copy", "peak memory"]
    assert rows["roofline"]["value"] == pytest.approx(250), "the copying takes longer than the computing"
    assert [rows[name]["ratio"] for name in ("exact", "fast")] == [2, 2.5] and "ratio" not in rows["copy"]
    assert (rows["matrix product"]["value"], rows["copy"]["value"]) == (1000, 1)


def test_an_unknown_network_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(devices, "device", lambda: CPU)
    monkeypatch.setattr(bench, "training_rows", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="focalcal: Unknown network 'resnet9000'; choose one of: small_resnet"):
        main(["bench", "--networks", "small_resnet", "resnet9000"])
