"""LightningModules: what is trained, and on which loss."""

from meap_lit.modules.finetuning import MEAPFineTuning
from meap_lit.modules.optimizer import AdamW
from meap_lit.modules.pretraining import MEAPPretraining

__all__ = ["AdamW", "MEAPFineTuning", "MEAPPretraining"]
