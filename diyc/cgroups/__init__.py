"""Limits, figures and killing of whole process trees: cgroup v1, hybrid and v2 behind one face.

    cgroups = open_cgroups(detect(), instance=supervisor_id)
    cgroups.prepare()
    run = cgroups.create(run_id, limits)    # the child joins by run.into_fd and run.join_fds

The only package that knows /sys/fs/cgroup."""

from diyc.cgroups.base import Cgroups, Preview, open_cgroups, without_cgroups
from diyc.cgroups.delegation import needs_systemd_scope
from diyc.cgroups.detect import CgroupHost, Place, detect
from diyc.cgroups.kill import remove_leftovers
from diyc.cgroups.run import RunCgroup
from diyc.cgroups.watch import EmptyWatch

__all__ = [
    "CgroupHost",
    "Cgroups",
    "EmptyWatch",
    "Place",
    "Preview",
    "RunCgroup",
    "detect",
    "needs_systemd_scope",
    "open_cgroups",
    "remove_leftovers",
    "without_cgroups",
]
