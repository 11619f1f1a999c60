from collections.abc import Sequence

STEP_NAMES: tuple[str, ...]
MARK_COUNT: int

class Plan:
    def __init__(
        self, steps: Sequence[tuple[object, ...]], clone_flags: int, registers: int, spawner_steps: int = 0
    ) -> None: ...

class Spawner:
    def __init__(self, threads: int, scratch: str) -> None: ...
    def submit(
        self,
        plan: Plan,
        token: int,
        descriptors: Sequence[int],
        argv: Sequence[str],
        envp: Sequence[str],
        paths: Sequence[str],
        id_map: str | None,
        oom_score_adj: str | None,
        cgroup_fd: int,
        /,
    ) -> None: ...
    def completions(self) -> list[tuple[int, int, int, bool, int, int, int, int, tuple[int, ...]]]: ...
    def kill(self, token: int, /) -> bool: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

def user_namespace(id_map: str, /) -> int: ...
def tree(path: str, attributes: int = 0, userns: int = -1, recursive: bool = False, follow: bool = False) -> int: ...
