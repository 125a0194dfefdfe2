"""The kinds of training steps, as options of train_distill.py."""

from utils.batch import Progress

PRESETS = {
    "plain": {},
    "response": {"distill_loss": "response"},
    "l2": {"distill_loss": "l2"},
    "kl": {"distill_loss": "kl"},
    "objectness": {"distill_loss": "objectness"},
    "cwd": {"distill_loss": "response", "feature_loss": "cwd"},
    "score-l2, auto": {"distill_loss": "l2", "feature_loss": "score-l2", "distill_ratio": "auto"},
    "pkd": {"distill_loss": "l2", "feature_loss": "pkd"},
}
SAMPLED = Progress(0, 0, 100, 100)  # a step that measures gradient ratios
