"""The toolchains of components: versions, and the command that installs each. Templates, errors and CI read this table.

Only the standard library: scripts that build components import this where nothing is installed.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Tool:
    """Program that a template's build runs.

    Attributes:
        version: with which the templates are tested; empty where any recent one will do.
        install: command line, or page, by which a person gets it.
    """

    version: str
    install: str


TOOLS: Final = {
    "cargo": Tool("", "install Rust from rustup.rs, then: rustup target add wasm32-wasip2"),
    "componentize-py": Tool("0.25.1", "pip install componentize-py==0.25.1"),
    "npm": Tool("", "install Node.js 20 or later, from nodejs.org or your distribution (apt-get install npm)"),
    "jco": Tool("1.34.0", "npm install @bytecodealliance/jco@1.34.0"),
    "componentize-js": Tool("0.22.0", "npm install @bytecodealliance/componentize-js@0.22.0"),
    "componentize-qjs": Tool("0.4.5", "npm install componentize-qjs@0.4.5"),
}


def install(program: str) -> str:
    """Return how a program is had, a sentence for people."""
    return TOOLS[program].install if program in TOOLS else f"put {program} on PATH"
