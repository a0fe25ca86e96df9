"""Build the Debian packages: `python -m deploy.packages.build` (or `make packages`).

    wasmfleet-agent_VERSION_{arm64,riscv64,amd64}.deb    a device
    wasmfleet-server_VERSION_all.deb                     the operator's side

Each package has a private Python environment, `/usr/lib/wasmfleet/{agent,server}`, on Debian's interpreter and, where
they are recent enough, Debian's Python packages. The others are bundled, pinned by hash in `vendored.txt`, and
invisible to the system's Python. Any machine can build the packages, as nothing is compiled or executed for the target.
Builds are reproducible: the same source and SOURCE_DATE_EPOCH give the same bytes.
"""

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from deploy import debian
from deploy.riscv64 import build as riscv64

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1]
PYTHON = "3.13"  # Debian 13's; what is compiled fits this one only, and the packages say so
PLATFORMS = {
    "arm64": ("manylinux2014_aarch64", "manylinux_2_28_aarch64"),
    "riscv64": ("manylinux_2_31_riscv64", "manylinux_2_34_riscv64", "manylinux_2_39_riscv64"),
    "amd64": ("manylinux1_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64"),
}
# Parts of the wheel in each package; the demo's components stay with the server.
PARTS = {
    "wasmfleet-agent": ("agent", "signing", "fleet/__init__.py", "fleet/protocol", "fleet/component"),
    "wasmfleet-server": ("fleet", "signing"),
}
COMMANDS = {
    "wasmfleet-agent": {"fleet-agent": "agent.cli:main", "fleet-host": "agent.host.cli:main"},
    "wasmfleet-server": {"fleet": "fleet.cli.main:main"},
}
UNITS = {
    "wasmfleet-agent": (
        "fleet-agent.service",
        "fleet-agent.path",
        "fleet-restore.service",
        "fleet-host.service",
        "fleet-compiler.socket",
        "fleet-compiler@.service",
        "fleet-enroll.service",
    ),
    "wasmfleet-server": ("fleet-server.service", "fleet-publisher.service"),
}


def version() -> str:
    """Return the product's version, from pyproject.toml; `$WASMFLEET_VERSION` names another (a rebuild, a test)."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    return os.environ.get("WASMFLEET_VERSION") or str(project["version"])


def epoch() -> int:
    """Return the date of every file: SOURCE_DATE_EPOCH, else that of the last commit, else now."""
    named = os.environ.get("SOURCE_DATE_EPOCH")
    if named:
        return int(named)
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "log", "-1", "--format=%ct"],
        cwd=SOURCE,
        capture_output=True,
        text=True,
        check=False,
    )
    return int(done.stdout.strip() or time.time())


def own_wheel(place: Path) -> Path:
    """Build the product's wheel; return its path.

    Raises:
        debian.BuildError: pip fails.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(SOURCE)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())}
    if subprocess.run(command, check=False, env=environment).returncode != 0:
        raise debian.BuildError("the wheel cannot be built: see pip's message above")
    return next(place.glob("wasmfleet-*.whl"))


