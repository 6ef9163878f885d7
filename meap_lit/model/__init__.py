"""The decoder and its loss, in plain PyTorch."""

from meap_lit.model.attention import Documents
from meap_lit.model.config import DecoderConfig, RopeScaling
from meap_lit.model.decoder import Decoder
from meap_lit.model.kv_cache import KVCache
from meap_lit.model.loss import IGNORE_INDEX, linear_cross_entropy

__all__ = ["IGNORE_INDEX", "Decoder", "DecoderConfig", "Documents", "KVCache", "RopeScaling", "linear_cross_entropy"]
