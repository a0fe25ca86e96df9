"""Modules that helpers are started from, as they were when the host started: a package upgrade does not change them.

An upgrade replaces the files under a running host. A zygote that started from the new ones would speak other messages
than its supervisor, and might hold an engine that the images of this host do not fit. So the host keeps every file of
these packages open, and helpers import them through a directory of links to its descriptors. An open file remains as
it was when another takes its name, as dpkg and pip do it; nothing is copied, neither to memory nor to the disk.
"""

import contextlib
import errno
import importlib.util
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    "agent",
    "fleet",
    "fleet.protocol",
    "fleet.component",
    "httptools",
    "msgspec",
    "pyseccomp",
    "wasmtime",
)
"""Packages that helpers import besides Python's own library."""

_APART: Final = frozenset({"agent.identity", "agent.link", "agent.report", "agent.update"})
"""Parts of the agent, which no helper imports."""

_TOP_ONLY: Final = frozenset({"fleet"})
"""Packages of which helpers need no more than the parts named above."""


class PinnedModules:
    """Open files of the host's own version, and the directory from which its helpers import them."""

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._descriptors: list[int] = []

    def pin(self, directory: Path) -> None:
        """Open the files, make the links in `directory`, and import from there whatever is imported later.

        Raises:
            OSError: out of descriptors, or the directory cannot be written. Then nothing is pinned.
        """
        shutil.rmtree(directory, ignore_errors=True)  # of a host that was killed
        try:
            directory.mkdir(mode=0o700)
            for name in PACKAGES:
                for inside, path in _files(name):
                    self._link(directory / inside, path)
        except OSError:
            self.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self._directory = directory
        for name, module in list(sys.modules.items()):
            place = directory / name.replace(".", "/")
            if hasattr(module, "__path__") and place.is_dir():
                module.__path__ = [str(place), *module.__path__]

    def _link(self, link: Path, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        if 2 * len(self._descriptors) > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # the other half is for instances
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")

    def environment(self) -> dict[str, str]:
        """Return the variables with which a Python finds the pinned modules before any others."""
        if self._directory is None:
            return {}
        others = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(self._directory), *([others] if others else [])])
        return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def close(self) -> None:
        """Close the files, and remove the links."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _files(name: str) -> Iterator[tuple[Path, Path]]:
    """Yield each file of a package with its place below the directory of links: modules, bytecode, libraries, data."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return
        place, origin = Path(name.replace(".", "/")), Path(spec.origin)
        if spec.submodule_search_locations is None:
            yield from _module(origin, place.with_suffix(origin.suffix))
            return
        for root, directories, files in os.walk(origin.parent):
            inside = place / Path(root).relative_to(origin.parent)
            package = ".".join(inside.parts)
            if package in _APART or (package != name and name in _TOP_ONLY):
                directories.clear()
                continue
            directories[:] = [each for each in directories if each != "__pycache__"]
            for file in files:
                yield from _module(Path(root, file), inside / file)


def _module(path: Path, inside: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a file, and the bytecode of a module: compiling it again takes a small device long."""
    yield inside, path
    if path.suffix == ".py":
        cached = Path(importlib.util.cache_from_source(str(path)))
        if cached.exists():
            yield inside.parent / "__pycache__" / cached.name, cached
