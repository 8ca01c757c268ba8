"""The GPU benchmark's road, without a GPU."""
import json
import subprocess
import sys
from pathlib import Path

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
