"""Jobs: runs, lenses and audits in processes that are independent of this page and its server."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import streamlit as st
import yaml

import data
import page
from data import ShownRun
from jobs import job_queue
from jobs.job_progress import Progress
from jobs.job_queue import AppJob
from mechlens.core.command_lines import join
from mechlens.core.errors import MechlensError, one_line
from mechlens.core.spec import CONFIGS
from panels import panel

DEMO = CONFIGS / "experiments" / "demo.yaml"
LINES = 15
MOST_JOBS = 20
FREE_SPACE = 1 << 30
"""bytes that must be free before a job starts"""
SIGNS = {"queued": "○", "running": "◐", "done": "●", "failed": "✕", "cancelled": "◌"}
SMALL = {
    "carrier": {"prompts": 400},
    "teacher": {"rows": 128},
    "student": {"rows": 300},
    "ask": {"samples": 5},
}
"""what the small demo changes in the demo's spec"""


def draw_start_panel(run: ShownRun, root: Path) -> None:
    """What can be started here, and how long it takes."""
    st.subheader("Start")
    left, right = st.columns(2)
    with left.container(border=True):
        st.text("The demo run: 4 arms x 3 students on the embedded base. About 12 minutes on two cores.")
        small = st.toggle(
            "one student an arm, few rows (about a minute; too small to show transfer)", key="small-demo"
        )
        if st.button("Start a demo run"):
            spec = _write_small_spec(root) if small else DEMO.resolve()
            out = root.resolve() / ("small-demo" if small else "demo")
            title = "small demo run" if small else "demo run"
            _start_job(root, title, ["run", str(spec), "--out", str(out)])
    with right.container(border=True):
        arm = st.session_state["arm"]
        st.text(f"Compute all lenses of {run.name}, arm {arm}. About 3 minutes on two cores.")
        if run.shipped:
            st.caption("The shipped run has no weights: make your own run first.")
        if st.button("Measure this run", disabled=run.shipped):
            _start_job(root, f"measure {run.name}", ["measure", str(run.folder.resolve()), "--arm", arm])
    st.caption("To audit a file, go to Detection. One job runs at a time; the others wait.")


def _write_small_spec(root: Path) -> Path:
    """Write a spec that ends within a minute, to try out the explorer's jobs."""
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    spec = demo | {"name": "small-demo", "seeds": [0], "arms": demo["arms"][:2]}
    for section, changes in SMALL.items():
        spec[section] |= changes
    path = root / ".jobs" / "small-demo.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path.resolve()


def _start_job(root: Path, title: str, arguments: list[str]) -> None:
    free = shutil.disk_usage(root if root.is_dir() else Path.cwd()).free
    if free < FREE_SPACE:
        st.error(
            f"Only {free >> 20} MB are free on this disk; a job needs 1,024 MB. Delete some files first."
        )
        return
    try:
        job = job_queue.start(root, title, arguments)
    except (MechlensError, OSError) as error:
        st.error(panel.escape_markdown(one_line(str(error))))
        return
    st.session_state["job"] = job.id
    st.rerun()


def duration_text(seconds: float) -> str:
    """A duration in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def draw_job(job: AppJob) -> None:
    """One job: its state, progress, log, and buttons to cancel or resume it."""
    with st.container(border=True):
        place = f", number {job.place} in the queue" if job.place else ""
        st.markdown(f"**{SIGNS[job.state]} {panel.escape_markdown(job.title)}**: {job.state}{place}")
        st.caption(panel.escape_markdown(times_text(job)))
        if job.reason:
            st.text(job.reason)
        progress = job_queue.read_progress(job)
        if progress is not None and progress.fraction is not None:
            text = panel.escape_markdown(progress_text(progress))
            st.progress(min(max(progress.fraction, 0.0), 1.0), text=text)
        if job.state in ("cancelled", "failed") and progress is not None and progress.steps_done:
            st.text(f"Partial: {progress.steps_done} finished steps are kept; resume skips them.")
        if job.state == "done" and job.command[0] == "audit":
            _draw_verdict(job)
        with st.container(horizontal=True):
            _draw_buttons(job)


def times_text(job: AppJob) -> str:
    """When a job began, in the machine's time, and how long it took."""
    if job.started is None:
        return "not started"
    began = datetime.fromisoformat(job.started)
    ended = None if job.ended is None else datetime.fromisoformat(job.ended)
    took = "" if ended is None else f", took {duration_text((ended - began).total_seconds())}"
    failed = f", exit code {job.exit}" if job.state == "failed" and job.exit is not None else ""
    return f"started {began.astimezone():%d %b %H:%M}{took}{failed}"


def _draw_verdict(job: AppJob) -> None:
    """The verdict of a finished audit, and a button that opens it."""
    folder = Path(job.cwd, job_queue.option_value(job.command, "--out") or "")
    st.text(one_line(data.read_audit(folder / "audit.json")["verdict"]["sentence"]))
    if st.button("Open this audit", key=f"open-{job.id}", type="primary"):
        st.session_state["awaited-audit"] = folder.name
        st.switch_page("views/detection.py")


def progress_text(progress: Progress) -> str:
    """Steps, phase, pace and time left."""
    pace = f", {progress.rate:.1f} a second" if progress.rate else ""
    left = ""
    if progress.low is not None and progress.high is not None:
        left = f", {duration_text(progress.low)} to {duration_text(progress.high)} left"
    return (
        f"{progress.steps_done} of {progress.steps} steps; {progress.phase} "
        f"{progress.done}/{progress.total}{pace}; {duration_text(progress.seconds)} so far{left}"
    )


def _draw_buttons(job: AppJob) -> None:
    if job.is_open and st.button("Cancel", key=f"cancel-{job.id}"):
        job_queue.cancel(job)
    if not job.is_open and job.state != "done" and st.button("Resume", key=f"resume-{job.id}"):
        job_queue.resume(job)
        st.rerun()
    with st.popover("Log", type="tertiary"):
        st.code(job_queue.read_log_tail(job, LINES) or "nothing was printed yet", language=None)
    with st.popover("Command", type="tertiary"):
        st.code(join(job.command), language="bash", wrap_lines=True)


def make_list(root: Path) -> Callable[[], None]:
    """A function that draws the list of jobs, and draws it again every second while one is open."""
    was_open = any(job.is_open for job in job_queue.list_jobs(root))

    @st.fragment(run_every=1 if was_open else None)
    def draw_list() -> None:
        jobs = job_queue.list_jobs(root)
        if not jobs:
            panel.show_missing(
                "No jobs yet.", "Start one above, on page Detection, or in a terminal:", "mechlens run demo"
            )
        for job in jobs[:MOST_JOBS]:
            with panel.guard(f"Job {job.title}"):
                draw_job(job)
        if was_open and not any(job.is_open for job in jobs):
            st.rerun()

    return draw_list


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Jobs")
    root = st.session_state["root"]
    with panel.guard("The start of jobs"):
        draw_start_panel(run, root)
    st.subheader("Jobs")
    with panel.guard("The list of jobs"):
        make_list(root)()


if (opened := page.current_run()) is not None:
    draw_page(opened)
