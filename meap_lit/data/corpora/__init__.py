"""Texts that are made here, or are on every machine."""
