"""Execute notebooks and save their outputs: `python tools/run_notebooks.py [nbs/20_focal_loss.ipynb
...]` (all by default).

Outputs are kept as they came, less what changes from run to run (execution counts, timings, widget
state), so that
running a notebook again leaves the repository unchanged. `make notebooks` calls this.
"""
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb, process_write

ROOT = Path(__file__).resolve().parent.parent


def run(path: Path) -> float:
    "Execute one notebook in a fresh kernel from its own folder and write it back; seconds taken."
    nb, began = nbformat.read(path, as_version=4), time.perf_counter()
    NotebookClient(
        nb, timeout=600, startup_timeout=300, kernel_name="python3", coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        cell.execution_count, cell.metadata = None, {}
        for output in cell.outputs:
            if "execution_count" in output: output["execution_count"] = None
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.name != "stderr"]
    nb.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    partial = path.with_suffix(".partial")
    nbformat.write(nb, partial)
    partial.replace(path)
    process_write(warn_msg="could not clean", proc_nb=clean_nb, f_in=path)
    return time.perf_counter() - began


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    paths = [Path(p).resolve() for p in sys.argv[1:]] or sorted(
        (ROOT / "nbs").rglob("[0-9i]*.ipynb"))
    for path in paths:
        print(f"{path.relative_to(ROOT)}: {run(path):.1f} s", flush=True)
