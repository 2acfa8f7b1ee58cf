"""Checkpoints: a run can be stopped at any moment and resumes from where it was."""
