"The models of the papers' tables, small ones of their own: what MiSTER-E and SURE are worth is measured beside them."
from .bc_lstm import BcLstm, BcLstmConfig
from .context_free import ContextFree, ContextFreeConfig
from .dialogue_rnn import DialogueRnn, DialogueRnnConfig, DialogueRnnOutput
from .late_fusion import LateFusion, LateFusionConfig
from .sdt import Sdt, SdtConfig, SdtOutput

__all__ = ["BcLstm", "BcLstmConfig", "ContextFree", "ContextFreeConfig", "DialogueRnn", "DialogueRnnConfig", "DialogueRnnOutput",
           "LateFusion", "LateFusionConfig", "Sdt", "SdtConfig", "SdtOutput"]
