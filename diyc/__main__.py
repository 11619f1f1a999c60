"""`python -m diyc` is `diyc`."""

import sys

from diyc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
