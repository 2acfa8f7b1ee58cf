"""Reports on an experiment: its trials, read from their folders, and one page about them."""
