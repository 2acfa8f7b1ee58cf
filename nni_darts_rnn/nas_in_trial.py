"""A `NasExperiment` inside an NNI trial whose results reach the trial's page.

While its models run, NNI 3.0's sequential engine replaces the trial's channel for metrics by its own, so their results do not reach the trial. It also
leaves its last model in the place of the trial's parameters. This can go once NNI can pass a model's results on and restores the parameters.
"""

from __future__ import annotations

import contextlib

import nni.trial
from nni.runtime.env_vars import trial_env_vars
from nni.runtime.trial_command_channel import get_default_trial_command_channel


@contextlib.contextmanager
def trial_reports():
    """`with trial_reports() as report: NasExperiment(space, search_evaluator(corpus, recipe, report=report), strategy).run()`.

    `report(row)` sends an intermediate result of the trial that this process is, wherever it is called; `row` is a number or a dictionary with
    "default". After the context `nni.report_final_result` reports for the trial again.
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
