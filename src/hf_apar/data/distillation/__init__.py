"""A model's own answers as training text."""
