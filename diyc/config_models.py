"""The shape of jobs.toml as pydantic models: every key of the file, its type and what it is for.

A key left out is not in `model_fields_set`: defaults live in the dataclasses that the models are translated
to, so that [defaults] and a job can be merged. The JSON Schema of the file is generated from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diyc.config_values import (
    NO_NUL,
    AddedCapability,
    AppArmorProfile,
    CgroupParent,
    ContainerPath,
    Cpus,
    CpuSet,
    DeviceOperations,
    DeviceRates,
    DroppedCapability,
    Duration,
    EnvName,
    ExistingDirectory,
    ExistingFile,
    ExistingInput,
    ExistingPath,
    HostPath,
    HugePageSize,
    IdRange,
    ImageRef,
    LabelText,
    ListenAddress,
    MemoryBudget,
    MemoryLimit,
    MountTarget,
    Name,
    NonEmpty,
    PathList,
    PidsLimit,
    PositiveDurationOrNone,
    PositiveSize,
    PositiveSizeOrNone,
    SELinuxLabel,
    Sha256,
    Size,
    SizeOrNone,
    StopSignal,
    Template,
    Text,
    TimeOffset,
    User,
)
from diyc.units import quoted


def key(description: str, **more: Any) -> Any:
    """One key of a table; all may be left out."""
    return Field(default=None, description=description, **more)


class Table(BaseModel):
    """A TOML table: unknown keys are errors, and no value is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class SupervisorTable(Table):
    max_parallel: int = key("Jobs running at once. Default: 4 for each usable CPU.", ge=1, le=1_000_000)
    max_memory: MemoryBudget = key("Sum of the running jobs' memory limits. Default: 80 % of RAM.")
    state_dir: HostPath = key("Where images, record and logs are kept.")
    runtime_dir: HostPath = key("Where sockets and scratch space are kept.")
    cgroup_parent: CgroupParent = key("The cgroup of all jobs, below each hierarchy's delegated root.")
    metrics_listen: ListenAddress = key("host:port or unix:/path of the metrics endpoint. Absent: no endpoint.")
    socket: HostPath = key("The control socket.")
    shutdown_grace: Duration = key("How long a shutdown waits for running jobs.")
    enforce: Literal["strict", "best-effort"] = key("Refuse a limit that this host cannot enforce, or warn.")
    reuse: bool = key("Keep kernel objects that a job cannot soil.")
    rootfs_driver: Literal["auto", "overlay", "btrfs", "vfs", "devicemapper", "fuse-overlayfs"] = key(
        "How root filesystems are made."
    )
    id_range: IdRange = key("Host ids for user namespaces, first:count.")


class ImageTable(Table):
    """A named root filesystem; exactly one source."""

    tar: ExistingFile = key("A tarball (plain, gz, xz or zst).")
    dir: ExistingDirectory = key("An unpacked directory, used read-only in place.")
    oci: NonEmpty = key("An OCI image layout directory or archive, with an optional :tag.")
    docker: ExistingFile = key("An archive made by `docker save`.")
    pull: NonEmpty = key("A reference to pull from a registry.")
    sha256: Sha256 = key("The expected digest of the tarball.")


class QueueTable(Table):
    max_parallel: int = key("Jobs of this queue running at once.", ge=1)


class ForeachTable(Table):
    csv: ExistingFile = key("A CSV file with a header; one run a row.")


class RetryTable(Table):
    attempts: int = key("Attempts in all.", ge=1, le=1000)
    delay: Duration = key("Pause before the second attempt.")
    backoff: float = key("What each further pause is multiplied with.", ge=1)
    max_delay: Duration = key("The longest pause.")
    on: list[Text] = key("The verdicts that are tried again.")
    memory_factor: float = key("What the memory limit is multiplied with after an oom.", ge=1)


class LimitsTable(Table):
    memory: MemoryLimit = key('Memory, page cache included; "none" lifts it.')
    swap: SizeOrNone = key('Swap beside the memory; "none" lifts it.')
    cpus: Cpus = key("CPU time a second of wall-clock time, in CPUs.")
    cpu_weight: int = key("Share of the CPU under contention.", ge=1, le=10_000)
    cpuset: CpuSet = key("The CPUs the job may run on.")
    cpu_time: PositiveDurationOrNone = key("CPU time in all.")
    pids: PidsLimit = key("Processes and threads at once.")
    disk: PositiveSizeOrNone = key("What the job may write to its root.")
    output: PositiveSize = key("What is kept of each of stdout and stderr; more ends the job.")
    inline: Size = key("What of the output goes into the result record.")
    nofile: int = key("Open descriptors of a process.", ge=3, le=1_048_576)
    core: Size = key("Size of a core file.")
    io_read_bps: DeviceRates = key("Bytes a second read from each device.")
    io_write_bps: DeviceRates = key("Bytes a second written to each device.")
    io_read_iops: DeviceOperations = key("Reads a second from each device.")
    io_write_iops: DeviceOperations = key("Writes a second to each device.")
    io_weight: int = key("Share of the disks under contention.", ge=1, le=10_000)
    hugetlb: dict[HugePageSize, Size] = key("Huge pages, in bytes for each page size.")


