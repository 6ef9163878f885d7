"""Benchmarks behind the statements about speed and memory."""
