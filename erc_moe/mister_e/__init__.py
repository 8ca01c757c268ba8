"MiSTER-E: speech, text and multimodal experts over whole conversations, and a gate that weighs them."
from .model import MisterE, MisterEConfig, MisterEOutput
from .variants import FeatureMixture, FeatureMixtureConfig, Monolithic, MonolithicConfig

__all__ = ["MisterE", "MisterEConfig", "MisterEOutput", "Monolithic", "MonolithicConfig", "FeatureMixture", "FeatureMixtureConfig"]
