"""No bytes from outside become code: what would do that is not used, but at named places."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import elastic_pt

PACKAGE: Final = Path(elastic_pt.__file__).parent
MODULES: Final = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
    "code",
}
NAMES: Final = {"eval", "exec", "compile", "__import__"}
CALLS: Final = {
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.export.load",
    "np.load",
    "numpy.load",
    "os.system",
    "os.popen",
    "importlib.import_module",
    "safe_pickle.load",
}
ALLOWED: Final = {
    (
        "workers/forking.py",
        "exec",
    ): "the start command that multiprocessing itself made in this process: see `_start_server`",
    (
        "workers/forking.py",
        "importlib.import_module",
    ): "modules that the agent names in its own code",
}
"""By file and name: why what it runs cannot come from outside."""


def dotted(node: ast.expr) -> str:
    """The name of what is called; empty for anything but names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def dangers(source: str) -> Iterator[str]:
    """What a module uses that can turn bytes into code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield node.module or ""
            names = [f"{node.module}.{each.name}" for each in node.names]
            yield from (each for each in names if each in CALLS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in NAMES | CALLS:
                yield name
            for each in node.keywords:
                value = each.value
                if each.arg in ("allow_pickle", "shell") and getattr(value, "value", True):
                    yield each.arg
        elif isinstance(node, ast.Attribute) and node.attr in (
            "recv_object_list",
            "broadcast_object_list",
            "all_gather_object",
            "gather_object",
            "scatter_object_list",
        ):
            # torch.distributed unpickles what another worker sends.
            yield node.attr


def test_nothing_turns_bytes_into_code() -> None:
    """No module unpickles, evaluates or executes data, but the named ones; and each named one still does."""
    found = {
        (path.relative_to(PACKAGE).as_posix(), danger)
        for path in PACKAGE.rglob("*.py")
        for danger in dangers(path.read_text("utf-8"))
    }
    assert found == set(ALLOWED)


def test_the_walk_finds_each_danger() -> None:
    """The test above would see them."""
    for line in (
        "import pickle",
        "from marshal import loads",
        "import yaml.loader",
        "eval(x)",
        "exec(x)",
        "torch.load(x)",
        "from torch import load",
        "np.load(x, allow_pickle=True)",
        "f(allow_pickle=y)",
        "subprocess.run(x, shell=True)",
        "dist.all_gather_object(a, b)",
    ):
        assert list(dangers(line)), line
    assert not list(dangers("np.memmap(x); re.compile(y); f(allow_pickle=False)"))


READ_A_RUN: Final = """
import sys
from pathlib import Path

seen = []
watching = False


def hook(event, arguments):
    if watching and event in ("pickle.find_class", "marshal.loads", "code.__new__", "exec", "compile"):
        caller = sys._getframe(1)
        files = set()
        while caller is not None:
            files.add(caller.f_code.co_filename)
            caller = caller.f_back
        # An import executes code of installed files.
        if not any(each.startswith("<frozen importlib") for each in files):
            seen.append((event, str(arguments)[:200]))


from elastic_pt.cli import run_command_line
for command in (["status", RUN], ["log", RUN, "--explain"], ["checkpoints", RUN], ["goodput", RUN], ["digest", RUN]):
    run_command_line(command)  # imports what it needs
sys.addaudithook(hook)
watching = True
for command in (["status", RUN], ["log", RUN, "--explain"], ["checkpoints", RUN], ["goodput", RUN], ["digest", RUN]):
    assert run_command_line(command) == 0, command
watching = False
pickled = [each for each in seen if each[0] in ("pickle.find_class", "marshal.loads")]
assert pickled == [], pickled
print("watched")
"""


def test_reading_a_run_unpickles_nothing() -> None:
    """An audit hook of Python sees no unpickling while the commands read a stored run and its checkpoints."""
    (run,) = [each.parent for each in (Path(__file__).parent / "stored_run").rglob("config.toml")]
    script = READ_A_RUN.replace("RUN", repr(f"file://{run}"))
    done = subprocess.run(
        [sys.executable, "-c", script.replace("READ_A_", "")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("watched\n")
