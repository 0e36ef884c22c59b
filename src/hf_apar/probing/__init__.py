"""What a model could save by forking, before any training: of its answers those that come in parts, and what steps take."""