class NetworkTable(Table):
    mode: Literal["none", "loopback", "bridge", "host"] = key("What network the job sees.")
    ports: list[NonEmpty] = key("Published ports.")
    allow: list[NonEmpty] = key("Where the job may connect to.")
    dns: list[NonEmpty] = key("Name servers.")
    ip: Text = key("The job's address.")


class MountTable(Table):
    type: Literal["bind", "tmpfs"] = Field(description="A host path, or a file system in memory.")
    target: MountTarget = Field(description="Where it appears in the container.")
    source: ExistingPath = key("The host path of a bind mount.")
    read_only: bool = key("Refuse writes.")
    size: PositiveSize = key("The size of a tmpfs.")


class SecurityTable(Table):
    user_namespace: bool = key("Map root inside to an unprivileged id outside.")
    no_new_privs: bool = key("setuid programs have no effect.")
    cap_add: list[AddedCapability] = key("Capabilities the job keeps.")
    cap_drop: list[DroppedCapability] = key('Capabilities taken from cap_add again; "ALL" (the default) takes none.')
    seccomp: NonEmpty = key("System call filter: a profile's name or path.")
    landlock: NonEmpty = key("Landlock rules.")
    apparmor: AppArmorProfile = key("The AppArmor profile that the job runs in.")
    selinux: SELinuxLabel = key("The SELinux label that the job runs with.")
    selinux_mount: SELinuxLabel = key("The SELinux label of what the job writes.")
    devices: list[NonEmpty] = key("Devices beyond the usual ones.")
    masked_paths: PathList = key("Paths hidden from the job.")
    read_only_paths: PathList = key("Paths the job may only read.")
    time_offset: TimeOffset = key("What the job's monotonic clock is off by.")


class ArtifactTable(Table):
    source: Template = Field(description="Where the file comes from.")
    target: Template = Field(description="Where it goes.")


class ArtifactsTable(Table):
    into: list[ArtifactTable] = key("Files put into the container before the start.", alias="in")
    out: list[ArtifactTable] = key("Files taken from the container after the end.")


class JobTable(Table):
    image: ImageRef = key('The root filesystem: the name of an image, or "host".')
    command: Annotated[list[Template], Field(min_length=1)] = key("The program and its arguments.")
    shell: Annotated[Template, Field(min_length=1)] = key("Instead of command: a script for /bin/sh -c.")
    env: dict[EnvName, Template] = key("The environment beside PATH, HOME, HOSTNAME and DIYC_*.")
    env_file: ExistingFile = key("A file of KEY=VALUE lines; `env` overrides it.")
    workdir: ContainerPath = key("The directory the job starts in.")
    user: User = key('Who the job runs as inside the container: a name, a uid or "uid:gid".')
    hostname: Annotated[Template, Field(min_length=1)] = key("The host name the job sees.")
    stdin: ExistingInput = key("A file; absent: /dev/null.")
    tty: bool = key("Give the job a terminal.")
    warm: int = key("Sandboxes kept ready.", ge=0)
    init: bool = key("Run a tiny PID 1 above the job.")
    writable: bool = key("Writes to the root work, and vanish with the job.")
    timeout: PositiveDurationOrNone = key("Wall-clock time; then the job is stopped.")
    stop_signal: StopSignal = key("The signal that asks the job to stop.")
    stop_timeout: Duration = key("How long after stop_signal KILL follows.")
    count: int = key("That many runs, told apart by {index} and DIYC_INDEX.", ge=1, le=1_000_000)
    matrix: dict[NonEmpty, list[Any]] = key("One run for each combination.")
    foreach: ForeachTable = key("One run for each row of a file.")
    fail_fast: bool = key("A failed run cancels the job's other runs.")
    max_parallel: int = key("Runs of this job at once.", ge=1, le=1_000_000)
    depends_on: list[Name] = key("Jobs that must succeed first.")
    priority: int = key("Higher starts first.", ge=-1_000_000, le=1_000_000)
    queue: Name = key("The queue the job waits in.")
    restart: Literal["no", "on-failure", "always"] = key("Whether the job is a service.")
    retry: RetryTable = key("When and how a failed run is tried again.")
    labels: dict[Annotated[NonEmpty, LabelText], LabelText] = key("Words of your own, copied to results.")
    limits: LimitsTable = key("What a run may use.")
    network: NetworkTable = key("The network a run sees.")
    mounts: list[MountTable] = key("Host paths and memory file systems in the container.")
    security: SecurityTable = key("What a run may do.")
    artifacts: ArtifactsTable = key("Files put in before and taken out after a run.")


