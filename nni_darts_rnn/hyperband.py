"""NNI's Hyperband advisor, running: in a YAML file `advisor: {className: nni_darts_rnn.hyperband.Hyperband, …}`.

NNI 3.0's own ends at the first metric with a TypeError: it names its trials "0-1_0_2", and asks whether that is at most the largest number of an
earlier run. This can go once NNI's `Recoverable.is_created_in_previous_exp` takes such names. Nor can its draws be repeated, and in serial mode it
says that there are no more trials while a rung waits for its last one.
"""

import numpy as np
from nni.algorithms.hpo import hyperband_advisor


class Hyperband(hyperband_advisor.Hyperband):
    """NNI's `Hyperband` with the same arguments, `optimize_mode`, `R`, `eta`, `exec_mode`, and `seed`: the same configurations in the same order."""

    def __init__(self, optimize_mode: str = "maximize", R: int = 60, eta: int = 3, exec_mode: str = "parallelism", seed: int | None = None):
        super().__init__(optimize_mode, R, eta, exec_mode)
        self.seed = seed

    def handle_update_search_space(self, data) -> None:
        super().handle_update_search_space(data)
        self.random_state = np.random.RandomState(self.seed)

    def _get_one_trial_job(self):
        bracket = self.brackets.get(self.curr_bracket_id)
        if self.exec_mode == "serial" and not self.generated_hyper_configs and bracket is not None and not bracket.is_completed():
            return None  # the next rung comes when this one's trials have ended; NNI's says that there will be none, on which the experiment may end
        return super()._get_one_trial_job()

    def is_created_in_previous_exp(self, param_id) -> bool:
        return isinstance(param_id, int) and super().is_created_in_previous_exp(param_id)
