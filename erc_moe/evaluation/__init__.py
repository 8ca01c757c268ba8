"Scores of predictions, how far they can be trusted, and whether two systems differ."
from .metrics import CalibrationBins, Metrics, calibration_bins, evaluate_logits
from .statistics import (Difference, Interval, accuracy, bootstrap_interval, conversation_counts, over_seeds, paired_bootstrap, resampled_scores,
                         weighted_f1)

__all__ = ["CalibrationBins", "Difference", "Interval", "Metrics", "accuracy", "bootstrap_interval", "calibration_bins", "conversation_counts",
           "evaluate_logits", "over_seeds", "paired_bootstrap", "resampled_scores", "weighted_f1"]
