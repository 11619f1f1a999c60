"""diyc runs many short-lived jobs, each in a container of its own, on one Linux machine.

    from diyc import Job, Supervisor

The names are loaded on first use, so that `import diyc` and `diyc --version` cost nothing."""

TYPE_CHECKING = False  # typing's own would load typing; type checkers know the name
if TYPE_CHECKING:
    from diyc.api import Job
    from diyc.results import Result, Verdict
    from diyc.supervisor import Supervisor

__version__ = "0.1.0"
__all__ = ["Job", "Result", "Supervisor", "Verdict", "__version__"]

_HOME = {
    "Job": ("diyc.api", "Job"),
    "Result": ("diyc.results", "Result"),
    "Supervisor": ("diyc.supervisor", "Supervisor"),
    "Verdict": ("diyc.results", "Verdict"),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
