"""Files to documents and conversations."""
