"Scores of predictions, how far they can be trusted, and whether two systems differ."
from .calibration import calibrate, fit_temperature
from .metrics import CalibrationBins, Metrics, calibration_bins, evaluate_logits
from .statistics import (
    Difference, Interval, accuracy, bootstrap_interval, conversation_counts, holm, over_seeds,
    paired_difference, power, resampled_scores, two_level, weighted_f1)
