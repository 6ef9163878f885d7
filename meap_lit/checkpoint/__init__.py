"""Checkpoints: written whole, verified, found, opened, exported."""
