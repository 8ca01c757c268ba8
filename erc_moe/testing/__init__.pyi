"The contract, checked: of a model, of a corpus, of a feature extractor."
from .data import check_corpus, check_extractor
from .cases import INVARIANTS, Case, random_conversations
from .model import ContractError, check_model
