"""A run that can be stopped at any moment and goes on from where it was."""
