"""Acts of the rows of `named_writes`, by the names of the writes; and the agent itself."""

from tests.agent.named_writes import ROWS, agent

__all__ = ["agent"]


def __getattr__(name):
    return ROWS[name].act
