"""The method in trainers of others."""
