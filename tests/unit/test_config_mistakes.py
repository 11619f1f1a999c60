"""Every kind of mistake in jobs.toml gives one line that says where it is, what it is and what to do.

Each example marks the line that the error must name with `# <-`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diyc.config import Machine, load_config, parse_config
from diyc.errors import ConfigError, Problem

MACHINE = Machine(cpus=(0, 1), total_memory=16 * 2**30, euid=0, home="/root")
JOB = '[jobs.a]\ncommand = ["true"]\n'

# key path, what the line must contain, the text
MISTAKES = [
    # keys and tables
    ("jobs.a.timout", "unknown key (did you mean `timeout`?)", JOB + 'timout = "1s" # <-'),
    ("jobs.a.comand", "did you mean `command`?", '[jobs.a]\ncomand = ["true"] # <-'),
    ("jobs.a.cmd", "did you mean `command`?", '[jobs.a]\ncmd = ["true"] # <-'),
    ("jobs.a.memory", "did you mean `limits.memory`?", JOB + 'memory = "1GiB" # <-'),
    ("jobs.a.volumes", "did you mean `mounts`?", JOB + "volumes = [] # <-"),
    ("job", "did you mean `jobs`?", JOB + "[job.b] # <-\n"),
    ("jobs.a.zzzzzz", "unknown key", JOB + "zzzzzz = 1 # <-"),
    ("supervisor.max_memry", "did you mean `max_memory`?", "[supervisor]\nmax_memry = 1 # <-\n" + JOB),
    ("images.i.tarr", "did you mean `tar`?", "[images.i]\ntarr = 'x' # <-\n" + JOB),
    ("jobs.a.limits.memroy", "did you mean `memory`?", JOB + 'limits = { memroy = "1MiB" } # <-'),
    ("jobs.a.limits.pid", "did you mean `pids`?", JOB + "limits.pid = 1 # <-"),
    ("jobs.a.mounts[0].taget", "did you mean `target`?", JOB + 'mounts = [{ type = "tmpfs", taget = "/x" }] # <-'),
    ('jobs."b c"', "is not a valid name", JOB + "[jobs.'b c'] # <-\ncommand = ['true']"),
    ("jobs.-b", "is not a valid name", JOB + "[jobs.-b] # <-\ncommand = ['true']"),
    ("jobs.a", "expected a table, not 5", "jobs.a = 5 # <-"),
    ("jobs", "expected a table, not an array", "[[jobs]] # <-\ncommand = ['true']"),
    ("", "no job is defined", "[supervisor]\nmax_parallel = 2"),
    ("", "the file is empty", "\n"),
    # what is run
    ("jobs.a", "needs `command` or `shell`", "[jobs.a] # <-\ntimeout = 1"),
    ("jobs.a.shell", "excludes `command`", JOB + 'shell = "true" # <-'),
    ("defaults.shell", "excludes `command`", '[defaults]\ncommand = ["true"]\nshell = "true" # <-\n[jobs.a]'),
    ("jobs.a.command", "must not be empty", "[jobs.a]\ncommand = [] # <-"),
    ("jobs.a.command[0]", "must name a program", '[jobs.a]\ncommand = ["", "x"] # <-'),
    ("jobs.a.command", 'expected an array, not "true"', '[jobs.a]\ncommand = "true" # <-'),
    ("jobs.a.command[2]", 'expected a string, not 5 (write "5")', '[jobs.a]\ncommand = [\n "a",\n "b",\n 5, # <-\n]'),
    ("jobs.a.shell", "must not be empty", '[jobs.a]\nshell = "" # <-'),
    ("jobs.a.command[1]", "contains a NUL", '[jobs.a]\ncommand = ["a", "b\\u0000c"] # <-'),
    ("jobs.a.shell", "128 KiB or longer", f'[jobs.a]\nshell = "{"x" * 131072}" # <-'),
    ("jobs.a.command[1]", "did you mean {index}?", '[jobs.a]\ncommand = ["echo", "{indx}"] # <-'),
    ("jobs.a.shell", "{matrix.seed} is not built yet", '[jobs.a]\nshell = "echo {matrix.seed}" # <-'),
    ("jobs.a.env.A", "{row.name} is not built yet", JOB + 'env.A = "{row.name}" # <-'),
    # environment and identity
    ("jobs.a.env.N", 'expected a string, not 8080 (write "8080")', JOB + "env = { N = 8080 } # <-"),
    ('jobs.a.env."A=B"', "must not be empty nor contain =", JOB + 'env = { "A=B" = "1" } # <-'),
    ("jobs.a.env.DIYC_X", "is reserved", JOB + '[jobs.a.env]\nLANG = "C"\nDIYC_X = "1" # <-'),
    ("jobs.a.env_file", "nope.env does not exist", JOB + 'env_file = "nope.env" # <-'),
    ("jobs.a.env_file", "is not a file", JOB + 'env_file = "folder" # <-'),
    ("jobs.a.user", "70000 is not a user", JOB + "user = 70000 # <-"),
    ("jobs.a.user", "-1 is not a user", JOB + "user = -1 # <-"),
    ("jobs.a.user", '"4294967296" is not a user', JOB + 'user = "4294967296" # <-'),
    ("jobs.a.user", "is not a user", JOB + 'user = "root\\nx" # <-'),
    ("jobs.a.user", "is not a user", JOB + 'user = "root\\n" # <-'),
    ("jobs.a.user", "true is not a user", JOB + "user = true # <-"),
    ("jobs.a.user", "an array is not a user", JOB + "user = [0] # <-"),
    ("jobs.a.workdir", 'must be an absolute path inside the container (try "/tmp")', JOB + 'workdir = "tmp" # <-'),
    ("jobs.a.hostname", "is not a host name", JOB + 'hostname = "a_b.-c" # <-'),
    ("jobs.a.hostname", "is longer than 64", JOB + f'hostname = "{"x" * 60}-{{index}}" # <-\ncount = 10000'),
    ("defaults.hostname", "is not a host name", '[defaults]\nhostname = "{job}." # <-\n' + JOB),
    ("jobs.a.stdin", "does not exist", JOB + 'stdin = "nope.txt" # <-'),
    ("jobs.a.stdin", "does not exist", JOB + 'stdin = "a\\nb" # <-'),
    ("jobs.a.stdin", "is not a file", JOB + 'stdin = "folder" # <-'),
    # running
    ("jobs.a.timeout", '"10 sec" is not a duration (try "10s")', JOB + 'timeout = "10 sec" # <-'),
    ("jobs.a.timeout", "must be at least 1 ms", JOB + "timeout = 0 # <-"),
    ("jobs.a.timeout", "negative", JOB + "timeout = -1.5 # <-"),
    ("jobs.a.stop_signal", "did you mean `TERM`?", JOB + 'stop_signal = "SIGTREM" # <-'),
    ("jobs.a.stop_signal", "99 is not a signal", JOB + "stop_signal = 99 # <-"),
    ("jobs.a.count", "must be at least 1, not 0", JOB + "count = 0 # <-"),
    ("jobs.a.count", "must be at most 1000000", JOB + "count = 1_000_001 # <-"),
    ("jobs.a.count", "expected a whole number, not true", JOB + "count = true # <-"),
    ("jobs.a.max_parallel", "must be at least 1", JOB + "max_parallel = 0 # <-"),
    ("jobs.a.priority", "expected a whole number, not 1.5", JOB + "priority = 1.5 # <-"),
    ("jobs.a.writable", 'expected true or false, not "yes"', JOB + 'writable = "yes" # <-'),
    ("jobs.a.labels.team", "must be one line", JOB + 'labels = { team = "a\\nb" } # <-'),
    # images
    ("jobs.a.image", "did you mean `py312`?", "[images.py312]\ndir = 'folder'\n" + JOB + 'image = "py313" # <-'),
    ("images.i", "needs `tar` or `dir`", "[images.i] # <-\n" + JOB),
    ("images.i.dir", "excludes `tar`", "[images.i]\ntar = 'in.txt'\ndir = 'folder' # <-\n" + JOB),
    ("images.i.tar", "nope.tar does not exist", "[images.i]\ntar = 'nope.tar' # <-\n" + JOB),
    ("images.i.dir", "is not a directory", "[images.i]\ndir = 'in.txt' # <-\n" + JOB),
    ("images.i.sha256", "64 hexadecimal digits", "[images.i]\ntar = 'in.txt'\nsha256 = 'abc' # <-\n" + JOB),
    ("images.i.sha256", "a directory has none", f"[images.i]\ndir='folder'\nsha256 = '{'0' * 64}' # <-\n" + JOB),
    ("images.host", "is built in", "[images.host] # <-\ndir = 'folder'\n" + JOB),
    # mounts
    ("jobs.a.mounts[0]", "needs `target`", JOB + '[[jobs.a.mounts]] # <-\ntype = "tmpfs"'),
    (
        "jobs.a.mounts[1].source",
        "does not exist",
        JOB + '[[jobs.a.mounts]]\ntype = "tmpfs"\ntarget = "/x"\n'
        '[[jobs.a.mounts]]\ntype = "bind"\ntarget = "/y"\nsource = "nope" # <-',
    ),
    ("jobs.a.mounts[0]", "needs `source`", JOB + 'mounts = [{ type = "bind", target = "/x" }] # <-'),
    (
        "jobs.a.mounts[0].source",
        "belongs to a bind mount",
        JOB + 'mounts = [{ type = "tmpfs", target = "/x", source = "folder" }] # <-',
    ),
    (
        "jobs.a.mounts[0].size",
        "belongs to a tmpfs",
        JOB + 'mounts = [{ type = "bind", target = "/x", source = "folder", size = "1MB" }] # <-',
    ),
    ("jobs.a.mounts[0].type", "did you mean `tmpfs`?", JOB + 'mounts = [{ type = "tmpf", target = "/x" }] # <-'),
    ("jobs.a.mounts[0].target", "absolute", JOB + 'mounts = [{ type = "tmpfs", target = "x" }] # <-'),
    ("jobs.a.mounts[0].target", "root itself", JOB + 'mounts = [{ type = "tmpfs", target = "//" }] # <-'),
    ("jobs.a.mounts[0].target", "/proc", JOB + 'mounts = [{ type = "tmpfs", target = "/./proc/x" }] # <-'),
    ("jobs.a.mounts[0].target", "/sys", JOB + 'mounts = [{ type = "tmpfs", target = "/sys" }] # <-'),
    ("jobs.a.mounts[0].target", "..", JOB + 'mounts = [{ type = "tmpfs", target = "/a/../b" }] # <-'),
    ("jobs.a.mounts[0].size", "at least 1 B", JOB + 'mounts = [{ type = "tmpfs", target = "/x", size = 0 }] # <-'),
    (
        "jobs.a.mounts[1].target",
        "is the target of mounts[0] already",
        JOB + 'mounts = [\n { type = "tmpfs", target = "/x" },\n { type = "tmpfs", target = "/x/" }, # <-\n]',
    ),
    # limits
    ("jobs.a.limits.memory", '"64Mb" is not a size (try "64MB")', JOB + '[jobs.a.limits]\n\nmemory = "64Mb" # <-'),
    ("jobs.a.limits.memory", "must be at least 1 MiB", JOB + "limits.memory = 1000 # <-"),
    ("jobs.a.limits.memory", "more than supervisor.max_memory", JOB + 'limits.memory = "1TiB" # <-'),
    ("supervisor.max_memory", "less than the 256 MiB", '[supervisor]\nmax_memory = "64MiB" # <-\n' + JOB),
    ("jobs.a.limits.swap", "-1 is not a size", JOB + "limits.swap = -1 # <-"),
    ("jobs.a.limits.pids", "must be from 1", JOB + "limits.pids = 0 # <-"),
    ("jobs.a.limits.pids", 'try 64, or "none"', JOB + 'limits.pids = "many" # <-'),
    ("jobs.a.limits.cpus", "must be from 0.01", JOB + "limits.cpus = 0 # <-"),
    ("jobs.a.limits.cpus", "must be from 0.01", JOB + "limits.cpus = nan # <-"),
    ("jobs.a.limits.cpus", "is not a number of CPUs", JOB + 'limits.cpus = "2" # <-'),
    ("jobs.a.limits.cpu_weight", "at most 10000", JOB + "limits.cpu_weight = 20000 # <-"),
    ("jobs.a.limits.io_weight", "at least 1", JOB + "limits.io_weight = 0 # <-"),
    ("jobs.a.limits.cpuset", "this host has the CPUs 0-1, not 2-3", JOB + 'limits.cpuset = "0-3" # <-'),
    ("jobs.a.limits.cpuset", "is not a CPU set", JOB + 'limits.cpuset = "all" # <-'),
    ("jobs.a.limits.nofile", "at least 3", JOB + "limits.nofile = 2 # <-"),
    ("jobs.a.limits.output", "at least 1 B", JOB + "limits.output = 0 # <-"),
    ("jobs.a.limits.disk", "is not a size", JOB + 'limits.disk = "lots" # <-'),
    (
        "jobs.a.limits.io_read_bps./dev/nope".replace("/dev/nope", '"/dev/nope"'),
        "No such file",
        JOB + 'limits.io_read_bps = { "/dev/nope" = "1MB" } # <-',
    ),
    (
        'jobs.a.limits.io_write_iops."/dev/null"',
        "is not a block device",
        JOB + '[jobs.a.limits.io_write_iops]\n"/dev/null" = 5 # <-',
    ),
    ("jobs.a.limits.hugetlb.2MiB", 'try "2MB"', JOB + 'limits.hugetlb = { 2MiB = "0" } # <-'),
    # security and network
    ("jobs.a.security.cap_add[0]", "SYS_ADMIN may not be given", JOB + 'security.cap_add = ["CAP_SYS_ADMIN"] # <-'),
    ("jobs.a.security.cap_add[0]", "did you mean `CHOWN`?", JOB + 'security.cap_add = ["chwon"] # <-'),
    ("jobs.a.security.cap_drop[0]", "is not a capability", JOB + 'security.cap_drop = ["EVERYTHING"] # <-'),
    ("jobs.a.network.mode", "did you mean `loopback`?", JOB + 'network = { mode = "loopbak" } # <-'),
    # the supervisor
    ("supervisor.max_parallel", "at least 1", "[supervisor]\nmax_parallel = 0 # <-\n" + JOB),
    ("supervisor.max_memory", "is not a size", '[supervisor]\nmax_memory = "80%" # <-\n' + JOB),
    ("supervisor.enforce", "did you mean `strict`?", '[supervisor]\nenforce = "Strict" # <-\n' + JOB),
    ("jobs.a.security.apparmor", "is not the name of an AppArmor", JOB + 'security.apparmor = " x" # <-'),
    ("jobs.a.security.apparmor", "is not the name of an AppArmor", JOB + 'security.apparmor = "a\\nb" # <-'),
    ("jobs.a.security.selinux", "is not an SELinux label", JOB + 'security.selinux = "container_t" # <-'),
    ("jobs.a.security.selinux_mount", "not an SELinux label", JOB + """security.selinux_mount = 'a:b:c","d' # <-"""),
    ("supervisor.id_range", "is not a range of ids", '[supervisor]\nid_range = "5" # <-\n' + JOB),
    ("supervisor.id_range", "must begin at 65536", '[supervisor]\nid_range = "0:65536" # <-\n' + JOB),
    ("supervisor.metrics_listen", 'try "127.0.0.1:9464"', '[supervisor]\nmetrics_listen = "9464" # <-\n' + JOB),
    ("supervisor.id_range", "end by 4294967294", '[supervisor]\nid_range = "65536:4294901760" # <-\n' + JOB),
    ("supervisor.metrics_listen", "not an address", '[supervisor]\nmetrics_listen = "a:99999" # <-\n' + JOB),
    ("supervisor.cgroup_parent", "is not a cgroup", '[supervisor]\ncgroup_parent = "../x" # <-\n' + JOB),
    ("supervisor.state_dir", "must not be empty", '[supervisor]\nstate_dir = "" # <-\n' + JOB),
    ("supervisor.shutdown_grace", "is not a duration", '[supervisor]\nshutdown_grace = "x" # <-\n' + JOB),
    # [defaults] are reported at their own place, once
    (
        "defaults.limits.memory",
        "is not a size",
        '[defaults]\nlimits = { memory = "1 gig" } # <-\n' + JOB + "[jobs.b]\ncommand = ['true']",
    ),
    ("defaults.workdir", "absolute", "[defaults]\nworkdir = 'x' # <-\n" + JOB + "[jobs.b]\ncommand = ['true']"),
    # places that are hard to find
    (
        "jobs.a.limits.pids",
        "must be from 1",
        '[jobs]\n"a" = { command = ["]", "#", \'"\'], limits.pids = 0 } # <-\n',
    ),
    (
        "jobs.a.limits.pids",
        "must be from 1",
        '[jobs.a]\nshell = """\n[jobs.a.limits]\npids = 1 # not here\n\\""" and """""\nlimits . "pids" = 0 # <-\n',
    ),
    ("jobs.a.env.X", "contains a NUL", JOB + "env.'Y' = '''\nX = 1\n'''''\nenv.\"X\" = \"\\u0000\" # <-"),
    # TOML itself
    ("", 'not valid TOML in column 12', "[jobs.a]\nmemory = 64MiB # <-"),
    ("", "a string needs quotes", "[jobs.a]\ntimeout = 10s # <-"),
    ("", "a string needs quotes", "[jobs.a]\nimage = host # <-"),
    ("", "a { } table must end on the line", "[jobs.a]\nlimits = { pids = 1, # <-\n  nofile = 5 }"),
    ("", "invalid initial character for a key part", "[jobs.a]\nenv. = 5 # <-"),
    ("", "[jobs.a] stands here a second time", JOB + "[jobs.a] # <-"),
    ("", "the key is set a second time", JOB + 'command = ["false"] # <-'),
    ("", "is a closing quote missing?", "[jobs.a]\ncommand = [\"x] # <-\n[jobs.b]"),
    ("", "is a ] or a quote missing?", "[jobs.a]\ncommand = ['x\" # <-\n"),
    ("", "is a ] or a quote missing?", '[jobs.a]\ncommand = ["x", # <-'),
    ("", "more digits", f"[jobs.a]\ncount = {'9' * 5000} # <-"),
    ("", "nested too deeply", "a = " + "[" * 5000 + "]" * 5000),
]  # fmt: skip

