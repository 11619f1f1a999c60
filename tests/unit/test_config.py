"""What jobs.toml says is what comes out: defaults, merging, overrides, paths; and any text is handled."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from diyc.capabilities import NUMBERS
from diyc.config import (
    Config,
    Machine,
    SupervisorConfig,
    job_from_mapping,
    json_schema,
    load_config,
    parse_config,
    supervisor_from_mapping,
)
from diyc.config_checks import ALLOWED_CAPABILITIES
from diyc.config_lines import Lines, parse_key
from diyc.config_models import BUILT
from diyc.errors import ConfigError, Problem
from diyc.jobs import ImageSpec, JobSpec, Limits, Mount

ROOT = Path(__file__).parents[2]
MACHINE = Machine(cpus=(0, 1, 2, 3), total_memory=10 * 2**30, euid=0, home="/root")
EVERYTHING = """
[supervisor]
max_parallel = 8
max_memory = "4GiB"
state_dir = "state"
runtime_dir = "/run/other"
cgroup_parent = "diyc/test"
metrics_listen = "127.0.0.1:9464"
shutdown_grace = "3s"
enforce = "best-effort"
reuse = false
rootfs_driver = "overlay"
id_range = "65536:131072"

[images.tarred]
tar = "image.tar"
sha256 = "ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
[images.unpacked]
dir = "rootfs"

