"""The method: choose the input tokens to mask, their number at each step, and the masked copy of fine-tuning."""

from meap_lit.masking.positions import check_ratio, id_of_sample, mask_inputs, num_masked, rare_ids, sample_positions
from meap_lit.masking.schedules import Constant, Cosine, Linear, MaskSchedule, Piecewise, WarmupHold

__all__ = [
    "Constant",
    "Cosine",
    "Linear",
    "MaskSchedule",
    "Piecewise",
    "WarmupHold",
    "check_ratio",
    "id_of_sample",
    "mask_inputs",
    "num_masked",
    "rare_ids",
    "sample_positions",
]
