"""A `NasExperiment` inside an NNI trial, with its results reaching the trial's page.

While its models run, NNI 3.0's sequential engine puts a channel of its own in the place of the trial's, so what they report goes nowhere else;
and it leaves its model behind as the trial's parameters. This can go once a model's results can be passed on and the parameters come back.
"""

from __future__ import annotations

import contextlib

import nni.trial
from nni.runtime.env_vars import trial_env_vars
from nni.runtime.trial_command_channel import get_default_trial_command_channel


@contextlib.contextmanager
def trial_reports():
    """`with trial_reports() as report: NasExperiment(space, search_evaluator(corpus, recipe, report=report), strategy).run()`.

    `report(row)` is an intermediate result of the trial that this process is, from wherever it is called; `row` is a number or a dictionary with
    "default". Afterwards `nni.report_final_result` is the trial's again.
    """
    channel, parameters = get_default_trial_command_channel(), nni.trial._params

    def report(row) -> None:
        sequence = nni.trial._intermediate_seq
        channel.send_metric(type="PERIODICAL", parameter_id=parameters["parameter_id"] if parameters else None,
                            trial_job_id=trial_env_vars.NNI_TRIAL_JOB_ID, sequence=sequence, value=row)
        nni.trial.overwrite_intermediate_seq(sequence + 1)

    try:
        yield report
    finally:
        nni.trial._params = parameters
