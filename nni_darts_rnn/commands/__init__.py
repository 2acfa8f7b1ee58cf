"""The actions of the commands of `nni-darts-rnn`. Their options are declared in `cli`; what they print goes through `talk`."""
