"The command `erc_moe`: one program, a subcommand per task."
from .program import main

__all__ = ["main"]
