"""`python -m elastic_pt` is the command line."""

import os
import sys

# Python puts the working directory first, where a user's `random.py` would be taken for the standard library's.
# Last, it still serves a checkout that is not installed.
_HERE = ["", "."]
try:  # noqa: SIM105 - contextlib itself could come from the working directory
    _HERE.append(os.getcwd())
except FileNotFoundError:
    pass
sys.path[:] = [
    *(path for path in sys.path if path not in _HERE),
    *(path for path in sys.path if path in _HERE),
]

from elastic_pt.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
