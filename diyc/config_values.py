"""The kinds of value that jobs.toml knows, as pydantic types: a type, its check, and its JSON Schema."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from diyc.config_checks import (
    ALLOWED_CAPABILITIES,
    CAPABILITIES,
    LAST_ID,
    MOST_PIDS,
    NAME_PATTERN,
    check_absolute,
    check_apparmor,
    check_cgroup_parent,
    check_cpuset,
    check_device,
    check_env_name,
    check_hugetlb_size,
    check_image_ref,
    check_label,
    check_listen_address,
    check_memory,
    check_mount_target,
    check_name,
    check_not_empty,
    check_selinux,
    check_sha256,
    check_template,
    duration_from,
    existing,
    in_base,
    or_none,
    parse_added_capability,
    parse_cpus,
    parse_dropped_capability,
    parse_id_range,
    parse_path_list,
    parse_pids,
    parse_signal,
    parse_time_offset,
    parse_user,
    size_from,
)
from diyc.units import CPUSET_PATTERN, DURATION_PATTERN, SIZE_PATTERN


def _schema(*alternatives: dict[str, Any], **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(alternatives), **more})


_NONE = {"const": "none"}
_SIZE_SCHEMA = ({"type": "integer", "minimum": 0}, {"type": "string", "pattern": SIZE_PATTERN})
_DURATION_SCHEMA = ({"type": "number", "minimum": 0}, {"type": "string", "pattern": DURATION_PATTERN})

NO_NUL = r"^[^\x00]*$"  # nothing that execve, mount or a cgroup is given can carry one
Text = Annotated[str, StringConstraints(pattern=NO_NUL)]
Name = Annotated[Text, AfterValidator(check_name), WithJsonSchema({"type": "string", "pattern": f"^{NAME_PATTERN}$"})]
NonEmpty = Annotated[Text, AfterValidator(check_not_empty)]
Template = Annotated[Text, AfterValidator(check_template)]
EnvName = Annotated[Text, AfterValidator(check_env_name)]
LabelText = Annotated[Text, AfterValidator(check_label)]
ImageRef = Annotated[Text, AfterValidator(check_image_ref)]
Sha256 = Annotated[Text, AfterValidator(check_sha256)]
CgroupParent = Annotated[Text, AfterValidator(check_cgroup_parent)]
ListenAddress = Annotated[Text, AfterValidator(check_listen_address)]

ContainerPath = Annotated[Text, AfterValidator(check_absolute)]
MountTarget = Annotated[Text, AfterValidator(check_mount_target)]
HostPath = Annotated[NonEmpty, AfterValidator(in_base)]
ExistingPath = Annotated[Text, AfterValidator(existing("there", os.path.exists))]
ExistingInput = Annotated[Text, AfterValidator(existing("a file", lambda path: not os.path.isdir(path)))]
ExistingFile = Annotated[Text, AfterValidator(existing("a file", os.path.isfile))]
ExistingDirectory = Annotated[Text, AfterValidator(existing("a directory", os.path.isdir))]
BlockDevice = Annotated[Text, AfterValidator(check_device)]
HugePageSize = Annotated[Text, AfterValidator(check_hugetlb_size)]

Size = Annotated[int, PlainValidator(size_from()), _schema(*_SIZE_SCHEMA)]
PositiveSize = Annotated[int, PlainValidator(size_from(1)), _schema(*_SIZE_SCHEMA)]
SizeOrNone = Annotated[int | None, PlainValidator(or_none(size_from())), _schema(*_SIZE_SCHEMA, _NONE)]
PositiveSizeOrNone = Annotated[int | None, PlainValidator(or_none(size_from(1))), _schema(*_SIZE_SCHEMA, _NONE)]
MemoryBudget = Annotated[int, PlainValidator(size_from(1024**2)), _schema(*_SIZE_SCHEMA)]
MemoryLimit = Annotated[
    int | None,
    PlainValidator(or_none(size_from(1024**2))),
    AfterValidator(check_memory),
    _schema(*_SIZE_SCHEMA, _NONE),
]
Duration = Annotated[float, PlainValidator(duration_from()), _schema(*_DURATION_SCHEMA)]
PositiveDuration = Annotated[float, PlainValidator(duration_from(0.001)), _schema(*_DURATION_SCHEMA)]
PositiveDurationOrNone = Annotated[
    float | None, PlainValidator(or_none(duration_from(0.001))), _schema(*_DURATION_SCHEMA, _NONE)
]
TimeOffset = Annotated[
    float,
    PlainValidator(parse_time_offset),
    _schema({"type": "number"}, {"type": "string", "pattern": f"^-?{DURATION_PATTERN[1:]}"}),
]
Cpus = Annotated[
    float | None,
    PlainValidator(or_none(parse_cpus)),
    _schema({"type": "number", "minimum": 0.01, "maximum": 8192}, _NONE),
]
CpuSet = Annotated[Text, AfterValidator(check_cpuset), WithJsonSchema({"type": "string", "pattern": CPUSET_PATTERN})]
PidsLimit = Annotated[
    int | None,
    PlainValidator(or_none(parse_pids)),
    _schema({"type": "integer", "minimum": 1, "maximum": MOST_PIDS}, _NONE),
]
DeviceRates = dict[BlockDevice, PositiveSize]
DeviceOperations = dict[BlockDevice, Annotated[int, Field(ge=1)]]
StopSignal = Annotated[
    int,
    PlainValidator(parse_signal),
    _schema({"type": "integer", "minimum": 1, "maximum": int(signal.SIGRTMAX)}, {"type": "string"}),
]
User = Annotated[
    str,
    PlainValidator(parse_user),
    _schema({"type": "integer", "minimum": 0, "maximum": LAST_ID}, {"type": "string"}),
]
IdRange = Annotated[
    tuple[int, int], PlainValidator(parse_id_range), WithJsonSchema({"type": "string", "pattern": "^[0-9]+:[0-9]+$"})
]
AddedCapability = Annotated[
    str,
    PlainValidator(parse_added_capability),
    WithJsonSchema({"type": "string", "examples": sorted(ALLOWED_CAPABILITIES)}),
]
AppArmorProfile = Annotated[Text, AfterValidator(check_apparmor)]
SELinuxLabel = Annotated[Text, AfterValidator(check_selinux)]
DroppedCapability = Annotated[
    str,
    PlainValidator(parse_dropped_capability),
    WithJsonSchema({"type": "string", "examples": ["ALL", *sorted(CAPABILITIES)]}),
]
PathList = Annotated[
    object,
    PlainValidator(parse_path_list),
    _schema({"enum": ["default", "none"]}, {"type": "array", "items": {"type": "string"}}),
]
