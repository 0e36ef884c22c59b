"""Models, adapters and heads on disk: found, loaded, checked, written."""