def install(target: Path, arguments: list[str], platforms: tuple[str, ...]) -> None:
    """Install for another machine, from wheels only, nothing executed.

    Raises:
        debian.BuildError: something is missing, or a hash differs.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += [
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        "--abi",
        "cp313",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    command += [f"--platform={each}" for each in (*platforms, "any")]
    command += ["--upgrade", "--target", str(target), *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise debian.BuildError(f"pip cannot install {' '.join(arguments)}: see its message above")


def stage(package: str, architecture: str, wheel: Path, tree: Path) -> None:
    """Lay out the files of a package."""
    room = HERE / package
    home = tree / "usr/lib/wasmfleet" / package.removeprefix("wasmfleet-")
    site = home / "lib" / f"python{PYTHON}" / "site-packages"
    site.mkdir(parents=True)
    platforms = PLATFORMS.get(architecture, ())
    install(site, ["--require-hashes", "-r", str(room / "vendored.txt")], platforms)
    if package == "wasmfleet-agent":
        _install_engine(site, architecture, platforms)
    ours = tree / "wheel"
    install(ours, [str(wheel)], platforms)
    parts = [ours / part for part in PARTS[package]] + list(ours.glob("wasmfleet-*.dist-info"))
    for part in parts:
        _copy(part, site / part.relative_to(ours))
    shutil.rmtree(ours)
    _tidy(site)
    # A private environment: Debian's interpreter, these packages first, Debian's own after them.
    (home / "bin").mkdir()
    (home / "bin/python3").symlink_to(f"/usr/bin/python{PYTHON}")
    (home / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {PYTHON}\n")
    for command, entry in COMMANDS[package].items():
        _write_command(tree / "usr/bin" / command, home.relative_to(tree), entry)
    _settings(package, tree)
    _documents(package, site, tree / "usr/share/doc" / package)


def _settings(package: str, tree: Path) -> None:
    """Copy the files for systemd, the device's owner and lintian."""
    systemd = SOURCE / "deploy/systemd"
    files = {systemd / unit: f"usr/lib/systemd/system/{unit}" for unit in UNITS[package]}
    for kind in ("sysusers", "tmpfiles"):
        files[systemd / f"{package}.{kind}.conf"] = f"usr/lib/{kind}.d/{package}.conf"
    files[HERE / package / "lintian-overrides"] = f"usr/share/lintian/overrides/{package}"
    if package == "wasmfleet-agent":
        files[HERE / package / "agent.toml"] = "etc/wasmfleet/agent.toml"
        (tree / "etc/wasmfleet/config.d").mkdir(parents=True)
    for source, place in files.items():
        if source.exists():
            _copy(source, tree / place)


def _install_engine(site: Path, architecture: str, platforms: tuple[str, ...]) -> None:
    if architecture != "riscv64":
        install(site, ["--require-hashes", "-r", str(HERE / "wasmfleet-agent/engine.txt")], platforms)
        return
    wheel = riscv64.finished()
    if wheel is None:
        debian.say("riscv64: no engine in the wheelhouse: devices refuse components (make riscv64-wheel)")
    else:
        install(site, [str(wheel)], platforms)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _tidy(site: Path) -> None:
    # command line wrappers of pip's, caches, and records that no pip will ever read here
    shutil.rmtree(site / "bin", ignore_errors=True)
    for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
        for each in site.glob(f"*.dist-info/{name}"):
            each.unlink()
    for each in list(site.rglob("__pycache__")):
        shutil.rmtree(each)
    for each in list(site.rglob(".gitignore")):
        each.unlink()


def _write_command(path: Path, home: Path, entry: str) -> None:
    module, function = entry.split(":")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/{home}/bin/python3 -I\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"
    )


def _documents(package: str, site: Path, place: Path) -> None:
    place.mkdir(parents=True)
    readme = HERE / package / "README.md"
    if readme.exists():
        shutil.copy2(readme, place / "README.md")
    (place / "copyright").write_text(copyright_text(site))
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(epoch()))
    entry = (
        f"wasmfleet ({version()}) stable; urgency=medium\n\n"
        f"  * Release {version()}; see CHANGELOG.md in the source.\n\n"
        f" -- wasmfleet maintainers <maintainers@wasmfleet.invalid>  {date}\n"
    )
    with (place / "changelog.gz").open("wb") as file:
        file.write(gzip.compress(entry.encode(), mtime=0))


def copyright_text(site: Path) -> str:
    """Return Debian's copyright file: our licence, and those of the bundled packages."""
    head = (
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
        "Upstream-Name: wasmfleet\n\n"
        "Files: *\nCopyright: the wasmfleet authors\nLicense: Apache-2.0\n"
    )
    parts = [head]
    for info in sorted(site.glob("*.dist-info")):
        name, licence = describe(info)
        if name == "wasmfleet":
            continue
        texts = [
            text.read_text(errors="replace")
            for text in sorted(info.rglob("*"))
            if text.is_file() and re.match(r"(?i)(licen[cs]e|notice|copying)", text.name)
        ]
        body = "\n".join(map(_without_apache, texts)) or licence
        indented = "\n".join(f" {line.rstrip()}" if line.strip() else " ." for line in body.splitlines())
        parts.append(
            f"Files: usr/lib/wasmfleet/*/{name}*\nCopyright: its authors, see the text\nLicense: {name}\n{indented}\n"
        )
    parts.append(
        "License: Apache-2.0\n On Debian systems, the text of the Apache License 2.0 is in\n"
        " /usr/share/common-licenses/Apache-2.0.\n"
    )
    return "\n".join(parts)


