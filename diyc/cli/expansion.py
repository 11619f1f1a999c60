"""What --check, --dry-run and `diyc explain` print: which runs a file comes to, and every step of one."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from diyc.cli.text import Paint, printable, use_color
from diyc.execution import OOM_SCORE_ADJ, candidates, default_hostname, environment
from diyc.jobs import JobSpec, Run
from diyc.plan import STEP_DOCS as DOCS
from diyc.plan import Bind, Box, Plan, StepDoc, User, build_plan
from diyc.units import format_duration, format_size

if TYPE_CHECKING:
    from diyc.config import Config

UNKNOWN_ID = "0" * 26  # the run id is only made when a run starts


def print_expansion(config: Config, *, plans: bool, as_json: bool) -> None:
    """The jobs of a file with their runs; with `plans` every run as it would be started."""
    if as_json:
        for spec in config.jobs:
            for index in range(spec.count) if plans else ():
                print(json.dumps({"type": "run", **run_record(spec, index)}, ensure_ascii=False))
        print(json.dumps({"type": "check", "file": config.file, "jobs": [_job_record(s) for s in config.jobs]}))
        return
    total = sum(spec.count for spec in config.jobs)
    print(f"{config.file}: {len(config.jobs)} jobs, {total} runs, at most {config.supervisor.max_parallel} at once")
    for spec in config.jobs:
        print(f"  {spec.name:<20} {spec.count:>6} x  {_short(spec)}")
        if plans:
            _print_runs(spec)


def _print_runs(spec: JobSpec) -> None:
    """One plan serves all runs of a job: what differs is shown run by run."""
    for index in range(spec.count):
        record = run_record(spec, index)
        print(f"    [{index}] {printable(' '.join(record['argv']))}")
        print(f"        host name {record['hostname']}, environment {printable(' '.join(record['env']))}")
    plan, box = plan_of(spec, Run(UNKNOWN_ID, spec))
    print(render_plan(spec, plan, box, Paint(use_color(sys.stdout, os.environ)), indent="    "))


def _short(spec: JobSpec) -> str:
    words = " ".join(spec.command) if spec.shell is None else spec.shell
    first = printable(words.splitlines()[0] if words else "")
    return first if len(first) <= 60 else first[:59] + "…"


def _job_record(spec: JobSpec) -> dict[str, Any]:
    return {"job": spec.name, "runs": spec.count, "image": spec.image.name, "argv": list(spec.argv)}


def run_record(spec: JobSpec, index: int) -> dict[str, Any]:
    """One run as it would be started, with its placeholders filled in."""
    run = Run(UNKNOWN_ID, spec, index)
    hostname = default_hostname(run)
    user = User()
    env = environment(run, hostname, user.home)
    return {
        "job": spec.name,
        "index": index,
        "image": spec.image.name,
        "argv": [run.expand(word) for word in spec.argv],
        "env": [f"{key}={value}" for key, value in env.items()],
        "hostname": hostname,
        "workdir": spec.workdir,
        "user": spec.user,
        "timeout_s": spec.timeout,
        "limits": limit_lines(spec),
    }


def plan_of(
    spec: JobSpec, run: Run, user: User | None = None, layout: tuple[int, bool] = (0, True)
) -> tuple[Plan, Box]:
    """The plan of a run and the box it was made for; `layout` is (v1 cgroups to join, whether there is cgroup v2)."""
    from diyc.capabilities import mask

    binds = tuple(
        Bind(m.source, m.target, m.read_only, os.path.isdir(m.source)) for m in spec.mounts if m.source is not None
    )
    if spec.image.kind == "host":
        binds = (Bind("/usr", "/usr", True), *binds)
    joins, into = layout
    box = Box(default_hostname(run), user or User(), binds, joins, into, mask(spec.cap_add))
    return build_plan(spec, box), box


def limit_lines(spec: JobSpec) -> dict[str, str]:
    """The limits that a run would have, as text; `none` for those that are lifted."""
    limits = spec.limits
    sizes = {key: getattr(limits, key) for key in ("memory", "swap", "disk", "output", "core")}
    lines = {key: "none" if value is None else format_size(value) for key, value in sizes.items()}
    for key in ("cpus", "cpu_weight", "cpuset", "pids", "nofile", "io_weight"):
        value = getattr(limits, key)
        if value is not None or key == "pids":
            lines[key] = "none" if value is None else str(value)
    for key in ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops", "hugetlb"):
        for device, value in getattr(limits, key):
            lines[f"{key}.{device}"] = str(value)
    lines["timeout"] = "none" if spec.timeout is None else format_duration(spec.timeout)
    return lines


def render_plan(spec: JobSpec, plan: Plan, box: Box, paint: Paint, indent: str = "") -> str:
    """Every system call in the order in which the kernel sees it, each with a line of why and its manual page."""
    lines = [paint.bold(f"{spec.name}: {printable(' '.join(spec.argv))}"), ""]
    lines.append("cgroups: " + ", ".join(f"{key} {value}" for key, value in limit_lines(spec).items()))
    lines.append("")
    for number, (call, why, source) in enumerate(_calls(plan, box)):
        lines.append(f"{number:>3}  {printable(call)}")
        lines.append(paint.dim(f"     {why}  [{source}]"))
    return "\n".join(indent + line for line in lines)


def _calls(plan: Plan, box: Box) -> list[tuple[str, str, str]]:
    rows = [
        (
            plan.clone_call(box.into_cgroup),
            "seven namespaces with the one below; the parent waits in the kernel, its memory lent and not copied",
            "clone3(2), namespaces(7)",
        )
    ]
    for step in plan.steps:
        rows.append((step.call(), step.why, _doc(step.kind).source))
        if step.kind == "await_parent":
            rows.append(
                (
                    '(parent) write("/proc/PID/uid_map", "0 FIRST 65536"), the same to gid_map; '
                    f'write("/proc/PID/oom_score_adj", "{OOM_SCORE_ADJ}")',
                    "root inside is an unprivileged id of the host outside, another one in every slot",
                    "user_namespaces(7)",
                )
            )
    return rows


def _doc(kind: str) -> StepDoc:
    return DOCS[kind]


def plan_json(spec: JobSpec, plan: Plan, box: Box) -> dict[str, Any]:
    """The same for programs."""
    run = Run(UNKNOWN_ID, spec)
    path = environment(run, box.hostname, box.user.home)["PATH"]
    return {
        "type": "plan",
        "schema": 1,
        "job": spec.name,
        "argv": list(spec.argv),
        "candidates": candidates(spec.argv[0], path),
        "limits": limit_lines(spec),
        "clone_flags": plan.clone_flags,
        "steps": [
            {
                "index": i,
                "kind": step.kind,
                "call": step.call(),
                "why": step.why,
                "source": _doc(step.kind).source,
                "target": step.target,
            }
            for i, step in enumerate(plan.steps)
        ],
    }
