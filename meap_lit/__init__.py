"""Mask-Enhanced Autoregressive Prediction (MEAP) as Lightning recipes.

A script finds here what it needs (`docs/python.md`). A name is imported at its first use, so `import meap_lit` itself
imports neither torch nor Lightning.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# the names of `_MODULES` again, because a type checker takes a name that only `__getattr__` knows for Any
if TYPE_CHECKING:  # "as" makes a name public for type checkers
    from meap_lit.callbacks import Budget as Budget
    from meap_lit.callbacks import Checkpoint as Checkpoint
    from meap_lit.callbacks import RetrievalProbe as RetrievalProbe
    from meap_lit.data.finetuning import FineTuningData as FineTuningData
    from meap_lit.data.prepare.chat import PrepareChat as PrepareChat
    from meap_lit.data.prepare.text import PrepareText as PrepareText
    from meap_lit.data.prepare.tokenizer import TrainTokenizer as TrainTokenizer
    from meap_lit.data.pretraining import PretrainingData as PretrainingData
    from meap_lit.inference.language_model import LanguageModel as LanguageModel
    from meap_lit.inference.language_model import load_model as load_model
    from meap_lit.masking.duplication import Duplication as Duplication
    from meap_lit.masking.positions import mask_inputs as mask_inputs
    from meap_lit.masking.schedules import Constant as Constant
    from meap_lit.masking.schedules import Cosine as Cosine
    from meap_lit.masking.schedules import Linear as Linear
    from meap_lit.masking.schedules import MaskSchedule as MaskSchedule
    from meap_lit.masking.schedules import Piecewise as Piecewise
    from meap_lit.masking.schedules import WarmupHold as WarmupHold
    from meap_lit.model import DecoderConfig as DecoderConfig
    from meap_lit.model.lora import LoRA as LoRA
    from meap_lit.modules import AdamW as AdamW
    from meap_lit.modules import MEAPFineTuning as MEAPFineTuning
    from meap_lit.modules import MEAPPretraining as MEAPPretraining
    from meap_lit.tokenizer.tokenizer import Tokenizer as Tokenizer

__version__ = "0.2.0"

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
"""Public names by the module that defines them, below this package."""

__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    # jsonargparse names a class by its shortest path, and drops the options of a recipe that names it by a longer one
    is_named = sys._getframe(1).f_code.co_name == "get_import_path"
    module = None if is_named else next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"meap_lit.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
