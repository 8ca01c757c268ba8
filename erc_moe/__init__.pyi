"""Emotion recognition in conversations by mixtures of experts: `erc_moe.load("meld").predict(...)`."""
from .predict import Predictor, load

__version__: str
