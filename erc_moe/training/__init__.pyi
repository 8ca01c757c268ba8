"Training: one loop for every model, runs of several seeds, and what they predict."
from .loop import ConversationTensors, Scores, TrainingConfig, fit, score
from .predictions import Predictions
from .folder import first_process
from .runs import Run, train
