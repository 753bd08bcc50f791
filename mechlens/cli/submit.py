"""`mechlens submit`: the shards of a run as jobs of SLURM, by submitit.

A job that SLURM preempts, or ends at its time limit, is put into the queue again, and continues the run.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mechlens.cli import commands
from mechlens.cli.console import say
from mechlens.cli.exits import code_of
from mechlens.core import foreign, spec
from mechlens.core.errors import MachineError, SpecError
from mechlens.results import runner

Cluster = Literal["slurm", "local"]
NO_PACKAGE = (
    "`mechlens submit` needs the package submitit, which is not installed; pip install 'mechlens[slurm]'"
)
LOGS = "submitted"
"""folder of the run with the logs of the jobs"""
RESTARTS = 1000
"""how often a job that reaches its time limit is put into the queue again"""


class ShardJob:
    """One shard of a run as a job, which continues when it is started again.

    Args:
        options: those of `commands.run`.
    """

    def __init__(self, config: Path, **options: Any) -> None:
        self.config, self.options = config, options

    def __call__(self) -> None:
        """Execute the shard and print its result; a failure ends the job with its exit code."""
        if code := code_of(partial(commands.run, self.config, **self.options)):
            sys.exit(code)

    def checkpoint(self) -> Any:
        """What submitit starts when SLURM has stopped the job: the same shard, which resumes."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        return DelayedSubmission(self)


def submit(
    config: Path,
    *,
    nodes: int,
    out: Path | None,
    seed: int | None,
    workers: int | None,
    cluster: Cluster,
    minutes: int,
    **resources: int | None,
) -> None:
    """Submit the shards of a run, and print the ids of the jobs and where their logs are.

    Args:
        resources: submitit's names of what a job gets on its node; None leaves it to the cluster.

    Raises:
        SpecError: if the config is wrong, or the number of nodes is.
        MachineError: if submitit is not installed, or the cluster takes no jobs.
    """
    if nodes < 1:
        raise SpecError(f"--nodes is {nodes}; expected 1 or more")
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MachineError(NO_PACKAGE) from error
    folder = runner.folder_of(runner.resolve(config, seed=seed).experiment, out).absolute()
    options: dict[str, Any] = {"out": folder, "seed": seed, "workers": workers}
    file = spec.find_config(config, "experiments").absolute()
    shards = [ShardJob(file, **options, shard=f"{index + 1}/{nodes}") for index in range(nodes)]
    with foreign.named(
        f"{cluster} takes no jobs", MachineError, advice="submit from a node where sbatch works"
    ):
        executor = submitit.AutoExecutor(
            folder / LOGS, cluster, slurm_max_num_timeout=RESTARTS, local_max_num_timeout=RESTARTS
        )
        given = {name: value for name, value in resources.items() if value is not None}
        executor.update_parameters(name=folder.name, timeout_min=minutes, **given)
        jobs = executor.submit_array(shards)
    for shard, job in enumerate(jobs, 1):
        say(f"shard {shard}/{nodes}: job {job.job_id}, log {job.paths.stdout}")
