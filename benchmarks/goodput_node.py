"""A node of the warm pool: it takes its share of the processor, imports, waits until it is told, and becomes the node.

    python goodput_node.py PLACE GO MODULES [PYTHON [-P]] -m MODULE ARGUMENT...

PLACE is a file for its process id, in a cgroup; GO is a file for whose existence it waits; both may be empty. MODULES
are imported first, separated by commas. Then MODULE runs in this same process, like `python -m`. One JSON line
on standard output says when the imports were done, and how many seconds they took.
"""

import datetime
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Final

WARM: Final = "warm"
"""The name of the event when a node has imported."""
_POLL_S: Final = 0.02
_IMPORT_TIMEOUT_S: Final = 120.0


def main() -> None:
    """Warm up, wait, become the node."""
    place, go, modules = sys.argv[1:4]
    if place:
        Path(place).write_text(str(os.getpid()))
    began_s = time.monotonic()
    # Part of the warming: the module that imports the others has imports of its own.
    from elastic_pt.workers.forking import import_once

    import_once(modules.split(","), threads=1, timeout_s=_IMPORT_TIMEOUT_S)
    line = {
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
        "event": WARM,
        "import_s": round(time.monotonic() - began_s, 3),
    }
    print(json.dumps(line), flush=True)
    # A file rather than a signal: a process that was stopped by SIGSTOP could not be told apart from a hung one.
    while go and not Path(go).exists():
        time.sleep(_POLL_S)
    command = sys.argv[sys.argv.index("-m", 4) + 1 :]
    sys.argv[:] = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
