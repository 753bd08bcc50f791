"""Jobs: runs, lenses and audits in processes of their own; they go on without this page, and without this
server.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import streamlit as st

import frame
import jobs
import panels
from data import Run
from mechlens.core.command_lines import join
from mechlens.core.errors import MechlensError, one_line

CONFIG = "configs/experiments/demo.yaml"
LINES = 15
SIGNS = {"queued": "○", "running": "◐", "done": "●", "failed": "✕", "cancelled": "◌"}


def start_panel(run: Run, root: Path) -> None:
    """What can be started here, and what it will cost."""
    st.subheader("Start")
    first, second = st.columns(2)
    with first.container(border=True):
        st.text("The demo run: 4 arms x 3 students on the embedded base. About 12 minutes on two cores.")
        small = st.toggle(
            "one student an arm, few rows (about a minute; too small to show transfer)", key="small-demo"
        )
        if st.button("Start a demo run"):
            options = [
                "run",
                str(_small(root) if small else Path(CONFIG).resolve()),
                "--out",
                str(root.resolve() / ("small-demo" if small else "demo")),
            ]
            _start(root, "small demo run" if small else "demo run", options)
    with second.container(border=True):
        st.text(
            f"Read all lenses of {run.name}, arm {st.session_state['arm']}. About 3 minutes on two cores."
        )
        if run.shipped:
            st.caption("The shipped run has no weights: make a run of your own first.")
        if st.button("Measure this run", disabled=run.shipped):
            _start(
                root,
                f"measure {run.name}",
                ["measure", str(run.folder.resolve()), "--arm", st.session_state["arm"]],
            )
    st.caption("To audit a file, go to Detection. One job runs at a time; the next waits.")


def _small(root: Path) -> Path:
    """A spec that ends within a minute, for trying the machinery."""
    import yaml

    spec = yaml.safe_load(Path(CONFIG).read_text(encoding="utf-8")) | {"name": "small-demo", "seeds": [0]}
    spec["carrier"]["prompts"], spec["teacher"]["rows"], spec["student"]["rows"], spec["ask"]["samples"] = (
        400,
        128,
        300,
        5,
    )
    spec["arms"] = spec["arms"][:2]
    path = root / ".jobs" / "small-demo.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path.resolve()


def _start(root: Path, title: str, arguments: list[str]) -> None:
    free = shutil.disk_usage(root if root.is_dir() else Path.cwd()).free
    if free < 1 << 30:
        st.error("Less than 1 GB is free on this disk: free some first.")
        return
    try:
        job = jobs.start(root, title, arguments)
    except (MechlensError, OSError) as error:
        st.error(panels.plain_markdown(one_line(str(error))))
        return
    st.session_state["job"] = job.id
    st.rerun()


def minutes(seconds: float) -> str:
    """A stretch of time in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def show(job: jobs.Job) -> None:
    """One job: state, progress, the end of its log, and what can be done with it."""
    with st.container(border=True):
        place = f", number {job.place} in the queue" if job.place else ""
        st.markdown(f"**{SIGNS[job.state]} {panels.plain_markdown(job.title)}**: {job.state}{place}")
        st.caption(
            panels.plain_markdown(
                f"started {job.started or '–'}, ended {job.ended or '–'}, exit "
                f"{job.exit if job.exit is not None else '–'}"
            )
        )
        if job.reason:
            st.text(job.reason)
        at = jobs.progress(job)
        if at is not None and at.fraction is not None:
            left = (
                f", {minutes(at.low)} to {minutes(at.high)} left"
                if at.low is not None and at.high is not None
                else ""
            )
            pace = f", {at.rate:.1f} a second" if at.rate else ""
            st.progress(
                min(max(at.fraction, 0.0), 1.0),
                text=panels.plain_markdown(
                    f"{at.steps_done} of {at.steps} steps; {at.phase} {at.done}/{at.total}{pace}; "
                    f"{minutes(at.seconds)} so far{left}"
                ),
            )
        if job.state in ("cancelled", "failed") and at is not None and at.steps_done:
            st.text(f"Partial: {at.steps_done} finished steps are kept; resume goes on from them.")
        with st.container(horizontal=True):
            if job.is_open and st.button("Cancel", key=f"cancel-{job.id}"):
                jobs.cancel(job)
            if not job.is_open and job.state != "done" and st.button("Resume", key=f"resume-{job.id}"):
                jobs.resume(job)
                st.rerun()
            with st.popover("Log", type="tertiary"):
                st.code(jobs.tail(job, LINES) or "nothing was printed yet", language=None)
            with st.popover("Command", type="tertiary"):
                st.code(join(job.command), language="bash", wrap_lines=True)


def watched(root: Path) -> Any:
    """The list, drawn anew each second while something runs."""
    found = jobs.listed(root)
    going = any(job.is_open for job in found)

    @st.fragment(run_every=1 if going else None)
    def listing() -> None:
        now = jobs.listed(root)
        if not now:
            panels.empty(
                "No jobs yet.", "Start one above, or on Detection; or in a terminal:", "mechlens run demo"
            )
        for job in now[:20]:
            with panels.guarded(f"Job {job.title}"):
                show(job)
        if going and not any(job.is_open for job in now):
            st.rerun()

    return listing


def body(run: Run) -> None:
    """The page."""
    st.title("Jobs")
    root = st.session_state["root"]
    with panels.guarded("Starting a job"):
        start_panel(run, root)
    st.subheader("Jobs")
    with panels.guarded("The list of jobs"):
        watched(root)()


if (opened := frame.current()) is not None:
    body(opened)
