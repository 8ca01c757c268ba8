"Scores of predictions, how far they can be trusted, and whether two systems differ."
from .. import lazily

_PLACES = {
    "calibration": ["calibrate", "fit_temperature"],
    "metrics": ["CalibrationBins", "Metrics", "calibration_bins", "evaluate_logits"],
    "statistics": ["Difference", "Interval", "accuracy", "bootstrap_interval",
                   "conversation_counts", "over_seeds", "paired_bootstrap", "resampled_scores",
                   "weighted_f1"]}
__all__ = [name for names in _PLACES.values() for name in names]
__getattr__ = lazily(__name__, {name: at for at, names in _PLACES.items() for name in names})
