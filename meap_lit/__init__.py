"""Mask-Enhanced Autoregressive Prediction (MEAP) as Lightning recipes.

A script finds here what it needs (`docs/python.md`). A name is imported at its first use, so `import meap_lit` itself
imports neither torch nor Lightning.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meap_lit.callbacks import Budget, Checkpoint, RetrievalProbe
    from meap_lit.data.finetuning import FineTuningData
    from meap_lit.data.prepare.chat import PrepareChat
    from meap_lit.data.prepare.text import PrepareText
    from meap_lit.data.prepare.tokenizer import TrainTokenizer
    from meap_lit.data.pretraining import PretrainingData
    from meap_lit.inference.language_model import LanguageModel, load_model
    from meap_lit.masking.duplication import Duplication
    from meap_lit.masking.positions import mask_inputs
    from meap_lit.masking.schedules import Constant, Cosine, Linear, MaskSchedule, Piecewise, WarmupHold
    from meap_lit.model import DecoderConfig
    from meap_lit.model.lora import LoRA
    from meap_lit.modules import AdamW, MEAPFineTuning, MEAPPretraining
    from meap_lit.tokenizer.tokenizer import Tokenizer

__version__ = "0.2.0"

__all__ = [
    "AdamW",
    "Budget",
    "Checkpoint",
    "Constant",
    "Cosine",
    "DecoderConfig",
    "Duplication",
    "FineTuningData",
    "LanguageModel",
    "Linear",
    "LoRA",
    "MEAPFineTuning",
    "MEAPPretraining",
    "MaskSchedule",
    "Piecewise",
    "PrepareChat",
    "PrepareText",
    "PretrainingData",
    "RetrievalProbe",
    "Tokenizer",
    "TrainTokenizer",
    "WarmupHold",
    "load_model",
    "mask_inputs",
]

_MODULES = {
    "callbacks": ("Budget", "Checkpoint", "RetrievalProbe"),
    "data.finetuning": ("FineTuningData",),
    "data.prepare.chat": ("PrepareChat",),
    "data.prepare.text": ("PrepareText",),
    "data.prepare.tokenizer": ("TrainTokenizer",),
    "data.pretraining": ("PretrainingData",),
    "inference.language_model": ("LanguageModel", "load_model"),
    "masking.duplication": ("Duplication",),
    "masking.positions": ("mask_inputs",),
    "masking.schedules": ("Constant", "Cosine", "Linear", "MaskSchedule", "Piecewise", "WarmupHold"),
    "model": ("DecoderConfig",),
    "model.lora": ("LoRA",),
    "modules": ("AdamW", "MEAPFineTuning", "MEAPPretraining"),
    "tokenizer.tokenizer": ("Tokenizer",),
}
"""Where each of these names is defined, below this package."""


def __getattr__(name: str) -> Any:
    # jsonargparse names a class by its shortest path, and drops the options of a recipe that names it by a longer one
    is_named = sys._getframe(1).f_code.co_name == "get_import_path"
    module = None if is_named else next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"meap_lit.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
