"""Prose and complexity of today's code, counted for each file: the counts may fall and never rise.

    python -m tests.house.baseline            compare with baseline.txt; exit code 1 if a file has more than its share
    python -m tests.house.baseline record     write the counts of now; refuses to raise one (--force: raise it)

`make check` runs the first, `make baseline` the second. Counted are, in Python and in the pages of Markdown:

    words       private words, for which DESIGN's vocabulary has a plain one (lane: worker, crew: worker set, ...)
    openings    docstrings and comments that begin with a pronoun instead of the thing they are about
    C901, PLR0911, PLR0912, PLR0913, PLR0915
                functions that are too complex, or have too many returns, branches, arguments (7) or statements;
                those that ruff is told to pass over count too
"""

import argparse
import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("baseline.txt")

CODE = ("agent", "components", "fleet", "signing", "deploy")
PROSE = ("*.md", "docs/**/*.md", "components/**/*.md", "deploy/**/*.md")
HISTORY = ("CHANGELOG.md", "docs/decisions/")  # tell what was, in the words of then

WORDS = re.compile(
    r"(?<![\w-])(lanes?|muster(s|ed)?|nursery|nurseries|commons|crews?|staffing|staffed|entrusted|outlets?|seats?|walls?)(?![\w-])",
    re.IGNORECASE,
)
OPENINGS = re.compile(r"(Its?|One|What|Whether|Which|That|This|These|Those|They|Who|How|All|So)\b", re.IGNORECASE)
QUOTED = re.compile(r"``.*?``|`[^`]*`", re.DOTALL)
FENCED = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$", re.MULTILINE | re.DOTALL)

RUFF = ("C901", "PLR0911", "PLR0912", "PLR0913", "PLR0915")
MOST_ARGUMENTS = 7  # more collaborators want a value object

Counts = dict[tuple[str, str], int]  # (rule, file) -> how many


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield each docstring of a module, those of its constants and attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield inspect.cleandoc(node.value.value)


def comments(source: str) -> Iterator[str]:
    """Yield each comment of a module; lines of comment that follow each other are one."""
    block: list[str] = []
    last = (-1, -1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("#!: ").rstrip()
        if block and token.start == (last[0] + 1, last[1]):
            block.append(text)
        else:
            if block:
                yield "\n".join(block)
            block = [text]
        last = token.start
    if block:
        yield "\n".join(block)


def of_source(source: str) -> Counter[str]:
    """Count the faults of prose in a module."""
    counts: Counter[str] = Counter()
    for text in (*docstrings(ast.parse(source)), *comments(source)):
        counts["words"] += len(WORDS.findall(QUOTED.sub("", text)))
        counts["openings"] += bool(OPENINGS.match(text))
    return counts


def of_page(text: str) -> Counter[str]:
    """Count the private words of a page, outside of code."""
    return Counter(words=len(WORDS.findall(QUOTED.sub("", FENCED.sub("", text)))))


def of_ruff() -> Counts:
    """Count the findings of ruff, those it was told to pass over included."""
    command = (sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--exit-zero", "--no-cache")
    options = (
        *("--select", ",".join(RUFF), "--config", f"lint.pylint.max-args={MOST_ARGUMENTS}"),
        *("--target-version", "py311", "--output-format", "json"),
    )
    done = subprocess.run([*command, *options, *CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    found = ((each["code"], str(Path(each["filename"]).relative_to(ROOT))) for each in json.loads(done.stdout))
    return dict(Counter(found))


def measure() -> Counts:
    """Count what there is now."""
    counts = of_ruff()
    modules = [file for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    pages = {file for pattern in PROSE for file in ROOT.glob(pattern)}
    for file in (*modules, *pages):
        name = str(file.relative_to(ROOT))
        if not name.startswith(HISTORY):
            text = file.read_text(encoding="utf-8")
            found = of_source(text) if file.suffix == ".py" else of_page(text)
            counts |= {(rule, name): number for rule, number in found.items() if number}
    return counts


def read() -> Counts:
    """Read the recorded counts."""
    rows = (line.split() for line in FILE.read_text(encoding="utf-8").splitlines() if line and line[0] != "#")
    return {(rule, name): int(number) for rule, number, name in rows}


def write(counts: Mapping[tuple[str, str], int]) -> None:
    """Record counts, one line each, so that changes of different files merge."""
    rows = [f"{rule} {number} {name}\n" for (rule, name), number in sorted(counts.items())]
    FILE.write_text("# Counts that may only fall: make baseline\n" + "".join(rows), encoding="utf-8")


def risen(now: Counts, recorded: Counts) -> list[str]:
    """List the counts above the recorded ones, as sentences."""
    return [
        f"{name}: {rule}: {number}, allowed are {recorded.get((rule, name), 0)}"
        for (rule, name), number in sorted(now.items())
        if number > recorded.get((rule, name), 0)
    ]


def raised(now: Counts, recorded: Counts) -> list[str]:
    """List the counts that may not be recorded: all that rise, but for what a renamed file brings along."""
    files = {name for _, name in now}
    gone = Counter[str]()
    for (rule, name), number in recorded.items():
        gone[rule] += 0 if name in files or (ROOT / name).exists() else number
    known = {name for _, name in recorded}
    moved = {key: number for key, number in now.items() if key[1] not in known}
    for rule, number in gone.items():
        if sum(count for key, count in moved.items() if key[0] == rule) <= number:
            recorded = recorded | {key: count for key, count in moved.items() if key[0] == rule}
    return risen(now, recorded)


def main() -> int:
    """Compare or record."""
    parser = argparse.ArgumentParser(description="Hold counts of faults in prose and shape, which may only fall.")
    parser.add_argument("action", nargs="?", choices=["compare", "record"], default="compare")
    parser.add_argument("--force", action="store_true", help="with record: raise counts too")
    options = parser.parse_args()
    now, recorded = measure(), read() if FILE.exists() else {}
    if options.action == "record":
        refused = [] if options.force else raised(now, recorded)
        if not refused:
            write(now)
        hint = "not recorded: these counts would rise. Correct them, or record with --force and say why in the commit"
    else:
        refused = risen(now, recorded)
        hint = f"more than {FILE.relative_to(ROOT)} allows. Correct them: CONTRIBUTING.md, Prose"
    for line in refused:
        print(line)
    if refused:
        print(hint)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