NOT_BUILT = [
    ("supervisor.socket", '[supervisor]\nsocket = "/run/x.sock" # <-\n' + JOB),
    ("supervisor.rootfs_driver", '[supervisor]\nrootfs_driver = "btrfs" # <-\n' + JOB),
    ("images.i.oci", '[images.i]\noci = "layout" # <-\n' + JOB),
    ("images.i.docker", '[images.i]\ndocker = "in.txt" # <-\n' + JOB),
    ("images.i.pull", '[images.i]\npull = "localhost/x:1" # <-\n' + JOB),
    ("networks.n", "[networks.n] # <-\n" + JOB),
    ("queues.q", "[queues.q] # <-\nmax_parallel = 1\n" + JOB),
    ("jobs.a.tty", JOB + "tty = true # <-"),
    ("jobs.a.warm", JOB + "warm = 2 # <-"),
    ("jobs.a.init", JOB + "init = true # <-"),
    ("jobs.a.matrix", JOB + "matrix = { seed = [1, 2] } # <-"),
    ("jobs.a.foreach", JOB + 'foreach = { csv = "in.txt" } # <-'),
    ("jobs.a.fail_fast", JOB + "fail_fast = true # <-"),
    ("jobs.a.depends_on", JOB + 'depends_on = ["b"] # <-'),
    ("jobs.a.queue", JOB + 'queue = "slow" # <-'),
    ("jobs.a.restart", JOB + 'restart = "always" # <-'),
    ("jobs.a.retry", JOB + "retry = { attempts = 3 } # <-"),
    ("jobs.a.artifacts.in", JOB + 'artifacts.in = [{ source = "a", target = "/b" }] # <-'),
    ("jobs.a.artifacts.out", JOB + 'artifacts = { out = [{ source = "/a", target = "b" }] } # <-'),
    ("jobs.a.limits.cpu_time", JOB + 'limits.cpu_time = "5s" # <-'),
    ("jobs.a.network.mode", JOB + 'network.mode = "bridge" # <-'),
    ("jobs.a.network.mode", JOB + 'network.mode = "host" # <-'),
    ("jobs.a.network.ports", JOB + 'network.ports = ["8080:80"] # <-'),
    ("jobs.a.network.allow", JOB + 'network.allow = ["10.0.0.0/8:443"] # <-'),
    ("jobs.a.network.dns", JOB + 'network.dns = ["1.1.1.1"] # <-'),
    ("jobs.a.network.ip", JOB + 'network.ip = "172.30.0.9" # <-'),
    ("jobs.a.security.user_namespace", JOB + "security.user_namespace = false # <-"),
    ("jobs.a.security.no_new_privs", JOB + "security.no_new_privs = false # <-"),
    ("jobs.a.security.seccomp", JOB + 'security.seccomp = "default" # <-'),
    ("jobs.a.security.landlock", JOB + 'security.landlock = "default" # <-'),
    ("jobs.a.security.devices", JOB + 'security.devices = ["/dev/fuse"] # <-'),
    ("jobs.a.security.masked_paths", JOB + 'security.masked_paths = "default" # <-'),
    ("jobs.a.security.read_only_paths", JOB + 'security.read_only_paths = ["/proc/bus"] # <-'),
    ("jobs.a.security.time_offset", JOB + 'security.time_offset = "1h" # <-'),
    ("defaults.tty", "[defaults]\ntty = true # <-\n" + JOB + "[jobs.b]\ncommand = ['true']"),
]

