"""The update machine's table as Markdown and as a Mermaid diagram, made from the table and from nothing else."""

from agent.update.machine import LIMITS, TABLE, Event, Phase


def _name(phase: Phase) -> str:
    return phase.value.replace("-", "_")


def mermaid() -> str:
    """The way forward and the ways back; recoveries stand in the table."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    lines += [
        f"    {_name(row.phase)} --> {_name(row.to)}: {row.event}"
        for row in TABLE
        if row.event is not Event.INTERRUPTED
    ]
    seen: set[tuple[Phase, Phase]] = set()
    for row in TABLE:
        if row.beyond is None or row.event is Event.INTERRUPTED or (row.phase, row.beyond) in seen:
            continue
        seen.add((row.phase, row.beyond))
        lines.append(f"    {_name(row.phase)} --> {_name(row.beyond)}: {row.counter} used up")
    return "\n".join(lines)


def table() -> str:
    """Every row of the table, as Markdown."""
    lines = ["| in | when | goes to | and does | at most | then |", "|---|---|---|---|---|---|"]
    for row in TABLE:
        limit = f"{LIMITS[row.counter]} {row.counter}" if row.counter else ""
        beyond = row.beyond.value if row.beyond is not None else ""
        lines.append(f"| {row.phase} | {row.event} | {row.to} | {row.effect} | {limit} | {beyond} |")
    return "\n".join(lines)


def markdown() -> str:
    """The generated part of docs/update-machine.md."""
    return f"```mermaid\n{mermaid()}\n```\n\n{table()}\n"
