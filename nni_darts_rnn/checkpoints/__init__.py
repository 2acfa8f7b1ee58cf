"""Checkpoints, with which a run that is stopped at any moment goes on from where it was."""
