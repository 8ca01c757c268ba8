"The systems that the papers' tables compare with, a module each."
from .broad_mamba import BroadMamba, BroadMambaConfig, BroadMambaOutput
from .cfn_esa import CfnEsa, CfnEsaConfig, CfnEsaOutput
from .cogmen import Cogmen, CogmenConfig, CogmenOutput, Joyful, JoyfulConfig
from .df_erc import DfErc, DfErcConfig, DfErcOutput
from .hcam import Hcam, HcamConfig, HcamOutput
from .instruct_erc import InstructErc, InstructErcConfig
from .mmgat_emo import MmgatEmo, MmgatEmoConfig, MmgatEmoOutput
from .mmgcn import MmDfn, MmDfnConfig, Mmgcn, MmgcnConfig
from .multiemo import MultiEmo, MultiEmoConfig, MultiEmoOutput
from .telme import TelMe, TelMeConfig, TelMeOutput
