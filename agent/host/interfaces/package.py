"""Form of an interface's module: what the host serves, under which grant, within which limits, and what is counted.

`docs/interfaces.md` is made of these by `agent.host.interfaces.page`, and the worker links `interfaces`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.host.engine.host_interface import HostInterface


@dataclass(frozen=True, slots=True)
class Package:
    """WIT package as devices serve it; texts are Markdown.

    Attributes:
        name: such as `wasi:config`.
        about: what it is for, in a sentence or a paragraph.
        grant: what a component must be granted, and how that is written.
        limits: of each function or value, and where it can be changed.
        counters: name, as reports and `fleet device` have it, and what is counted there.
        rust, python: example of a guest, from its imports on; empty where an ordinary standard library is all.
        interfaces: those that the host serves by functions of its own.
        versions: of those that the engine or the adapter serves, by name, or of the package as a whole.
    """

    name: str
    about: str
    grant: str
    limits: Mapping[str, str] = field(default_factory=dict)
    counters: Mapping[str, str] = field(default_factory=dict)
    rust: str = ""
    python: str = ""
    interfaces: tuple[HostInterface, ...] = ()
    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def served(self) -> dict[str, tuple[str, ...]]:
        """Interfaces, or the package, with their versions, as `components/wit/versions.toml` lists them."""
        return {**self.versions, **{each.name: each.versions for each in self.interfaces}}
