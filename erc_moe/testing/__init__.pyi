"The contract, checked: of a model, of a corpus, of a feature extractor."
from .data import check_corpus, check_extractor
from .model import INVARIANTS, Case, ContractError, check_model, random_conversations
