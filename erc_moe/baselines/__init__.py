"Systems beside MiSTER-E and SURE. Context-free, bc-LSTM, DialogueRNN and late fusion are no rows of the papers' tables, SDT is one of SURE's: all are written and trained here."
from .bc_lstm import BcLstm, BcLstmConfig
from .context_free import ContextFree, ContextFreeConfig
from .dialogue_rnn import DialogueRnn, DialogueRnnConfig, DialogueRnnOutput
from .late_fusion import LateFusion, LateFusionConfig
from .sdt import Sdt, SdtConfig, SdtOutput

__all__ = ["BcLstm", "BcLstmConfig", "ContextFree", "ContextFreeConfig", "DialogueRnn", "DialogueRnnConfig", "DialogueRnnOutput",
           "LateFusion", "LateFusionConfig", "Sdt", "SdtConfig", "SdtOutput"]
