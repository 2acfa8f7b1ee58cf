"""What an experiment has come to: its trials as their folders tell it, and one page about them."""
