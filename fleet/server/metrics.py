"""Figures for Prometheus, in its text format. Counted from the store when asked; nothing is kept for it."""

from collections import Counter
from collections.abc import Callable

from fleet.store.store import Store


class Metrics:
    """The server's figures.

    Args:
        messages: what came from boards, by kind.
        connected: whether the server is on its broker.
    """

    def __init__(self, *, store: Store, messages: Counter[str], connected: Callable[[], bool]) -> None:
        self._store, self._messages, self._connected = store, messages, connected

    def text(self) -> str:
        """The exposition."""
        devices, online = self._store.devices.count()
        lines = [
            *_metric("wasmfleet_devices", "gauge", "Boards that are enrolled.", [("", devices)]),
            *_metric("wasmfleet_devices_online", "gauge", "Boards that are online.", [("", online)]),
            *_metric(
                "wasmfleet_devices_behind",
                "gauge",
                "Boards that have not accepted their newest assignment.",
                [("", len(self._store.delivery.behind()))],
            ),
            *_metric(
                "wasmfleet_rollouts",
                "gauge",
                "Rollouts by state.",
                [(f'{{state="{state}"}}', count) for state, count in self._store.rollouts.states().items()],
            ),
            *_metric(
                "wasmfleet_messages_total",
                "counter",
                "Messages from boards by kind.",
                [(f'{{kind="{kind}"}}', count) for kind, count in sorted(self._messages.items())],
            ),
            *_metric(
                "wasmfleet_broker_connected",
                "gauge",
                "Whether the server is on its broker.",
                [("", int(self._connected()))],
            ),
        ]
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, words: str, samples: list[tuple[str, int]]) -> list[str]:
    return [
        f"# HELP {name} {words}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value}" for labels, value in samples),
    ]
