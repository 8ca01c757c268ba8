"The models of the papers' tables, small ones of their own: what MiSTER-E and SURE are worth is measured beside them."
from .bc_lstm import BcLstm, BcLstmConfig, BcLstmOutput
from .context_free import ContextFree, ContextFreeConfig, ContextFreeOutput
from .dialogue_rnn import DialogueRnn, DialogueRnnConfig, DialogueRnnOutput
from .late_fusion import LateFusion, LateFusionConfig, LateFusionOutput
from .sdt import Sdt, SdtConfig, SdtOutput

__all__ = ["BcLstm", "BcLstmConfig", "BcLstmOutput", "ContextFree", "ContextFreeConfig", "ContextFreeOutput", "DialogueRnn", "DialogueRnnConfig",
           "DialogueRnnOutput", "LateFusion", "LateFusionConfig", "LateFusionOutput", "Sdt", "SdtConfig", "SdtOutput"]