[jobs.all]
image = "tarred"
command = ["prog", "--n", "{index}"]
env = { LANG = "C.UTF-8", N = "{attempt}" }
env_file = "test.env"
workdir = "/work"
user = "1000:1001"
hostname = "{job}-{index}"
stdin = "in.txt"
writable = false
timeout = "1m30s"
stop_signal = "SIGINT"
stop_timeout = 0
count = 5
max_parallel = 2
priority = -3
labels = { team = "ml" }
[jobs.all.limits]
memory = "1GiB"
swap = "none"
cpus = 1.5
cpu_weight = 200
cpuset = "3,0-1"
pids = "none"
disk = "none"
output = "2MB"
inline = 0
nofile = 64
core = "1KiB"
io_read_bps = { "/dev/x" = "10MB" }
io_write_bps = { "/dev/x" = 5 }
io_read_iops = { "/dev/x" = 7 }
io_write_iops = { "/dev/x" = 8 }
io_weight = 50
hugetlb = { 2MB = "4MiB" }
[jobs.all.network]
mode = "loopback"
[[jobs.all.mounts]]
type = "bind"
source = "in.txt"
target = "/in/../in.txt".replaced
[[jobs.all.mounts]]
type = "tmpfs"
target = "/scratch/"
size = "16MiB"
[jobs.all.security]
cap_add = ["CAP_CHOWN", "kill", "SETUID"]
cap_drop = ["SETUID"]
""".replace('"/in/../in.txt".replaced', '"/in.txt"\nread_only = true')


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("image.tar", "in.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "test.env").write_text("# comment\n\n N = from file \nQUOTED='a b'\nEMPTY=\n")
    return tmp_path


def parsed(text: str, base: Path | str = "/nowhere", **options: Any) -> Config:
    return parse_config(text, "jobs.toml", str(base), machine=MACHINE, check_devices=False, **options)


def only_job(text: str, base: Path | str = "/nowhere") -> JobSpec:
    (job,) = parsed(text, base).jobs
    return job


def test_every_key_that_is_built_reaches_its_place(base: Path) -> None:
    config = parsed(EVERYTHING, base)
    assert config.supervisor == SupervisorConfig(
        max_parallel=8,
        max_memory=4 * 2**30,
        state_dir=f"{base}/state",
        runtime_dir="/run/other",
        cgroup_parent="diyc/test",
        metrics_listen="127.0.0.1:9464",
        shutdown_grace=3.0,
        enforce="best-effort",
        reuse=False,
        rootfs_driver="overlay",
        id_range=(65536, 131072),
    )
    assert config.jobs == (
        JobSpec(
            name="all",
            command=("prog", "--n", "{index}"),
            image=ImageSpec("tarred", "tar", f"{base}/image.tar", "abcdef0123456789" * 4),
            env=(("N", "{attempt}"), ("QUOTED", "a b"), ("EMPTY", ""), ("LANG", "C.UTF-8")),
            workdir="/work",
            user="1000:1001",
            hostname="{job}-{index}",
            stdin=f"{base}/in.txt",
            writable=False,
            timeout=90.0,
            stop_signal=2,
            stop_timeout=0.0,
            count=5,
            max_parallel=2,
            priority=-3,
            labels=(("team", "ml"),),
            limits=Limits(
                memory=2**30,
                swap=None,
                cpus=1.5,
                cpu_weight=200,
                cpuset="0-1,3",
                pids=None,
                disk=None,
                output=2_000_000,
                inline=0,
                nofile=64,
                core=1024,
                io_read_bps=(("/dev/x", 10_000_000),),
                io_write_bps=(("/dev/x", 5),),
                io_read_iops=(("/dev/x", 7),),
                io_write_iops=(("/dev/x", 8),),
                io_weight=50,
                hugetlb=(("2MB", 4 * 2**20),),
            ),
            network="loopback",
            mounts=(
                Mount("bind", "/in.txt", f"{base}/in.txt", read_only=True),
                Mount("tmpfs", "/scratch", size=16 * 2**20),
            ),
            cap_add=("CHOWN", "KILL"),
        ),
    )


def test_the_smallest_file_gets_the_defaults_of_the_host_and_of_a_job() -> None:
    config = parsed('[jobs.a]\ncommand = ["true"]')
    assert config.jobs == (JobSpec(name="a", command=("true",)),)
    assert config.supervisor == SupervisorConfig(16, 8 * 2**30, "/var/lib/diyc", "/run/diyc")
    assert config.file == "jobs.toml"


@pytest.mark.parametrize(
    "state_home, runtime_home, directories",
    [
        (None, None, ("/home/u/.local/state/diyc", "/home/u/.local/state/diyc/run")),
        ("/s", "/run/user/7", ("/s/diyc", "/run/user/7/diyc")),
        ("relative", "relative", ("/home/u/.local/state/diyc", "/home/u/.local/state/diyc/run")),
    ],
)
def test_directories_follow_xdg_without_root(
    state_home: str | None, runtime_home: str | None, directories: tuple[str, str]
) -> None:
    machine = Machine((0,), 2**30, 7, "/home/u", state_home, runtime_home)
    assert machine.directories() == directories


def test_this_machine_is_described() -> None:
    machine = Machine.here()
    assert machine.cpus
    assert machine.total_memory > 2**20


def test_jobs_keep_the_order_of_the_file() -> None:
    text = "".join(f'[jobs.{name}]\ncommand = ["true"]\n' for name in "zmab")
    assert [job.name for job in parsed(text).jobs] == list("zmab")


def test_defaults_are_merged_key_by_key_under_every_job() -> None:
    text = """
[defaults]
command = ["default"]
timeout = "10s"
env = { A = "1", B = "1" }
labels = { team = "x" }
limits = { memory = "64MiB", pids = 10 }
mounts = [{ type = "tmpfs", target = "/d" }]
security = { cap_add = ["CHOWN"] }
[jobs.own]
shell = "echo"
timeout = "none"
env = { B = "2", C = "2" }
labels = { owner = "y" }
limits.pids = 20
mounts = []
[jobs.inherits]
"""
    own, inherits = parsed(text).jobs
    assert (own.command, own.shell) == ((), "echo")
    assert own.timeout is None
    assert dict(own.env) == {"A": "1", "B": "2", "C": "2"}
    assert dict(own.labels) == {"team": "x", "owner": "y"}
    assert (own.limits.memory, own.limits.pids) == (64 * 2**20, 20)
    assert own.mounts == ()
    assert own.cap_add == ("CHOWN",)
    assert inherits.argv == ("default",)
    assert inherits.timeout == 10.0
    assert inherits.limits.pids == 10
    assert inherits.mounts == (Mount("tmpfs", "/d"),)


def test_labels_of_security_modules_are_taken_as_they_are_and_lifted_by_an_empty_one() -> None:
    label, files = "system_u:system_r:job_t:s0:c1,c2", "system_u:object_r:job_file_t:s0"
    text = f"""
