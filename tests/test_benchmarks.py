"""The GPU benchmark's road, without a GPU."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_gpu_benchmark_runs_before_there_is_a_card(tmp_path):
    saved = tmp_path/"benchmark.json"
    subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--times", "1",
         "--rounds", "1", "--batches", "1", "--save", saved],
        cwd=ROOT, check=True, capture_output=True, text=True)
    told = json.loads(saved.read_text())
    assert told["device"] == "CPU" and told["tiny"]
    forms = {name: [*sizes["1"]["forms"]] for name, sizes in told["models"].items()}
    assert forms == {
        "mister_e": ["ours", "padded", "released"], "sure": ["ours", "padded"]}
    for sizes in told["models"].values():
        for of in sizes["1"]["forms"].values():
            assert [*of] == ["float32", "tf32", "bfloat16"]
            assert all(f["utterances_per_second"] > 0 and f["waits"] is None for f in of.values())


def test_the_gpu_benchmark_says_that_there_is_no_card():
    script = "import sys, torch, runpy; torch.cuda.is_available = lambda: False\n" \
             "sys.argv = ['gpu.py']; sys.path.insert(0, 'benchmarks')\n" \
             "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1 and "--device cpu --tiny" in told.stderr


def test_the_scaling_benchmark_carries_on_where_it_was_stopped(tmp_path):
    sizes = [(n, "turns") for n in (10, 100, 1000, 10_000)]
    sizes += [(n, "utterances") for n in (1000, 10_000, 100_000)]
    names = [f"bc_lstm, {n} {kind}" for n, kind in sizes]
    saved = tmp_path/"benchmark.json"
    saved.write_text(json.dumps(dict(points=dict.fromkeys(names[1:], "measured before"))))
    told = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--short", "--models", "bc_lstm", "--seconds",
         "1", "--folder", tmp_path, "--save", saved],
        cwd=ROOT, check=True, capture_output=True, text=True)
    points = json.loads(saved.read_text())["points"]
    assert {*points} == {*names} and told.stdout.count("\n") == 1
    assert all(points[name] == "measured before" for name in names[1:])
    point = points[names[0]]
    assert point["utterances"] == 3000 and point["train"]["fits"] and len(point["load"]) == 3
    assert 0 < point["predict"]["relative"] < point["train"]["relative"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process' own memory")
def test_a_point_that_does_not_fit_says_so():
    told = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--memory", "0.7", "--seconds", "1", "--point",
         "turns", "mister_e", "5000"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(told.stdout)["train"] == dict(fits=False)
