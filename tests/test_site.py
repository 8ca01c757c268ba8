"""The site, without Quarto: nothing in the book is broken, and each fault would be found."""
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_site
from docs_renderer import PageRenderer
from erc_moe.losses import focal_loss
from erc_moe.mister_e import MisterE, MisterEConfig


def page(*cells):
    return new_notebook(cells=[*cells])


def faults(*cells):
    nb = page(*cells)
    return [*check_site.check_page("p", nb), *check_site.check_source("p", nb)]


def picture(source):
    return new_code_cell(source, outputs=[new_output("display_data", {"image/png": "AAAA"})])


def test_the_book_has_no_fault():
    "In a process of its own: it executes what the notebooks import and export."
    said = subprocess.run(
        [sys.executable, ROOT / "tools/check_site.py"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and not said.stdout.strip(), said.stdout + said.stderr[-2000:]
    assert "Traceback" not in said.stderr, said.stderr[-2000:]


def test_a_definition_is_shown_without_its_signature():
    shown = PageRenderer(focal_loss)._repr_markdown_()
    assert "### focal_loss" in shown and "[source](" in shown and "section 4.4" in shown
    assert "```" not in shown    # its source stands below
    assert "```python\ndef forward(" in PageRenderer(MisterE.forward)._repr_markdown_()


def test_a_configuration_is_a_table_of_its_fields():
    shown = PageRenderer(MisterEConfig)._repr_markdown_()
    assert "| field | default | meaning | in the paper |" in shown
    assert "| <code>gamma</code> | <code>3.0</code> | focal loss | eq 19 |" in shown
    names = re.findall(r"^\| <code>(\w+)</code>", shown, re.M)
    assert names == [f.name for f in fields(MisterEConfig)]


@pytest.mark.parametrize("heading, name", [    # as pandoc 3 gives them
    ("Weighted F1", "weighted-f1"),
    ("1. What's new, really?", "whats-new-really"),
    ("`UtteranceEncoder.save_pretrained`", "utteranceencoder.save_pretrained"),
    ("Which γ for the *focal* loss?", "which-γ-for-the-focal-loss"),
    ("_rows", "rows"),
    ("**600** Ünder_score's", "ünder_scores"),
    ("[Text](page.html) and $x_1$", "text-and-x_1"),
    ("Its own {#given .class}", "given"),
    ("2026", "section")])
def test_headings_have_pandocs_identifiers(heading, name):
    assert check_site.heading_id(heading) == name


def test_links_lead_somewhere():
    there = page(
        new_raw_cell("---\noutput-file: there.html\n---"),
        new_markdown_cell("## A part\n\n## A part\n\n```\n## no heading\n```"),
        new_code_cell("show", outputs=[
            new_output("display_data", {"text/markdown": "### Thing.run\n\n*Runs.*"})]))
    good = "[a](10_there.ipynb#a-part) [b](there.html#a-part-1) [c](#here) [d](https://else.org/#x)"
    good += f" [e]({check_site.SITE}there.html#thing.run) [f](styles.css) `[no](link.html)`"
    here = page(new_markdown_cell("## Here\n\n" + good))
    assert not [*check_site.check_links({"10_there.ipynb": there, "11_here.ipynb": here})]
    bad = ["10_there.ipynb#no-heading", "there.html#a-part-2", "#there", "gone.html", "gone.png"]
    here = page(new_markdown_cell("## Here\n\n" + "".join(f"![a]({link})\n" for link in bad)))
    found = [*check_site.check_links({"10_there.ipynb": there, "11_here.ipynb": here})]
    assert [f.split()[-1] for f in found] == bad


@pytest.mark.parametrize("cells, fault", [
    ([picture("plot()")], "a figure without fig-alt"),
    ([picture("#| fig-alt: A curve.\nplot()")], None),
    ([picture("#| hide\nplot()")], None),
    ([new_code_cell("#| export\ndef f(): pass")], "without its source"),
    ([new_code_cell("#| export\nLIMIT = 3")], "without its source"),
    ([new_code_cell("#| export\nimport os")], None),
    ([new_code_cell("#| exports\ndef f(): pass")], None),
    ([new_code_cell("#| exports\n#| hide\ndef f(): pass")], "an exported cell is hidden"),
    ([new_markdown_cell("```sh\n" + "x" * 101 + "\n```")], "a line of 101 characters"),
    ([new_markdown_cell("```sh\n" + "x" * 100 + "\n```\n" + "x" * 300)], None),
    ([new_markdown_cell("see cdn.org/katex@latest/x.js")], "@latest"),
    ([new_markdown_cell("```python\n[`f`](https://a.org)\n```")], "a link in code"),
    ([new_markdown_cell(r"$$" + "x + " * 60 + "$$")], "an equation wider"),
    ([new_markdown_cell(r"$$\begin{aligned}" + ("x + " * 30 + r"\\") * 3 + r"\end{aligned}$$")],
     None),
    ([new_markdown_cell(r"$$\frac{" + "x + " * 30 + "}{" + "y + " * 30 + "}$$")], None)])
def test_a_fault_on_a_page_is_found(cells, fault):
    found = faults(*cells)
    assert len(found) == bool(fault) and (not fault or fault in found[0]), found


CONFIG = """
website: {sidebar: {contents: [{text: Home, href: index.ipynb}, {section: A, contents: [1_a.ipynb]}]}}
format:
  html: {css: styles.css, html-math-method: {method: katex, url: https://a.org/katex@0.16.22/dist/}}
"""


@pytest.mark.parametrize("old, new, fault", [
    ("", "", None),
    ("1_a.ipynb", "1_b.ipynb", "1_a.ipynb is not in the sidebar"),
    ("1_a.ipynb", "1_a.ipynb, 2_gone.ipynb", "there is no 2_gone.ipynb"),
    ("1_a.ipynb", "1_a.ipynb, 1_a.ipynb", "stands 2 times"),
    ("  html:", "  commonmark: default\n  html:", "format commonmark writes over"),
    ("0.16.22", "latest", "names no version of KaTeX"),
    ("styles.css", "gone.css", "there is no gone.css"),
    ("website: {", "website: {repo-url: a.org, ", "repo-subdir is not nbs")])
def test_a_fault_of_the_configuration_is_found(old, new, fault):
    found = [*check_site.check_config(CONFIG.replace(old, new, 1), ["index.ipynb", "1_a.ipynb"])]
    assert (not found) if fault is None else fault in found[0], found
