"""What the commands of `nni-darts-rnn` do; `cli` has their options, `talk` their words."""
