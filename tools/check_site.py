"""Check what Quarto is given, without Quarto: `python tools/check_site.py [nbs/110_focal_loss.ipynb
...]` (all by default).

Every notebook goes through nbdev's processors as it does for the site, in one process that imports
each library once. What a reader would miss or stumble over is printed, a line each; the exit status
is 1 if there is anything.
"""
import ast
import os
import re
import sys
from collections import Counter
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
from nbformat.v4 import new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
NBS, SITE = ROOT / "nbs", "https://erc-moe.github.io/erc_moe/"
CODE_WIDTH, MATH_WIDTH = 100, 80    # characters of code; rough characters of a display equation


def as_text(source):
    return source if isinstance(source, str) else "".join(source)


def directives(cell):
    return dict(re.findall(r"^#\| *([\w-]+):? *(.*)$", as_text(cell.source), re.M))


def shown(cell):
    "Whether a reader sees anything of the cell."
    d = directives(cell)
    return "hide" not in d and d.get("include") != "false"


def read_pages(paths):
    "The processed notebooks as Quarto gets them: name -> notebook."
    os.environ["IN_TEST"] = "1"
    pages = {}
    for path in paths:
        pages[path.name] = nb = read_nb(path)
        FilterDefaults()(nb)
    del os.environ["IN_TEST"]
    return pages


def as_page(path):
    "A page of Markdown alone, as a notebook of one cell."
    return new_notebook(cells=[new_markdown_cell(path.read_text(encoding="utf-8"))])


def address(name, nb):
    "The page's file on the site."
    front = "".join(as_text(c.source) for c in nb.cells[:1] if c.cell_type == "raw")
    given = re.search(r"^output-file: *(\S+)", front, re.M)
    return given[1] if given else Path(name).stem + ".html"


def markdown_of(nb):
    "Every piece of Markdown that a page is made of, outputs as well."
    for cell in nb.cells:
        if cell.cell_type == "markdown": yield as_text(cell.source)
        for output in cell.get("outputs", []) if cell.cell_type == "code" else []:
            text = output.get("data", {}).get("text/markdown")
            if text and directives(cell).get("output") != "false": yield as_text(text)


FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.M | re.S)


def without_code(text):
    "The text less its blocks of code."
    return FENCE.sub("", text)


def fences(text):
    "What stands in the text's blocks of code."
    return FENCE.findall(text)


def heading_id(heading):
    "The identifier that pandoc gives a heading: its rule `auto_identifiers`."
    if given := re.search(r"\{[^}]*#([\w.-]+)[^}]*\}\s*$", heading): return given[1]
    plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)    # a link is its text
    plain = re.sub(r"<[^>]+>|\{[^}]*\}\s*$", "", plain)
    plain = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain).strip()).lower()
    return re.sub(r"^[\W\d_]+", "", plain) or "section"


def identifiers(nb):
    "All that `page.html#...` can name on a page."
    found, times = set(), Counter()
    for text in markdown_of(nb):
        text = without_code(text)
        for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
            name = heading_id(heading)
            found.add(f"{name}-{times[name]}" if times[name] else name)
            times[name] += 1
        found |= {*re.findall(r"\bid=[\"']([^\"']+)", text)}
        found |= {*re.findall(r"\{#([\w.-]+)[ }]", text)}
    return found


def links(nb):
    "Targets of the page's links and pictures."
    for text in markdown_of(nb):
        text = re.sub(r"`[^`\n]*`", "", without_code(text))
        yield from re.findall(r"\]\(([^)\s]+)", text)
        yield from re.findall(r"(?:href|src)=[\"']([^\"']+)", text)


def check_links(pages):
    "Local links that lead nowhere. `pages` are all of the site."
    by_address = {address(name, nb): name for name, nb in pages.items()}
    ids = {name: identifiers(nb) for name, nb in pages.items()}
    for name, nb in pages.items():
        for link in links(nb):
            target, _, anchor = link.removeprefix(SITE).partition("#")
            if re.match(r"[a-z]+:", target): continue
            page = name if not target else by_address.get(target, target)
            if page not in pages and not (NBS / target).is_file(): yield f"{name}: no page {link}"
            elif anchor and page in pages and anchor not in ids[page]:
                yield f"{name}: no anchor {link}"


def braces(text, at):
    "The group in braces that begins at `at`, and where it ends."
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth: return text[at + 1:i], i + 1
    return text[at + 1:], len(text)


