"Training: one loop for every model, runs of several seeds, and what they predict."
from .. import lazily

_PLACES = {
    "loop": ["ConversationTensors", "Scores", "TrainingConfig", "fit", "score"],
    "predictions": ["Predictions"], "folder": ["first_process"], "runs": ["Run", "train"]}
__all__ = [name for names in _PLACES.values() for name in names]
__getattr__ = lazily(__name__, {name: at for at, names in _PLACES.items() for name in names})
