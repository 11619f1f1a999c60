"""What `from diyc import ...` offers beside the Supervisor: a job from keyword arguments."""

from __future__ import annotations

import os
from typing import Any

from diyc.config import job_from_mapping
from diyc.jobs import JobSpec


def Job(name: str = "job", *, image: str = "host", **keys: Any) -> JobSpec:
    """A job with the keys of a [jobs.NAME] table, checked by the same rules: Job(command=["true"], timeout="5s").

    `image` is "host", a directory or a tar file. Raises ConfigError naming every key that is wrong."""
    return job_from_mapping(name, {"image": _image_name(image), **keys}, images=_images(image))


def _image_name(image: str) -> str:
    return "host" if image == "host" else "image"


def _images(image: str) -> dict[str, dict[str, str]]:
    if image == "host":
        return {}
    path = os.path.abspath(image)
    return {"image": {"dir" if os.path.isdir(path) else "tar": path}}
