"""What --check, --dry-run and `diyc explain` print: which runs a file comes to, and every step of one."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from diyc.capabilities import mask
from diyc.cli.text import Paint, printable, use_color
from diyc.environment import candidates, default_hostname, environment
from diyc.host import tmpfs_keeps_user_attributes
from diyc.jobs import JobSpec, Run
from diyc.plan import OOM_SCORE_ADJ, STEP_DOCS, Bind, Box, Plan, Step, User, build_plan
from diyc.process import has_clone3
from diyc.units import format_duration, format_size

if TYPE_CHECKING:
    from diyc.cgroups import Preview
    from diyc.config import Config

UNKNOWN_ID = "0" * 26  # a run's id is only made when it starts
SUPERVISOR, SPAWNER, CHILD = "the supervisor, before", "a spawner thread", "the child, in its new namespaces"


def print_expansion(config: Config, *, plans: bool, as_json: bool) -> None:
    """The jobs of a file with their runs; with `plans` every run as it would be started."""
    if as_json:
        for spec in config.jobs:
            for index in range(spec.count) if plans else ():
                print(json.dumps({"type": "run", **run_record(spec, index)}, ensure_ascii=False))
        print(json.dumps({"type": "check", "file": config.file, "jobs": [_job_record(s) for s in config.jobs]}))
        return
    total = sum(spec.count for spec in config.jobs)
    counts = f"{len(config.jobs)} job{'s' * (len(config.jobs) != 1)}, {total} run{'s' * (total != 1)}"
    print(f"{config.file}: {counts}, at most {config.supervisor.max_parallel} at once")
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
    print(render_plan(spec, cgroups_here(spec), Paint(use_color(sys.stdout, os.environ)), indent="    "))


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
    env = environment(run, hostname, User().home)
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


# -- explain -----------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One thing asked of the kernel: by whom, how, why, and where that is described."""

    who: str
    call: str
    why: str
    source: str


def cgroups_here(spec: JobSpec) -> Preview:
    """The cgroups that a run of the job would get on this host."""
    from diyc.cgroups import detect, open_cgroups

    return open_cgroups(detect(), instance="SUPERVISOR", into=has_clone3()).preview(spec.limits)


def render_plan(spec: JobSpec, cgroups: Preview, paint: Paint, indent: str = "") -> str:
    """Every system call in the order in which the kernel sees it, each with a line of why and its manual page."""
    lines = [paint.bold(f"{spec.name}: {printable(' '.join(spec.argv))}")]
    lines += [paint.dim(", ".join(f"{key} {value}" for key, value in limit_lines(spec).items()))]
    who = ""
    for number, call in enumerate(calls(spec, cgroups)):
        if call.who != who:
            who = call.who
            lines += ["", paint.bold(f"-- {who}"), ""]
        lines.append(f"{number:>3}  {printable(call.call)}")
        lines.append(paint.dim(f"     {call.why}  [{call.source}]"))
    return "\n".join(indent + line for line in lines)


def calls(spec: JobSpec, cgroups: Preview) -> list[Call]:
    """What the kernel sees of one run from its first directory to execve."""
    plan, box = plan_of(spec, cgroups)
    return [
        *_cgroup_calls(cgroups),
        *_mount_calls(spec, box),
        *(_step_call(SPAWNER, step, cgroups) for step in plan.steps[: plan.spawner_steps]),
        *_clone_calls(plan, box),
        *(_step_call(CHILD, step, cgroups) for step in plan.steps[plan.spawner_steps :]),
    ]


def plan_of(spec: JobSpec, cgroups: Preview) -> tuple[Plan, Box]:
    """The plan of a job's first run and the box it is made for, on a host with these cgroups.

    A user's name is looked up in a directory image; in one that is yet to be unpacked or made, it is shown as root."""
    binds = tuple(
        Bind(m.source, m.target, m.read_only, os.path.isdir(m.source)) for m in spec.mounts if m.source is not None
    )
    if spec.image.kind == "host":
        binds = (Bind("/usr", "/usr", True), *binds)
    hostname = default_hostname(Run(UNKNOWN_ID, spec))
    box = Box(
        hostname,
        user=_user(spec),
        binds=binds,
        joins=len(cgroups.joins),
        into_cgroup=cgroups.into is not None,
        clone3=has_clone3(),
        capabilities=mask(spec.cap_add),
        overlay_by_spawner=not tmpfs_keeps_user_attributes(),
    )
    return build_plan(spec, box), box