[defaults]
command = ["true"]
[defaults.security]
apparmor = ":ns:profile//hat with {{braces}}"
selinux_mount = "{files}"
[jobs.a.security]
selinux = "{label}"
[jobs.b.security]
apparmor = ""
selinux_mount = ""
"""
    found = [(job.apparmor, job.selinux, job.selinux_mount) for job in parsed(text).jobs]
    assert found == [(":ns:profile//hat with {braces}", label, files), (None, None, None)]


@pytest.mark.parametrize(
    "security, kept",
    [
        ("", ()),
        ('cap_add = ["NET_RAW"]', ("NET_RAW",)),
        ('cap_add = ["NET_RAW", "CHOWN"]\ncap_drop = ["ALL"]', ("CHOWN", "NET_RAW")),
        ('cap_add = ["NET_RAW", "CHOWN"]\ncap_drop = ["CAP_NET_RAW"]', ("CHOWN",)),
        ('cap_drop = ["SYS_ADMIN"]', ()),
    ],
)
def test_job_keeps_what_is_added_and_not_dropped(security: str, kept: tuple[str, ...]) -> None:
    assert only_job(f'[jobs.a]\ncommand = ["x"]\n[jobs.a.security]\n{security}').cap_add == kept


def test_capabilities_that_a_job_may_name_are_those_that_can_be_given() -> None:
    assert NUMBERS.keys() == ALLOWED_CAPABILITIES


@pytest.mark.parametrize(
    "line, field, value",
    [
        ("user = 0", "user", "0"),
        ('user = "www-data"', "user", "www-data"),
        ('stop_signal = "term"', "stop_signal", 15),
        ("stop_signal = 10", "stop_signal", 10),
        ("timeout = 2", "timeout", 2.0),
        ('shell = "${jobs} {{index}} {print $1}"', "shell", "${jobs} {{index}} {print $1}"),
        ('hostname = "db_1.example"', "hostname", "db_1.example"),
        ("timeout = 0.5", "timeout", 0.5),
    ],
)
def test_other_ways_to_write_a_value(line: str, field: str, value: object) -> None:
    command = "" if line.startswith("shell") else 'command = ["x"]\n'
    assert getattr(only_job(f"[jobs.a]\n{command}{line}"), field) == value


def test_file_is_loaded_with_paths_relative_to_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "jobs.toml").write_bytes('\ufeff[jobs.a]\r\ncommand = ["cat"]\r\nstdin = "in.txt"\r\n'.encode())
    monkeypatch.chdir("/")
    config = load_config(base / "jobs.toml", machine=MACHINE)
    assert config.jobs[0].stdin == f"{base}/in.txt"
    assert config.file == f"{base}/jobs.toml"


def test_overrides_count_as_if_the_file_had_said_so() -> None:
    config = parsed(
        '[jobs."a.b"]\ncommand = ["x"]\n',
        overrides=[
            'jobs."a.b".limits.memory=64MiB',
            'jobs."a.b".command=["y", "z"]',
            'jobs."a.b".env.A=b=c',
            'jobs."a.b".user="7"',
            "supervisor.max_parallel = 3",
            "defaults.timeout=2",
        ],
    )
    (job,) = config.jobs
    assert job.limits.memory == 64 * 2**20
    assert job.command == ("y", "z")
    assert job.env == (("A", "b=c"),)
    assert (job.user, job.timeout) == ("7", 2.0)
    assert config.supervisor.max_parallel == 3


def test_only_keeps_the_named_jobs_in_the_order_of_the_file() -> None:
    text = "".join(f'[jobs.{name}]\ncommand = ["true"]\n' for name in "abc")
    assert [job.name for job in parsed(text, only=["c", "a"]).jobs] == ["a", "c"]


def test_host_device_is_accepted_where_devices_are_not_checked() -> None:
    text = '[jobs.a]\ncommand = ["x"]\nlimits.io_read_bps = { "/dev/nope" = 1 }'
    assert only_job(text).limits.io_read_bps == (("/dev/nope", 1),)


def test_job_from_a_mapping_is_checked_as_one_from_a_file(base: Path) -> None:
    job = job_from_mapping(
        "run",
        {"image": "mine", "command": ("echo", "hi"), "limits": {"memory": "64MiB"}, "stdin": Path("in.txt")},
        images={"mine": {"dir": base / "rootfs"}},
        base_dir=str(base),
        machine=MACHINE,
    )
    assert job == JobSpec(
        name="run",
        command=("echo", "hi"),
        image=ImageSpec("mine", "dir", f"{base}/rootfs"),
        stdin=f"{base}/in.txt",
        limits=Limits(memory=64 * 2**20),
    )


def test_mistakes_in_a_mapping_have_no_line() -> None:
    with pytest.raises(ConfigError) as caught:
        job_from_mapping("run", {"comand": ["x"], "limits": {"memory": 1}}, machine=MACHINE)
    assert str(caught.value).split("\n") == [
        "job: limits.memory: must be at least 1 MiB, not 1",
        "job: comand: unknown key (did you mean `command`?)",
    ]


def test_supervisor_from_a_mapping() -> None:
    assert supervisor_from_mapping({"max_parallel": 3, "max_memory": "1GiB"}, machine=MACHINE) == SupervisorConfig(
        3, 2**30, "/var/lib/diyc", "/run/diyc"
    )
    with pytest.raises(ConfigError, match=r"^supervisor: max_paralel: unknown key"):
        supervisor_from_mapping({"max_paralel": 3}, machine=MACHINE)


# The JSON Schema


def test_schema_accepts_what_the_parser_accepts() -> None:
    validator = Draft202012Validator(json_schema())
    Draft202012Validator.check_schema(json_schema())
    for text in (EVERYTHING, '[jobs.a]\nshell = "true"\nuser = 5\ntimeout = 2.5\nlimits.cpus = "none"'):
        assert [error.message for error in validator.iter_errors(tomllib.loads(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        "[supervisor]",
        "[jobs.a]\ncommand = 'x'",
        "[jobs.a]\ntimout = 1",
        "[jobs.a]\ntimeout = 'soon'",
        "[jobs.a]\nlimits.memory = '64Mb'",
        "[jobs.a]\nlimits.pids = 0",
        "[jobs.a]\nlimits.cpuset = 'all'",
        "[jobs.a]\nmounts = [{ type = 'nfs', target = '/x' }]",
        "[jobs.a]\nmounts = [{ type = 'tmpfs' }]",
        "[supervisor]\nenforce = 'maybe'\n[jobs.a]",
    ],
)
def test_schema_refuses_what_the_parser_refuses(text: str) -> None:
    assert not Draft202012Validator(json_schema()).is_valid(tomllib.loads(text))


def schema_keys(schema: dict[str, Any], definition: dict[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """Each key of the file with its schema, as supervisor.reuse, jobs.*.limits.memory."""
    keys = {}
    for name, field in definition.get("properties", {}).items():
        keys[path + name] = field
        inner = field.get("additionalProperties") or field.get("items") or field
        star = ".*" if isinstance(field.get("additionalProperties"), dict) else ""
        if isinstance(inner, dict) and "$ref" in inner:
            target = schema["$defs"][inner["$ref"].rpartition("/")[2]]
            keys |= schema_keys(schema, target, f"{path}{name}{star}.")
    return keys


def test_every_key_has_a_description_and_none_a_null_default() -> None:
    schema = json_schema()
    keys = schema_keys(schema, schema)
    assert len(keys) > 100
    assert [key for key, field in keys.items() if not field.get("description") or "default" in field] == []


def test_schema_tells_what_is_not_built() -> None:
    schema = json_schema()
    keys = schema_keys(schema, schema)
    marked = {key for key, field in keys.items() if "Not built yet" in field["description"]}
    assert {key for key in marked if key.startswith("jobs.")} == {key for key in BUILT if key.startswith("jobs.")}
    assert '(Not built yet but for "none", "loopback".)' in keys["jobs.*.network.mode"]["description"]
    assert "but for false" in keys["jobs.*.tty"]["description"]


def test_the_reference_names_every_key_that_is_built() -> None:
    schema = json_schema()
    partly = {"supervisor.rootfs_driver", "jobs.*.network.mode"}
    refused = {key.removesuffix(".*") for key in BUILT.keys() - partly} | {"jobs.*.artifacts"}
    built = {
        key
        for key in schema_keys(schema, schema)
        if not key.startswith("defaults.") and not any(f"{key}.".startswith(f"{other}.") for other in refused)
    }
    assert len(built) > 60
    assert {key for key in built if key not in documented_keys()} == set()


def documented_keys() -> set[str]:
    """The keys of the tables in docs/jobs-toml.md, each below the headings it stands under."""
    found, top, table = set(), "", ""
    for line in (ROOT / "docs" / "jobs-toml.md").read_text().split("\n"):
        names = re.findall(r"`\[?([a-zA-Z_0-9.]+)\]?`", line)
        if line.startswith("## "):
            tables = [name.replace(".NAME", ".*") for name in names]
            found |= {name.removesuffix(".*") for name in tables}
            top = table = f"{tables[0]}." if tables else ""
        elif line.startswith("### "):
            table = f"{top}{names[0]}."
        elif line.startswith("| `"):
            found |= {table + name for name in re.findall(r"`([a-z_0-9]+)`", line.split("|")[1])}
    return found


def test_examples_of_the_reference_are_valid(base: Path) -> None:
    (base / "py312.tar.zst").write_text("")
    (base / "data").mkdir()
    examples = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "jobs-toml.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        assert parsed(example, base).jobs


# Any text


@given(st.text())
def test_any_text_gives_a_config_or_config_errors(text: str) -> None:
    handled(lambda: parsed(text), text.count("\n") + 1)


PIECES = """
[ ] [[ ]] { } = , . \n # " ' \"\"\" ''' jobs jobs.a defaults supervisor images.i limits command shell mounts env memory
timeout count 1 -1 1.5 true nan "64MiB" "10s" ["true"] [] {} 1979-05-27 "{index}" "{indx}" hostname user type="tmpfs"
""".split(" ")


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES)).map(" ".join))
def test_any_mixture_of_toml_gives_a_config_or_config_errors(text: str) -> None:
    handled(lambda: parsed(text), text.count("\n") + 1)


KEYS = sorted({key.rpartition(".")[2] for key in schema_keys(json_schema(), json_schema())} | {"x", "a b", "\0", ""})
VALUES = st.recursive(
    st.none().flatmap(lambda _: st.sampled_from(["64MiB", "10s", "host", "none", "/x", "{index}", "\0", "ALL"]))
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_any_table_as_a_job_gives_a_job_or_config_errors(job: dict[str, Any]) -> None:
    handled(lambda: job_from_mapping("a", job, base_dir="/nowhere", machine=MACHINE))


@given(st.lists(st.text(), max_size=3))
def test_any_override_gives_a_config_or_config_errors(overrides: list[str]) -> None:
    handled(lambda: parsed('[jobs.a]\ncommand = ["true"]', overrides=overrides), 2)


def handled(make: Callable[[], object], last_line: int = 0) -> None:
    problems = problems_of(make)
    assert problems is None or problems != []
    for problem in problems or ():
        assert "\n" not in str(problem)
        assert problem.line is None or 1 <= problem.line <= last_line


def problems_of(make: Callable[[], object]) -> list[Problem] | None:
    try:
        make()
    except ConfigError as error:
        return error.problems
    return None


# Lines

LINES = """\
top = 1
[ a . "b c" ]   # comment with [ and "
x.y = { p = 1, 'q' = [ 1,
  2 ], r.s = 3 }