USED_NOT = """
tty = false
warm = 0
init = false
fail_fast = false
depends_on = []
queue = "default"
restart = "no"
artifacts = { in = [], out = [] }
limits = { cpu_time = "none" }
network = { mode = "none", ports = [], allow = [], dns = [], ip = "" }
security = { user_namespace = true, no_new_privs = true, apparmor = "", selinux = "", devices = [], time_offset = "0s" }
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.txt").write_text("")
    return tmp_path


def problems_of(text: str, base: Path, **options: object) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "jobs.toml", str(base), machine=MACHINE, **options)  # type: ignore[arg-type]
    return caught.value.problems


def marked_line(text: str) -> int | None:
    return next((number for number, line in enumerate(text.split("\n"), 1) if line.endswith("# <-")), None)


@pytest.mark.parametrize("key, fragment, text", MISTAKES, ids=[f"{key}-{word[:20]}" for key, word, _ in MISTAKES])
def test_mistake_gives_one_located_line_that_helps(key: str, fragment: str, text: str, base: Path) -> None:
    problems = problems_of(text, base)
    assert [(problem.file, problem.line, problem.key) for problem in problems] == [
        ("jobs.toml", marked_line(text), key)
    ]
    assert fragment in str(problems[0])
    assert "\n" not in str(problems[0])
    assert len(str(problems[0])) < 320


@pytest.mark.parametrize("key, text", NOT_BUILT)
def test_key_that_is_not_built_is_refused_by_name(key: str, text: str, base: Path) -> None:
    problems = problems_of(text, base)
    assert [(problem.line, problem.key) for problem in problems] == [(marked_line(text), key)]
    assert "is not built yet in this version; remove it" in str(problems[0])


@pytest.mark.parametrize("line", USED_NOT.strip().split("\n"))
def test_key_that_is_not_built_may_say_that_it_is_not_used(line: str, base: Path) -> None:
    assert parse_config(JOB + line, "jobs.toml", str(base), machine=MACHINE).jobs[0].name == "a"


@pytest.mark.parametrize(
    "line, fragment",
    [
        ('tty = "yes"', "expected true or false"),
        ("depends_on = 'b'", "expected an array"),
        ("retry = { attempts = 'x' }", "expected a whole number"),
        ("security.seccomp = 1", "expected a string"),
        ("restart = 'allways'", "did you mean `always`?"),
        ("security.masked_paths = 1", 'neither "default"'),
    ],
)
def test_key_that_is_not_built_is_type_checked_first(line: str, fragment: str, base: Path) -> None:
    (problem,) = problems_of(JOB + line, base)
    assert fragment in str(problem)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(base: Path) -> None:
    text = """\
