"""Write README.md from nbs/index.ipynb, as the docs site shows it (hidden cells left out,
outputs kept). `make notebooks` calls this."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    """The Markdown of the index notebook: directives and hidden cells removed, echo and outputs
    respected, links made absolute to nbs/."""
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.metadata.language_info = {"name": "python"}
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            if re.search(r"^#\|\s*hide\s*$", cell.source, re.M): continue
            hidden = re.search(r"^#\|\s*echo:\s*false", cell.source, re.M)
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None) if "text/html" in output.get(
                    "data", {}
                ) else None
            cell.source = "" if hidden else re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
        cells.append(cell)
    nb.cells = cells
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"```python\n\s*```\n", "", text)
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.S)
    text = re.sub(r"\]\((\d\d\d_\w+\.ipynb)\)", r"](nbs/\1)", text)
    text = re.sub(r"(\]\(|src(?:set)?=\")figures/", r"\1nbs/figures/", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