text = '''
[not.a.table]
k = 1'''
z = [ # first
  # nothing
  { one = 1 },

  "two", ]
[[t]]
k = "\\"#"
[t.sub]
k = 2
[[t]]
k = 3
[[t.deep]]
k = 4
[a]
late = 1979-05-27 07:32:00
"q\\u0061" = 5
"""


@pytest.mark.parametrize(
    "path, line",
    [
        (("top",), 1),
        (("a",), 2),
        (("a", "b c"), 2),
        (("a", "b c", "x", "y"), 3),
        (("a", "b c", "x", "y", "p"), 3),
        (("a", "b c", "x", "y", "q", 0), 3),
        (("a", "b c", "x", "y", "q", 1), 4),
        (("a", "b c", "x", "y", "r", "s"), 4),
        (("a", "b c", "text"), 5),
        (("a", "b c", "z"), 8),
        (("a", "b c", "z", 0, "one"), 10),
        (("a", "b c", "z", 1), 12),
        (("t", 0, "k"), 14),
        (("t", 0, "sub", "k"), 16),
        (("t", 1), 17),
        (("t", 1, "k"), 18),
        (("t", 1, "deep", 0, "k"), 20),
        (("a", "late"), 22),
        (("a", "qa"), 23),
        (("a", "b c", "missing", "below"), 2),
        (("nowhere",), None),
        ((), None),
    ],
)
def test_line_of_each_key_is_found(path: tuple[str | int, ...], line: int | None) -> None:
    tomllib.loads(LINES)
    assert Lines(LINES).of(path) == line


@given(
    st.lists(st.text(alphabet="ab\"'\\#[]{}=., \né", max_size=12), min_size=1, max_size=6),
    st.sampled_from(["basic", "array", "inline", "literal"]),
)
def test_line_is_right_whatever_strings_stand_before(values: list[str], style: str) -> None:
    text, expected = "", {}
    for index, value in enumerate(values):
        expected[("t", f"k{index}")] = text.count("\n") + 2
        text += f"k{index} = {written(value, style)}\n"
    tomllib.loads(f"[t]\n{text}")
    lines = Lines(f"[t]\n{text}")
    assert {path: lines.of(path) for path in expected} == expected


def written(value: str, style: str) -> str:
    basic = '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    multi = '"""' + value.replace("\\", "\\\\").replace('"', '\\"') + '"""'
    if style == "literal" and "'" not in value:
        return f"'''{value}'''"
    return {"array": f"[\n{basic}, # ]\n{multi} ]", "inline": f"{{ a = {basic}, b.c = {multi} }}"}.get(style, basic)


@pytest.mark.parametrize(
    "text, parts",
    [("a", ("a",)), (" a . b ", ("a", "b")), ("a.\"b.c\".'d e'", ("a", "b.c", "d e")), ('"\\u0061"', ("a",))],
)
def test_key_of_an_override_is_read_as_toml_does(text: str, parts: tuple[str, ...]) -> None:
    assert parse_key(text) == parts


@pytest.mark.parametrize("text", ["", "a.", ".a", "a b", "a[0]", '"a', '"\\x"', "é"])
def test_what_is_not_a_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_key(text)
