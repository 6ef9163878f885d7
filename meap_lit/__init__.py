"""Mask-Enhanced Autoregressive Prediction (MEAP) as Lightning recipes."""

__version__ = "0.2.0"
