"""What happens around the training steps: budget, checkpoints, measurements, what a person sees."""

from meap_lit.callbacks.budget import Budget
from meap_lit.callbacks.checkpoint import Checkpoint
from meap_lit.callbacks.hang import StopOnHang
from meap_lit.callbacks.nonfinite import StopOnNonFiniteLoss
from meap_lit.callbacks.progress import StepProgressBar
from meap_lit.callbacks.retrieval import RetrievalProbe
from meap_lit.callbacks.samples import Samples
from meap_lit.callbacks.summary import RunSummary
from meap_lit.callbacks.throughput import Throughput

__all__ = [
    "Budget",
    "Checkpoint",
    "RetrievalProbe",
    "RunSummary",
    "Samples",
    "StepProgressBar",
    "StopOnHang",
    "StopOnNonFiniteLoss",
    "Throughput",
]
