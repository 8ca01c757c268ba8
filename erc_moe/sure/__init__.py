"SURE: uncertainty-aware experts, iterative reasoning and a transformer gate over whole conversations."
from .model import Sure, SureConfig, SureOutput

__all__ = ["Sure", "SureConfig", "SureOutput"]
