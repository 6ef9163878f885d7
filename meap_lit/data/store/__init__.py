"""Datasets on disk or in object storage: chunks, their description, and what fetches and verifies them."""
