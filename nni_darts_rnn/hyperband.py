"""NNI's Hyperband advisor, running: in a YAML file `advisor: {className: nni_darts_rnn.hyperband.Hyperband, …}`.

NNI 3.0's own ends at the first metric with a TypeError: it names its trials "0-1_0_2", and asks whether that is at most the largest number of an
earlier run. This can go once NNI's `Recoverable.is_created_in_previous_exp` takes such names.
"""

from nni.algorithms.hpo import hyperband_advisor


class Hyperband(hyperband_advisor.Hyperband):
    """NNI's `Hyperband` with the same arguments: `optimize_mode`, `R`, `eta`, `exec_mode`."""

    def is_created_in_previous_exp(self, param_id) -> bool:
        return isinstance(param_id, int) and super().is_created_in_previous_exp(param_id)
