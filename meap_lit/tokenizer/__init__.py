"""Text and conversations as token ids; nothing of Lightning."""