[supervisor]
max_parallel = 0
[defaults]
timeout = "10 sec"
[jobs.a]
[jobs.b]
command = ["true"]
shell = "true"
tty = true
user = -1
limits = { memory = "64Mb", pids = 0 }
[jobs.b.env]
"A=" = "x"
[jobs.c]
command = ["true"]
timout = 3
"""
    problems = problems_of(text, base)
    assert [(problem.line, problem.key) for problem in problems] == [
        (2, "supervisor.max_parallel"),
        (4, "defaults.timeout"),
        (5, "jobs.a"),
        (8, "jobs.b.shell"),
        (9, "jobs.b.tty"),
        (10, "jobs.b.user"),
        (11, "jobs.b.limits.memory"),
        (11, "jobs.b.limits.pids"),
        (13, 'jobs.b.env."A="'),
        (16, "jobs.c.timout"),
    ]


def test_mistakes_in_an_env_file_are_located_in_it(base: Path) -> None:
    (base / "my.env").write_text("# fine\nA=1\n\nnonsense\nDIYC_X=1\nB={indx}\n")
    problems = problems_of(JOB + 'env_file = "my.env"\ntimeout = "x"\n', base)
    file = str(base / "my.env")
    assert [(problem.file, problem.line) for problem in problems] == [("jobs.toml", 4), (file, 4), (file, 5), (file, 6)]
    assert '"nonsense" is not KEY=VALUE' in str(problems[1])


def test_an_env_file_that_is_not_text_is_refused(base: Path) -> None:
    (base / "my.env").write_bytes(b"A=\xff\n")
    (problem,) = problems_of(JOB + 'env_file = "my.env"\n', base)
    assert (problem.line, problem.key) == (3, "jobs.a.env_file")
    assert "is not UTF-8" in problem.message


@pytest.mark.parametrize(
    "override, fragment",
    [
        ("nonsense", "expected KEY=VALUE"),
        ("a b=3", "is not a dotted key"),
        ("jobs.b.timeout=3", "the file defines no jobs.b"),
        ("jobs.build.timout=3", "did you mean `timeout`?"),
        ("jobs.buld.timeout=3", "did you mean `build`?"),
        ("jobs.build.timeout=soon", "is not a duration"),
        ("jobs.build.command.x=1", "is not a table"),
        ("jobs.build.limits.memory=1TiB", "more than supervisor.max_memory"),
        ("supervisor.socket=/x", "is not built yet"),
    ],
)
def test_wrong_override_names_the_option(override: str, fragment: str, base: Path) -> None:
    (problem,) = problems_of('[jobs.build]\ncommand = ["true"]\n', base, overrides=[override])
    assert (problem.file, problem.line) == ("--set", None)
    assert fragment in str(problem)


def test_unknown_name_to_only_is_an_error_with_a_suggestion(base: Path) -> None:
    (problem,) = problems_of('[jobs.build]\ncommand = ["true"]\n', base, only=["biuld"])
    assert str(problem) == '--only: no job is named "biuld" (did you mean `build`?)'


def test_problems_name_the_file_as_it_was_given(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "x.toml").write_text("[jobs.a]\ncommand = 5\n")
    monkeypatch.chdir(base)
    with pytest.raises(ConfigError, match=r"^x\.toml:2: jobs\.a\.command: expected an array, not 5$"):
        load_config("x.toml", machine=MACHINE)


@pytest.mark.parametrize(
    "name, fragment",
    [
        ("missing.toml", "cannot read the configuration: No such file or directory"),
        ("folder", "is a directory; name the jobs.toml inside it"),
        ("latin1.toml", "latin1.toml:2: is not UTF-8 text"),
        ("nul\0.toml", "cannot read the configuration"),
        ("loop.toml", "cannot read the configuration"),
    ],
)
def test_file_that_cannot_be_read_is_named(name: str, fragment: str, base: Path) -> None:
    (base / "latin1.toml").write_bytes(b"[jobs.a]\n# caf\xe9\n")
    os.symlink("loop.toml", base / "loop.toml")
    with pytest.raises(ConfigError) as caught:
        load_config(f"{base}/{name}", machine=MACHINE)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