class Document(Table):
    """The whole file."""

    supervisor: SupervisorTable = key("The supervisor's own settings.")
    defaults: JobTable = key("Any job key; merged under every job.")
    images: dict[Name, ImageTable] = key("Named root filesystems.")
    networks: dict[Name, dict[str, Any]] = key("Named networks.")
    queues: dict[Name, QueueTable] = key("Named queues.")
    jobs: dict[Name, JobTable] = key("The jobs, started in the order of the file.")


# What of the models is built: a key (or a value of it) beyond this is refused by name. A key that is missing here
# is built; an empty tuple means that any mention is refused. `jobs.*` holds for [defaults] as well.
BUILT: dict[str, tuple[object, ...]] = {
    "supervisor.socket": (),
    "supervisor.rootfs_driver": ("auto", "overlay"),
    "images.*.oci": (),
    "images.*.docker": (),
    "images.*.pull": (),
    "networks.*": (),
    "queues.*": (),
    "jobs.*.tty": (False,),
    "jobs.*.warm": (0,),
    "jobs.*.init": (False,),
    "jobs.*.matrix": ({},),
    "jobs.*.foreach": ({},),
    "jobs.*.fail_fast": (False,),
    "jobs.*.depends_on": ([],),
    "jobs.*.queue": ("default",),
    "jobs.*.restart": ("no",),
    "jobs.*.retry": ({},),
    "jobs.*.artifacts.in": ([],),
    "jobs.*.artifacts.out": ([],),
    "jobs.*.limits.cpu_time": ("none",),
    "jobs.*.network.mode": ("none", "loopback"),
    "jobs.*.network.ports": ([],),
    "jobs.*.network.allow": ([],),
    "jobs.*.network.dns": ([],),
    "jobs.*.network.ip": ("",),
    "jobs.*.security.user_namespace": (True,),
    "jobs.*.security.no_new_privs": (True,),
    "jobs.*.security.seccomp": ("none",),
    "jobs.*.security.landlock": ("none",),
    "jobs.*.security.devices": ([],),
    "jobs.*.security.masked_paths": ([], "none"),
    "jobs.*.security.read_only_paths": ([], "none"),
    "jobs.*.security.time_offset": (0, "0", "0s"),
}


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of jobs.toml, for editors; keys that are not built yet say so."""
    schema: dict[str, Any] = _tidy(Document.model_json_schema(by_alias=True))
    for path in BUILT:
        _mark_not_built(path, schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "diyc jobs.toml",
        "required": ["jobs"],
    }


def _tidy(node: Any) -> Any:
    """The schema as an editor wants it: no null defaults (a key may be left out, but not be null), no titles made
    from names, no pattern that only keeps NUL out; references and open tables spelt as pydantic 2.9 does and after."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "properties" in node:
        return {
            **{key: _tidy(value) for key, value in node.items() if key not in ("properties", "title")},
            "properties": {key: _tidy(value) for key, value in node["properties"].items()},
        }
    tidy = {key: _tidy(value) for key, value in node.items() if key != "title"}
    if tidy.get("default", ...) is None:
        del tidy["default"]
    if tidy.get("pattern") == NO_NUL:
        del tidy["pattern"]
    if len(tidy.get("allOf", ())) == 1:
        tidy |= tidy.pop("allOf")[0]
    if "patternProperties" in tidy:
        ((pattern, tidy["additionalProperties"]),) = tidy.pop("patternProperties").items()
        if pattern != NO_NUL:
            tidy["propertyNames"] = {"pattern": pattern}
    return tidy


def _mark_not_built(path: str, schema: dict[str, Any]) -> None:
    here = described = schema
    for part in path.split("."):
        described = here["additionalProperties"] if part == "*" else here["properties"][part]
        here = schema["$defs"][described["$ref"].rpartition("/")[2]] if "$ref" in described else described
    accepted = [quoted(value) for value in BUILT[path] if value not in ({}, [], "")]
    exception = f" but for {', '.join(accepted)}" if accepted else ""
    described["description"] = f"{described.get('description', '')} (Not built yet{exception}.)".strip()
