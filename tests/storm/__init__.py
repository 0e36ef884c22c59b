"""Storms: random scenarios against the package, as many as a time allows; what fails is shrunk and written down."""
