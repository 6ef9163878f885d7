"""Mask-Enhanced Autoregressive Prediction (MEAP) as Lightning recipes."""

__version__ = "0.1.0"
