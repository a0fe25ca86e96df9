"""Build a whole release into dist/: `python -m deploy.packages.release` (or `make release`).

A release consists of the wheel, the Debian packages, the licences of bundled software (`THIRD-PARTY.txt`), an SBOM in
CycloneDX 1.5 (`wasmfleet.cdx.json`), and `SHA256SUMS` of all files.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy import debian
from deploy.packages import build
from deploy.riscv64 import build as riscv64

OUT = build.SOURCE / "dist"
PINS = ("wasmfleet-agent/vendored.txt", "wasmfleet-agent/engine.txt", "wasmfleet-server/vendored.txt")


@dataclass(frozen=True, order=True)
class Part:
    """Third-party part of a release."""

    kind: str  # of its package URL: pypi, cargo
    name: str
    version: str
    sha256: tuple[str, ...]
    carried_by: str
    licence: str = ""

    @property
    def url(self) -> str:
        """Return the package URL."""
        return f"pkg:{self.kind}/{self.name}@{self.version}"


def pinned() -> Iterator[Part]:
    """List the bundled Python packages, from their pins."""
    for pins in PINS:
        text = (build.HERE / pins).read_text().replace("\\\n", " ")
        for line in text.splitlines():
            found = re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line)
            if found:
                hashes = tuple(re.findall(r"sha256:([0-9a-f]{64})", line))
                yield Part("pypi", found[1], found[2], hashes, pins.split("/")[0])


def crates() -> Iterator[Part]:
    """List the Rust crates that libwasmtime.so for riscv64 is linked from."""
    entry = re.compile(r'name = "(.+)"\nversion = "(.+)"\nsource = .*\nchecksum = "(.+)"')
    for name, version, digest in entry.findall((riscv64.HERE / "Cargo.lock").read_text()):
        yield Part("cargo", name, version, (digest,), "wasmtime's riscv64 wheel")


def licensed(parts: Iterable[Part], site: Path) -> list[Part]:
    """Return the Python parts with their licences, read from the installed packages."""
    licences = {}
    for info in site.rglob("*.dist-info"):
        name, licence = build.describe(info)
        licences[name.lower().replace("_", "-")] = licence
    return [
        Part(each.kind, each.name, each.version, each.sha256, each.carried_by, licences.get(each.name.lower(), ""))
        for each in parts
    ]


def sbom(parts: Iterable[Part], version: str, when: datetime) -> dict[str, Any]:
    """Return a CycloneDX document; the same parts and date make the same document."""
    components: list[dict[str, Any]] = []
    for part in sorted(set(parts)):
        entry: dict[str, Any] = {
            "type": "library",
            "bom-ref": f"{part.url}#{part.carried_by}",
            "name": part.name,
            "version": part.version,
            "purl": part.url,
            "properties": [{"name": "wasmfleet:carried-by", "value": part.carried_by}],
        }
        if len(part.sha256) == 1:
            entry["hashes"] = [{"alg": "SHA-256", "content": part.sha256[0]}]
        else:
            entry["properties"] += [{"name": "wasmfleet:sha256-of-a-build", "value": each} for each in part.sha256]
        if part.licence:
            entry["licenses"] = [{"license": {"name": part.licence}}]
        components.append(entry)
    listed = json.dumps([components, version, when.isoformat()])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, listed)}",
        "version": 1,
        "metadata": {
            "timestamp": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "bom-ref": f"pkg:pypi/wasmfleet@{version}",
                "name": "wasmfleet",
                "version": version,
                "purl": f"pkg:pypi/wasmfleet@{version}",
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": components,
    }


def notices(site: Path, crate_list: Iterable[Part]) -> str:
    """Return the licences of all third-party parts, in full."""
    sections = ["Third-party software carried by wasmfleet's packages. Each section is that software's own notice.\n"]
    for info in sorted(site.rglob("*.dist-info")):
        name, licence = build.describe(info)
        if name == "wasmfleet":
            continue
        found = [
            path.read_text(errors="replace")
            for path in sorted(info.rglob("*"))
            if path.is_file() and re.match(r"(?i)(licen[cs]e|notice|copying)", path.name)
        ]
        sections.append(f"{'=' * 78}\n{name} ({licence})\n{'=' * 78}\n\n" + "\n\n".join(found or [licence]) + "\n")
    rows = "".join(f"{each.name} {each.version}\n" for each in sorted(crate_list))
    sections.append(f"{'=' * 78}\nRust crates in libwasmtime.so for riscv64\n{'=' * 78}\n\n{rows}")
    return "\n".join(sections)


def checksums(directory: Path) -> str:
    """Return SHA256SUMS, as sha256sum(1) reads it."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != "SHA256SUMS"]
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def unpack(debs: Iterable[Path], place: Path) -> None:
    """Unpack the bundled Python packages from the Debian packages."""
    for deb in debs:
        subprocess.run(["dpkg-deb", "--extract", str(deb), str(place)], check=True)


def complete(out: Path, debs: Iterable[Path], engine: Path | None) -> None:
    """Add the other files of a release beside the wheel and the packages in `out`.

    Args:
        out: where the wheel and the packages lie.
        debs: the packages.
        engine: wasmtime's riscv64 wheel, where there is one.
    """
    rust = list(crates()) if engine else []
    with tempfile.TemporaryDirectory(prefix="wasmfleet-release-") as scratch:
        unpack(debs, Path(scratch))
        parts = licensed(pinned(), Path(scratch)) + rust
        (out / "THIRD-PARTY.txt").write_text(notices(Path(scratch), rust))
    if engine:
        shutil.copy2(engine, out)
    when = datetime.fromtimestamp(build.epoch(), UTC)
    (out / "wasmfleet.cdx.json").write_text(json.dumps(sbom(parts, build.version(), when), indent=2) + "\n")
    (out / "SHA256SUMS").write_text(checksums(out))


def main() -> int:
    """Build a release into dist/."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    try:
        wheel = build.own_wheel(OUT)
        with zipfile.ZipFile(wheel) as archive:
            assert "agent/cli.py" in archive.namelist(), "the wheel lacks the product"
        debs = [build.build("wasmfleet-agent", each, wheel, OUT) for each in build.PLATFORMS]
        debs.append(build.build("wasmfleet-server", "all", wheel, OUT))
        complete(OUT, debs, riscv64.finished())
    except debian.BuildError as error:
        debian.say(f"release: {error}")
        return 1
    print((OUT / "SHA256SUMS").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
