"MiSTER-E: speech, text and multimodal experts over whole conversations, and a gate that weighs them."
from .model import MisterE, MisterEConfig, MisterEOutput

__all__ = ["MisterE", "MisterEConfig", "MisterEOutput"]
