"Losses on the real utterances of a batch: focal, supervised contrastive, consistency, distillation, and the parts of a total."
from .consistency import consistency_loss
from .contrastive import contrastive_loss
from .distillation import distillation_loss
from .focal import focal_loss
from .parts import LossParts

__all__ = ["LossParts", "consistency_loss", "contrastive_loss", "distillation_loss", "focal_loss"]
