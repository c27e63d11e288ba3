"""Patches a module of the product at the moment it has been imported. In the agents of a test run."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Final

VARIABLE: Final = "ELASTIC_PT_PLANTED_BUG"
_SITE: Final = Path(__file__).parent / "site"
_ROOT: Final = Path(__file__).parents[2]

Patch = Callable[[ModuleType], None]


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Agents that are started meanwhile have this bug."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_SITE), str(_ROOT), before])
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before
        del os.environ[VARIABLE]


def plant(name: str) -> None:
    """Patch the module of a bug when this process imports it."""
    from chaos_tests.planted.bugs import BUGS

    bug = BUGS[name]
    sys.meta_path.insert(0, _Finder(bug.module, bug.patch))


class _Finder(MetaPathFinder):
    """Finds one module as Python would, and patches it after its import."""

    def __init__(self, module: str, patch: Patch) -> None:
        self._module = module
        self._patch = patch

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._module:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                assert spec.loader is not None
                spec.loader = _Loader(spec.loader, self._patch)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader, patch: Patch) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)