def _user(spec: JobSpec) -> User:
    from diyc.images.users import resolve_user

    if spec.image.kind == "dir" and spec.image.source:
        account = resolve_user(spec.image.source, spec.user)
        return User(account.uid, account.gid, account.groups, account.home)
    uid, _, gid = spec.user.partition(":")
    return User(int(uid), int(gid or 0), (), "/") if uid.isdigit() else User()


def _cgroup_calls(cgroups: Preview) -> list[Call]:
    made = [
        Call(SUPERVISOR, f'mkdir("{path}/RUN")', "a cgroup of the run's own: limits, figures", "cgroups(7)")
        for path in cgroups.directories
    ]
    writes = [
        Call(SUPERVISOR, f'write("{path}", "{value}")', "a limit of the job", "cgroups(7)")
        for path, value in cgroups.writes
    ]
    return made + writes


def _mount_calls(spec: JobSpec, box: Box) -> list[Call]:
    image = spec.image.source or "(a skeleton of the host's root)"
    sources = [(image, "layer", "the image, its ids shifted into the job's range")]
    for i, bind in enumerate(box.binds):
        sources.append(
            (bind.source, f"bind{i}", f"becomes {bind.target}, {'read-only' if bind.read_only else 'writable'}")
        )
    return [
        Call(
            SUPERVISOR,
            f'{name} = open_tree("{source}", OPEN_TREE_CLONE) + mount_setattr({name}, MOUNT_ATTR_IDMAP)',
            why,
            "open_tree(2), mount_setattr(2)",
        )
        for source, name, why in sources
    ]


def _clone_calls(plan: Plan, box: Box) -> list[Call]:
    return [
        Call(
            SPAWNER,
            plan.clone_call(box.into_cgroup, box.clone3),
            "a child in namespaces of its own; its parent's memory is lent to it, not copied, until execve",
            "clone(2), namespaces(7)",
        ),
        Call(
            SPAWNER,
            'write("/proc/PID/uid_map", "0 FIRST 65536"), the same to gid_map',
            "root inside is an unprivileged id outside, another one for each running job",
            "user_namespaces(7)",
        ),
        Call(
            SPAWNER,
            f'write("/proc/PID/oom_score_adj", "{OOM_SCORE_ADJ}")',
            "short of memory, the kernel takes jobs first",
            "proc_pid_oom_score_adj(5)",
        ),
    ]


def _step_call(who: str, step: Step, cgroups: Preview) -> Call:
    call = step.call()
    if step.kind == "cgroup_join" and step.fd is not None:
        call = f'write("{cgroups.joins[int(step.fd.removeprefix("tasks"))]}", "0")'
    return Call(who, call, step.why, STEP_DOCS[step.kind].source)


def plan_json(spec: JobSpec, cgroups: Preview) -> dict[str, Any]:
    """The same for programs."""
    plan, box = plan_of(spec, cgroups)
    path = environment(Run(UNKNOWN_ID, spec), box.hostname, box.user.home)["PATH"]
    return {
        "type": "plan",
        "schema": 1,
        "job": spec.name,
        "argv": list(spec.argv),
        "candidates": candidates(spec.argv[0], path),
        "limits": limit_lines(spec),
        "clone_flags": plan.clone_flags,
        "spawner_steps": plan.spawner_steps,
        "calls": [call._asdict() for call in calls(spec, cgroups)],
        "steps": [
            {"index": index, "kind": step.kind, "call": step.call(), "why": step.why, "target": step.target}
            for index, step in enumerate(plan.steps)
        ],
    }
