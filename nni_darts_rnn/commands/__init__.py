"""What the commands of `nni-darts-rnn` do, and how they say it."""
