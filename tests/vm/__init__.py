"""The bench: boots Debian's kernels with a Debian userland in QEMU, runs a command of the project inside, and brings
its results back. `python -m tests.vm --help` is the developer's way in, test_*.py the suite's."""
