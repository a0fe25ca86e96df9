"""`make fuzz`: the harnesses under atheris, each in a process of its own, for a number of runs.

    python -m tests.fuzz.run [HARNESS ...] [--runs N] [--keep DIRECTORY]

Inputs that were worth keeping grow in `--keep` (.fuzz by default), beside what crashed; a crash ends with its file's
name and exit code 1. Put the input under tests/fuzz/found/<harness>/ when it is mended. Where there is no atheris for
this Python the same harnesses run under Hypothesis (`make test` does so too), and it is said.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Final

RUNS: Final = 20_000
MEMORY_MIB: Final = 1024
"""What a process under atheris may take, the instrumented libraries included."""
INPUT_MAX_BYTES: Final = 8192
INSTRUMENTED: Final = ("agent.link.bundle", "fleet", "signing", "tests.fuzz.harnesses")


def main() -> int:
    """Run the harnesses; returns the exit code."""
    options = _parser().parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("no atheris for this Python: the harnesses run under Hypothesis instead", flush=True)
        return subprocess.run([sys.executable, "-m", "pytest", "tests/fuzz", "-q"], check=False).returncode
    if options.inside:
        return _fuzz(options.inside)
    from tests.fuzz.harnesses import HARNESSES

    unknown = [name for name in options.names if name not in HARNESSES]
    if unknown:
        print(f"there is no harness {unknown[0]!r}: there are {', '.join(HARNESSES)}", file=sys.stderr)
        return 2
    failed = []
    for name in options.names or HARNESSES:
        corpus = options.keep / name
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(HARNESSES[name].seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        for number, file in enumerate(sorted((Path(__file__).parent / "found" / name).glob("*"))):
            (corpus / f"found-{number}").write_bytes(file.read_bytes())
        command = [sys.executable, "-m", "tests.fuzz.run", "--inside", name]
        limits = [f"-runs={options.runs}", f"-rss_limit_mb={MEMORY_MIB}", f"-max_len={INPUT_MAX_BYTES}", "-seed=1"]
        place = [f"-artifact_prefix={options.keep}/{name}-", "-verbosity=0", "-timeout=20", str(corpus)]
        print(f"{name}: {options.runs} runs", flush=True)
        if subprocess.run([*command, "--", *limits, *place], check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}; the inputs are in {options.keep}" if failed else "nothing was found")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Fuzz the parsers.")
    parser.add_argument("names", nargs="*", metavar="HARNESS")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"))
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    return parser


def _fuzz(name: str) -> int:
    """One harness, in this process, until it has run as often as asked or something was found."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        from tests.fuzz.harnesses import HARNESSES
    after = sys.argv.index("--") + 1
    atheris.Setup([sys.argv[0], *sys.argv[after:]], HARNESSES[name].body)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