def equation_width(tex):
    "About how many characters wide a line of TeX is set; KaTeX takes some 10.5 pixels for each."
    tex = re.sub(r"\}_\{\\text\{[^}]*\}\}", "}", tex)    # under a brace
    while frac := re.search(r"\\[dt]?frac(?=\{)", tex):
        above, at = braces(tex, frac.end())
        below, end = braces(tex, at) if tex[at:at + 1] == "{" else ("", at)
        wider = max(above, below, key=equation_width)
        tex = tex[:frac.start()] + wider + tex[end:]
    tex = re.sub(r"\\(sum|prod|max|min|int)_\{[^{}]*\}", "XX", tex)
    tex = re.sub(r"\\tag\{[^}]*\}", "XXXX", re.sub(r"\\qquad", "XXXX", tex))
    tex = re.sub(r"\\(quad)", "XX", tex)
    tex = re.sub(r"\\(begin|end)\{[^}]*\}|\\(left|right|[bB]igg?[lr]?)(?![a-z])|\\[,;!:]", "", tex)
    tex = re.sub(r"\\(text|mathrm|mathbf|mathbb|mathcal|boldsymbol|operatorname|hat|tilde|bar"
                 r"|mathit|texttt|underbrace|overline)(?=\W)", "", tex)
    tex = re.sub(r"\\(log|exp|max|min|sin|cos|tanh|ln|det|arg)\b", r"\1", tex)
    tex = re.sub(r"\\[A-Za-z]+|\\.", "X", tex)
    small = sum(map(len, re.findall(r"[_^]\{([^{}]*)\}", tex)))
    return len(re.sub(r"[\s{}&^_]", "", tex)) - .3 * small


def wide_equations(nb):
    for text in markdown_of(nb):
        for tex in re.findall(r"\$\$(.+?)\$\$", without_code(text), re.S):
            for line in re.split(r"\\\\(?:\[[^]]*\])?", tex):
                if equation_width(line) > MATH_WIDTH: yield " ".join(line.split())


def check_page(name, nb):
    "What a reader of one processed page would stumble over."
    for cell in (c for c in nb.cells if c.cell_type == "code" and as_text(c.source) and shown(c)):
        source, d = as_text(cell.source), directives(cell)
        outputs = cell.get("outputs", [])
        pictures = [o for o in outputs if any(
            kind.startswith("image/") for kind in o.get("data", {}))]
        if pictures and d.get("output") != "false" and not d.get("fig-alt"):
            yield f"{name}: a figure without fig-alt: {source.splitlines()[0]!r}"
    for cell in (c for c in nb.cells if c.cell_type == "markdown"):
        for line in "".join(fences(as_text(cell.source))).splitlines():
            if len(line) > CODE_WIDTH: yield f"{name}: a line of {len(line)} characters: {line}"
    for text in markdown_of(nb):
        if "@latest" in text: yield f"{name}: @latest is no version"
        for link in re.findall(r"\[`[^`]+`\]\(http[^)]+\)", "".join(fences(text))):
            yield f"{name}: a link in code is shown as text: {link}"
    for line in wide_equations(nb): yield f"{name}: an equation wider than the column: {line}"


def check_source(name, nb):
    "What the notebook itself keeps from the site."
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        source, d = as_text(cell.source), directives(cell)
        if not {"export", "exports", "exporti"} & {*d}: continue
        body = ast.parse(source).body
        first = next((line for line in source.splitlines() if not line.startswith("#|")), "")
        if not shown(cell): yield f"{name}: an exported cell is hidden: {first}"
        if "exports" not in d and any(
                not isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
            yield f"{name}: a definition without its source (`#| exports`): {first}"


def chapters(contents):
    "Pages of a sidebar, in order."
    for item in contents:
        if isinstance(item, str): yield item
        elif "contents" in item: yield from chapters(item["contents"])
        else: yield item["href"]


def check_config(text, names):
    "What stands in `_quarto.yml`, beside the notebooks that there are."
    config = yaml.safe_load(text)
    listed = Counter(chapters(config["website"]["sidebar"]["contents"]))
    for name in sorted({*names} - {*listed}): yield f"_quarto.yml: {name} is not in the sidebar"
    for name in sorted({*listed} - {*names}): yield f"_quarto.yml: there is no {name}"
    for name, times in listed.items():
        if times > 1: yield f"_quarto.yml: {name} stands {times} times in the sidebar"
    if config["website"].get("repo-url") and config["website"].get("repo-subdir") != NBS.name:
        yield f"_quarto.yml: repo-subdir is not {NBS.name}: links to the sources lead nowhere"
    for kind in {*config["format"]} - {"html"}:
        yield f"_quarto.yml: format {kind} writes over files of html"
    html = config["format"]["html"]
    if not re.search(r"/katex@\d+\.\d+\.\d+/", str(html.get("html-math-method"))):
        yield "_quarto.yml: html-math-method names no version of KaTeX"
    if "@latest" in text: yield "_quarto.yml: @latest is no version"
    if not (NBS / html["css"]).is_file(): yield f"_quarto.yml: there is no {html['css']}"


def main(paths):
    notebooks, texts = sorted(NBS.glob("*.ipynb")), sorted(NBS.glob("*.md"))
    everything = [p.name for p in notebooks + texts]
    chosen = {Path(p).name for p in paths} or {*everything}
    faults = [*check_config((ROOT / "_quarto.yml").read_text(encoding="utf-8"), everything)]
    for path in notebooks:
        if path.name in chosen: faults += check_source(path.name, read_nb(path))
    pages = read_pages(notebooks) | {p.name: as_page(p) for p in texts}
    for place, times in Counter(address(*page) for page in pages.items()).items():
        if times > 1: faults.append(f"{times} pages write {place}")
    for name, nb in pages.items():
        if name in chosen: faults += check_page(name, nb)
    faults += [fault for fault in check_links(pages) if fault.partition(":")[0] in chosen]
    print(*dict.fromkeys(faults), sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
