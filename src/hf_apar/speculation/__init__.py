"""Guesses of what threads write next; the loop verifies them."""