def _without_apache(text: str) -> str:
    """Return a licence's text with the Apache License named instead of quoted, as Debian requires; exceptions stay."""
    if "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" not in text:
        return text
    named = "On Debian systems, the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0."
    _, found, exceptions = text.partition("--- LLVM Exceptions")
    return f"{named}\n{found}{exceptions}"


def describe(info: Path) -> tuple[str, str]:
    """Return name and licence of a bundled package, from its metadata."""
    text = (info / "METADATA").read_text(errors="replace").split("\n\n", 1)[0]
    name = re.search(r"^Name: (.+)$", text, re.MULTILINE)
    licence = re.search(r"^License-Expression: (.+)$", text, re.MULTILINE)
    licence = licence or re.search(r"^License: (.+)$", text, re.MULTILINE)
    if licence:
        return (name[1] if name else info.name), licence[1]
    classifiers = re.findall(r"^Classifier: License :: (?:OSI Approved :: )?(.+)$", text, re.MULTILINE)
    return (name[1] if name else info.name), ", ".join(classifiers) or "see its files"


def build(package: str, architecture: str, wheel: Path, out: Path) -> Path:
    """Build one package into `out`; return its path.

    Raises:
        debian.BuildError: a tool is missing or fails.
    """
    debian.need("dpkg-deb")
    with tempfile.TemporaryDirectory(prefix="wasmfleet-package-") as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        stage(package, architecture, wheel, tree)
        control = tree / "DEBIAN"
        control.mkdir()
        # files and directories are Debian's modes, whatever the umask here
        for each in tree.rglob("*"):
            if not each.is_symlink():
                executable = each.is_dir() or each.parent == tree / "usr/bin"
                each.chmod(0o755 if executable else 0o644)
        size_kb = sum(each.stat().st_size for each in tree.rglob("*") if each.is_file()) // 1024 + 1
        head = (HERE / package / "control").read_text().splitlines()
        head[1:1] = [f"Version: {version()}", f"Architecture: {architecture}", f"Installed-Size: {size_kb}"]
        (control / "control").write_text("\n".join(head) + "\n")
        for script in ("preinst", "postinst", "prerm", "postrm"):
            if (HERE / package / script).exists():
                shutil.copy2(HERE / package / script, control / script)
                (control / script).chmod(0o755)
        conffiles = sorted("/" + str(each.relative_to(tree)) for each in (tree / "etc").rglob("*") if each.is_file())
        if conffiles:
            (control / "conffiles").write_text("\n".join(conffiles) + "\n")
        (control / "md5sums").write_text(_md5sums(tree))
        for each in tree.rglob("*"):
            os.utime(each, (epoch(), epoch()), follow_symlinks=False)
        out.mkdir(parents=True, exist_ok=True)
        place = out / f"{package}_{version()}_{architecture}.deb"
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "-z6", "--build", str(tree), str(place)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())}
        if subprocess.run(command, check=False, env=environment, stdout=sys.stderr).returncode != 0:
            raise debian.BuildError(f"dpkg-deb cannot build {place.name}")
    return place


def _md5sums(tree: Path) -> str:
    import hashlib  # noqa: PLC0415 - this once, for dpkg's own format

    rows = []
    for each in sorted(tree.rglob("*")):
        inside = each.relative_to(tree)
        if each.is_file() and not each.is_symlink() and inside.parts[0] not in {"DEBIAN", "etc"}:
            rows.append(f"{hashlib.md5(each.read_bytes()).hexdigest()}  {inside}\n")  # noqa: S324 - dpkg's format
    return "".join(rows)


def main() -> int:
    """Build the packages named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Build the Debian packages.")
    parser.add_argument("architectures", nargs="*", help="arm64, riscv64, amd64, all (the server); default: every one")
    parser.add_argument("--out", type=Path, default=SOURCE / "dist")
    options = parser.parse_args()
    wanted = options.architectures or [*PLATFORMS, "all"]
    try:
        with tempfile.TemporaryDirectory(prefix="wasmfleet-wheel-") as scratch:
            wheel = own_wheel(Path(scratch))
            for architecture in wanted:
                package = "wasmfleet-server" if architecture == "all" else "wasmfleet-agent"
                print(build(package, architecture, wheel, options.out))
    except debian.BuildError as error:
        debian.say(f"packages: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
