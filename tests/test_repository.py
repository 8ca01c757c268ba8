"""What readers see is in step with the code: saved outputs, exported modules, the README, sizes
of notebooks and modules."""
import ast
import importlib.util
import io
import json
import re
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(
    p
    for p in (ROOT / "erc_moe").rglob("*.py")
    if p.name not in ("__init__.py", "__main__.py", "_modidx.py"))


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_saved_as_run(path):
    cells = code_cells(path)
    outputs = [o for c in cells for o in c.outputs]
    assert outputs, "run it: python tools/run_notebooks.py"
    assert not [o for o in outputs if o.output_type == "error"]
    text = json.dumps([
        o.get("text", "") or {k: v for k, v in o.get("data", {}).items() if k != "image/png"}
        for o in outputs])
    assert not re.search(
        r"(?:^|[\\s\"'(=])/(home|root|tmp|Users|work|var)/|0x[0-9a-f]{8,}", text
    ), "a path or an address is among the outputs"
    assert all(c.execution_count is None for c in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_says_what_it_is(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source), (
        "a title and a one-line subtitle come first"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_docs_can_be_built(path):
    """Building the site runs exported cells and cells that import; a cell that imports and
    computes would run without what went before."""
    for cell in code_cells(path):
        body = ast.parse(cell.source).body
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        exported = re.search(r"^#\| *export", cell.source, re.M)
        assert exported or not any(imports) or all(imports), (
            f"put the imports of this cell into one of their own: {cell.source[:80]!r}")


def test_every_notebook_is_on_the_site():
    listed = re.findall(r"(\w+\.ipynb)", (ROOT / "_quarto.yml").read_text())
    assert sorted(listed) == [p.name for p in NOTEBOOKS]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "erc_moe")))
def test_module_is_what_its_notebook_exports(path):
    text = path.read_text()
    source = re.search(r"File to edit: .*?nbs/(\w+\.ipynb)", text)
    assert source, "every module comes from a notebook"
    exported = [
        c.source
        for c in code_cells(ROOT / "nbs" / source[1])
        if re.search(r"^#\| *export", c.source, re.M)
    ]
    squeeze = lambda s: re.sub(r"from \.+([\w.]*) import", r"from \1 import", re.sub(r"\s", "", s))
    body = squeeze(text)
    for cell in exported:
        for line in cell.splitlines():
            if line.startswith(("from ", "import ", "#|")): continue  # nbdev makes imports relative
            assert squeeze(line) in body, f"run nbdev_export: {line.strip()!r} is not in the module"
    code = [l for l in text.splitlines() if l.strip() and not l.lstrip().startswith("#")]
    assert len(code) < 450, "a module is short; split the notebook"


def test_readme_is_made_from_the_index():
    sys.path.insert(0, str(ROOT / "tools"))
    from make_readme import readme
    assert (ROOT / "README.md").read_text() == readme(), "run make notebooks"


def test_results_can_be_made_again():
    """Encoders and regressions here; the trainings of the declared experiments have their own
    check beside the ledger's tests."""
    files = [
        p
        for kind in ("text", "baselines")
        for p in sorted((ROOT / "results").glob(f"{kind}-*.json"))]
    assert files
    for path in files:
        summary = json.loads(path.read_text())
        for key in (
            "corpus",
            "split_hash",
            "versions",
            "code_revision",
            "command",
            *(
                ("protocol", "seeds", "config")
                if path.name.startswith("text")
                else ("feature_hash",)),
        ):
            assert summary.get(key), f"{path.name} lacks {key}"
        if path.name.startswith("text"):
            scores = summary["test"]["weighted_f1"]
            assert len(scores["per_seed"]) == len(summary["seeds"])
            assert abs(sum(scores["per_seed"]) / len(scores["per_seed"]) - scores["mean"]) < 1e-6


def literal_lines(source):
    "Lines that a string literal fills, or spans several of: literal data."
    begun, strings, lines = [], [], set()
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[t.type]
        if kind == "STRING": strings.append((t.start, t.end))
        if kind == "FSTRING_START": begun.append(t.start)  # from Python 3.12; a STRING before
        if kind == "FSTRING_END": strings.append((begun.pop(), t.end))
    for (first, begin), (last, end) in strings:
        line = source.splitlines()[first - 1]
        if first < last: lines |= set(range(first, last + 1))
        elif len(line) - (end - begin) <= 45: lines.add(first)
    return lines


def wide_lines(source, width=100):
    lines = [l if not l.startswith("#|") else "" for l in source.splitlines()]  # not shown
    wide = [n for n, line in enumerate(lines, 1) if len(line) > width]
    return sorted(set(wide) - literal_lines(source)) if wide else []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_lines_fit_the_column(path):
    "The package is what the notebooks export, so its lines fit too."
    wide = [c.source.splitlines()[n - 1] for c in code_cells(path) for n in wide_lines(c.source)]
    assert not wide, "write lines of 100 characters at most"


def test_lines_of_scripts_fit():
    for folder in ("tests", "tools", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            source = path.read_text(encoding="utf-8")
            assert not wide_lines(source), f"{path.name}, lines {wide_lines(source)}: over 100"


SCRIPTS = sorted(p for folder in ("tools", "benchmarks") for p in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_a_script_imports_exists(path):
    "Scripts run seldom; a name that moved would be missed the day somebody needs one."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("erc_moe"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert (
                    hasattr(module, alias.name)
                    or importlib.util.find_spec(f"{node.module}.{alias.name}")
                ), f"line {node.lineno}: {node.module} has no {alias.name}"
