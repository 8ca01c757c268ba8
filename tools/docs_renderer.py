"""How the documentation shows an exported definition whose source stands right below: its name, its
docstring, and for a dataclass a table of its fields. nbdev finds it by `renderer` in settings.ini.

A method that a chapter shows by `show_doc(Class.forward)` has its signature as well.
"""
import dataclasses
import html
import inspect
import re
from importlib import import_module
from typing import Literal, get_args, get_origin

import pandas
from accelerate import Accelerator
from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

LATE = {"pandas": pandas, "Accelerator": Accelerator}
# "(eq 14)", "(section 4.7)", "(SURE, eqs 1-5)": where a field stands in its paper
PLACE = re.compile(r"\s*\(((?:[\w.-]+,? )*(?:eqs?|section|figure|table)\.? [^()]*)\)", re.I)


def cell(text):
    "Text of a table's cell."
    return " ".join(str(text).split()).replace("|", "\\|")


def code(text):
    "Code that nbdev takes for the name of nothing else."
    return f"<code>{html.escape(text, quote=False)}</code>"


def default_of(field):
    "A field's default as it is written, or nothing."
    if field.default is not dataclasses.MISSING: return code(repr(field.default))
    if field.default_factory is not dataclasses.MISSING: return code(repr(field.default_factory()))
    return ""


def as_exported(kind):
    "The class in the module that its chapter exports, where its comments can be read."
    path = re.search(r"/blob/\w+/(erc_moe/.*)\.py", NbdevLookup().code(kind.__name__) or "")
    return getattr(import_module(path[1].replace("/", ".")), kind.__name__) if path else kind


def field_table(kind):
    "A dataclass' fields: name, default, meaning, and place in the paper if the comments name it."
    told, rows = {}, []
    for base in reversed(as_exported(kind).__mro__):
        if dataclasses.is_dataclass(base):
            told |= {n: meaning for n, meaning in docments(base, returns=False).items() if meaning}
    for field in dataclasses.fields(kind):
        meaning = told.get(field.name) or ""
        if get_origin(field.type) is Literal:
            words = " or ".join(code(repr(word)) for word in get_args(field.type))
            meaning = f"{words}: {meaning}" if meaning else words
        meaning = re.sub(r"`(\w+\.[^`]*)`", lambda m: code(m[1]), meaning)    # has no anchor
        place = PLACE.search(meaning)
        rows.append((code(field.name), default_of(field), PLACE.sub("", meaning, count=1),
                     place[1] if place else ""))
    heads = ["field", "default", "meaning", "in the paper"]
    kept = [j for j in range(4) if j == 0 or any(row[j] for row in rows)]
    lines = [[heads[j] for j in kept], ["---"]*len(kept), *([row[j] for j in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


class PageRenderer(BasicMarkdownRenderer):
    "Heading with a link to the source, docstring, and the fields of a dataclass."
    def __init__(self, sym, *args, **kwargs):
        # an annotation may name, in quotes, what its module imports only when it is used
        if inspect.isfunction(sym): sym.__globals__.update(LATE | sym.__globals__)
        super().__init__(sym, *args, **kwargs)

    def _repr_markdown_(self):
        whole = super()._repr_markdown_()
        if "." in getattr(self.sym, "__qualname__", ""): return whole
        head = whole.partition("```")[0].rstrip()
        first, _, rest = (inspect.getdoc(self.sym) or "").partition("\n\n")
        table = field_table(self.sym) if dataclasses.is_dataclass(self.sym) else ""
        if table and first.startswith(f"{self.sym.__name__}("): first = ""    # Python's own
        parts = [head, f"*{' '.join(first.split())}*" if first else "", rest, table]
        return "\n\n".join(part for part in parts if part)
