"""NNI's Hyperband advisor, made to work: in a YAML file `advisor: {className: nni_darts_rnn.hyperband.Hyperband, …}`.

Faults of NNI 3.0 that this works round, and when each workaround can go:

- It fails with a TypeError at the first metric. Its trials have names such as "0-1_0_2", which it compares with the largest number of an earlier run
  (until `Recoverable.is_created_in_previous_exp` accepts such names).
- Its draws cannot be repeated (until it takes a seed).
- In serial mode it says that there are no more trials while a rung still waits for its last one (until it waits).
- Requests for trials and the ends of trials come through two queues with a thread each. A request that comes while a rung is being made may open the
  next bracket before that rung is sent, and a trial's end may be counted before its result (until `MsgDispatcherBase` has one queue, or a lock).
- It ranks a trial that failed or was stopped by what that trial had reported. Where fewer trials have a result than are to go on, it fails with an
  IndexError, and the experiment then hangs without an error (until `inform_trial_end` ranks only trials with a result).
- `nnictl resume` restores its running trials, but not what it had drawn and learnt (until it has a checkpoint).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
from nni.algorithms.hpo import hyperband_advisor
from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
from nni.runtime.tuner_command_channel import CommandType
from nni.utils import MetricType

from .checks import one_of, whole_number
from .files import write_json

logger = logging.getLogger(__name__)
STATE = "hyperband.json"
"""Name of its file in the experiment's folder of checkpoints."""
KEPT = ("n", "i", "hyper_configs", "configs_perf", "num_configs_to_run", "num_finished_configs", "no_more_trial")
"""What changes in a bracket after it was made."""


class Hyperband(hyperband_advisor.Hyperband):
    """NNI's `Hyperband` with its arguments `optimize_mode`, `R`, `eta` and `exec_mode`, and with `seed`: the same seed draws the same configurations in
    the same order.

    The trials of a rung with the best final results go on. A trial that failed or was stopped has none; if too few have one, those go on. A resumed
    experiment has the brackets, results and draws that it had before. Raises `ValueError` with one line for an argument that is not allowed; NNI then
    ends the experiment and writes the line into its log.
    """

    def __init__(self, optimize_mode: str = "maximize", R: int = 60, eta: int = 3, exec_mode: str = "parallelism", seed: int | None = None):
        try:
            one_of("optimize_mode", optimize_mode, ("maximize", "minimize"))
            one_of("exec_mode", exec_mode, ("parallelism", "serial"))
            whole_number("R", R)
            whole_number("eta", eta, 2)
            if seed is not None:
                whole_number("seed", seed, 0)
        except ValueError as error:
            MsgDispatcherBase.__init__(self)  # connects to NNI, which otherwise learns only that nobody connected
            self.report_error(f"Hyperband: {error}")
            raise
        super().__init__(optimize_mode, R, eta, exec_mode)
        self.seed = seed
        self.ended: set[str] = set()  # names of trials
        self.resumed: dict | None = None  # the state of a resumed experiment, until its running trials are known

    def enqueue_command(self, command, data) -> None:
        self.default_command_queue.put((command, data))

    def process_command(self, command, data) -> None:
        if command is CommandType.ReportMetricData and data["type"] != MetricType.FINAL:
            return  # intermediate results may be of another quantity, such as the supernet's perplexity, and change nothing here
        try:
            super().process_command(command, data)
        except Exception as error:
            self.report_error(f"Hyperband: {type(error).__name__}: {error}")
            raise
        try:
            self.save_checkpoint()
        except OSError as error:  # such as a full disk: the experiment goes on, and the next state may be saved again
            logger.warning("Hyperband: its state was not kept, and a resumed experiment would go on from an earlier one: %s", error)

    def handle_update_search_space(self, data) -> None:
        super().handle_update_search_space(data)
        self.random_state = np.random.RandomState(self.seed)
        if self.resumed is not None:
            self.random_state.set_state(self.resumed["draws"])

    def _get_one_trial_job(self):
        bracket = self.brackets.get(self.curr_bracket_id)
        if self.exec_mode == "serial" and not self.generated_hyper_configs and bracket is not None and not bracket.is_completed():
            return None  # the next rung comes when this one's trials have ended; NNI's own says that none will come, and the experiment may end
        return super()._get_one_trial_job()

    def is_created_in_previous_exp(self, param_id) -> bool:
        """Whether a trial belongs to no rung, as one does that a user has added."""
        if not isinstance(param_id, str):
            return True
        name, rung, _ = param_id.split("_")
        return name not in self.brackets or param_id not in self.brackets[name].hyper_configs[int(rung)]

    def _handle_trial_end(self, parameter_id: str) -> None:
        name, rung, _ = parameter_id.split("_")
        bracket, rung = self.brackets[name], int(rung)
        self.ended.add(parameter_id)
        if bracket.num_finished_configs[rung] + 1 == bracket.num_configs_to_run[rung] and not bracket.is_completed():  # the last of its rung
            results = len(bracket.configs_perf[rung])
            bracket.no_more_trial = not results
            bracket.n = min(max(bracket.get_n_r()[0], 1), results) * bracket.eta**bracket.i  # from which `get_n_r` computes how many go on
        super()._handle_trial_end(parameter_id)

    def save_checkpoint(self) -> None:
        if (folder := self.get_checkpoint_path()) is not None and self.random_state is not None and self.resumed is None:
            kind, keys, *rest = self.random_state.get_state()
            brackets = {name: {"s": bracket.s} | {key: getattr(bracket, key) for key in KEPT} for name, bracket in self.brackets.items()}
            write_json(Path(folder) / STATE, {"brackets": brackets, "curr_s": self.curr_s, "curr_hb": self.curr_hb, "curr_bracket_id": self.curr_bracket_id,
                                              "ended": sorted(self.ended), "waiting": [name for name, _ in self.generated_hyper_configs],
                                              "draws": [kind, keys.tolist(), *rest]})

    def load_checkpoint(self) -> None:
        folder = self.get_checkpoint_path()
        if folder is None or not (path := Path(folder) / STATE).exists():
            self.report_error(gone := f"Hyperband: there is no {STATE} in {folder} to go on from; create the experiment again, with `--rungs` to keep what its trials have done")
            raise FileNotFoundError(gone)
        self.resumed = json.loads(path.read_text(encoding="utf-8"))
        self.curr_s, self.curr_hb, self.curr_bracket_id = (self.resumed[key] for key in ("curr_s", "curr_hb", "curr_bracket_id"))
        self.ended = set(self.resumed["ended"])
        for name, known in self.resumed["brackets"].items():
            self.brackets[name] = hyperband_advisor.Bracket(name, known["s"], self.s_max, self.eta, self.R, self.optimize_mode)
            vars(self.brackets[name]).update({key: known[key] for key in KEPT})

    def handle_add_customized_trial(self, data) -> None:
        """`data`: the trials that ran when the experiment was stopped, which NNI itself starts again. Trials that NNI had been sent but had not started are sent again here."""
        running = {json.loads(trial)["parameter_id"] if isinstance(trial, str) else trial["parameter_id"] for trial in data}
        drawn = {name: values for bracket in self.brackets.values() for name, values in bracket.hyper_configs[-1].items()}
        waiting = self.resumed["waiting"]
        lost = [name for name in drawn if name not in self.ended | running | set(waiting)]
        self.generated_hyper_configs = [[name, drawn[name]] for name in lost + waiting]
        self.resumed = None
