"Every table and figure of both papers, declared, run, and compared."
from . import papers, ensembles
from .declare import (
    EXPERIMENTS, FEATURES, Cell, Experiment, Row, declare, missing_stores)
from .files import find_experiments
from .ledger import Ledger
from .run import code_of, reproduce

__all__ = [
    "EXPERIMENTS", "FEATURES", "Cell", "Experiment", "Row", "declare", "find_experiments",
    "missing_stores", "Ledger", "code_of", "reproduce"]
