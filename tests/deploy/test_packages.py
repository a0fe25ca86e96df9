"""Content of the Debian packages, without installing them; tests on emulated boards install them."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import debian
from deploy.packages import build, release

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing: apt-get install dpkg"),
]
SCRIPTS = sorted(
    path for path in (ROOT / "deploy/packages").glob("*/*") if path.name in {"preinst", "postinst", "prerm", "postrm"}
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("packages")
    try:
        wheel = build.own_wheel(out / "wheel")
        return {
            "agent": build.build("wasmfleet-agent", "arm64", wheel, out),
            "server": build.build("wasmfleet-server", "all", wheel, out),
            "again": build.build("wasmfleet-server", "all", wheel, out / "again"),
        }
    except debian.BuildError as error:
        if os.environ.get("PIP_NO_INDEX"):
            pytest.skip(f"no package index: {error}")
        raise


def files(package: Path) -> list[str]:
    listing = subprocess.run(["dpkg-deb", "--contents", str(package)], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=5)[5].split(" -> ")[0] for line in listing.stdout.splitlines()]


def field(package: Path, name: str) -> str:
    done = subprocess.run(["dpkg-deb", "--field", str(package), name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("side", ["agent", "server"])
def test_all_files_are_in_a_private_directory(packages: dict[str, Path], side: str) -> None:
    # generic names such as `agent` in a shared directory would collide with others
    for name in files(packages[side]):
        assert "dist-packages" not in name
        if "/site-packages/" in name:
            assert name.startswith(f"./usr/lib/wasmfleet/{side}/lib/python3.13/")
        assert not name.startswith(("./usr/local", "./opt", "./var"))


def test_the_devices_package_has_no_server_code(packages: dict[str, Path]) -> None:
    names = files(packages["agent"])
    home = "./usr/lib/wasmfleet/agent/lib/python3.13/site-packages"
    assert f"{home}/agent/cli.py" in names
    assert f"{home}/fleet/protocol/topics.py" in names
    assert not [name for name in names if re.search(r"/fleet/(server|cli|store|rollout|demo)/", name)]
    assert not [name for name in names if "/wasmtime/" in name and "x86_64" in name]
    assert f"{home}/wasmtime/linux-aarch64/_libwasmtime.so" in names


def test_compiled_code_depends_on_its_python_version(packages: dict[str, Path]) -> None:
    depends = field(packages["agent"], "Depends")
    assert "python3 (>= 3.13~)" in depends
    assert "python3 (<< 3.14~)" in depends
    compiled = [name for name in files(packages["agent"]) if name.endswith(".so")]
    assert all("cp" not in Path(name).name or "cpython-313-aarch64" in name for name in compiled)


def test_the_units_of_the_repository_are_installed(packages: dict[str, Path]) -> None:
    installed = {Path(name).name for name in files(packages["agent"]) + files(packages["server"])}
    units = {path.name for path in (ROOT / "deploy/systemd").glob("fleet-*")}
    assert units <= installed


def test_the_same_source_makes_the_same_bytes(packages: dict[str, Path]) -> None:
    first, again = (hashlib.sha256(packages[each].read_bytes()).hexdigest() for each in ("server", "again"))
    assert first == again


@pytest.mark.parametrize("side", ["agent", "server"])
def test_lintian_finds_no_error(packages: dict[str, Path], side: str) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is missing: apt-get install lintian")
    command = ["lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0", str(packages[side])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_maintainer_script_is_plain_shell(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\nset -e\n")
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    # no script asks questions, not even at a purge
    assert "debconf" not in script.read_text()
    assert not re.search(r"^\s*read ", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("architecture", "status"), [("armhf", 1), ("armel", 1), ("arm64", 0), ("riscv64", 0)])
def test_a_32_bit_system_is_refused_with_one_sentence(tmp_path: Path, architecture: str, status: int) -> None:
    # dpkg with arm64 as a foreign architecture would install on a 32-bit system, and nothing would run
    (tmp_path / "dpkg").write_text(f"#!/bin/sh\necho {architecture}\n")
    (tmp_path / "dpkg").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    preinst = ROOT / "deploy/packages/wasmfleet-agent/preinst"
    done = subprocess.run(["sh", str(preinst), "install"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == status
    assert ("64-bit" in done.stderr) == bool(status)


def test_dpkg_refuses_another_architecture_with_one_sentence(packages: dict[str, Path], tmp_path: Path) -> None:
    # a 32-bit system's refusal of the 64-bit package, reproduced with this machine's dpkg
    native = debian.native()
    if native == "arm64":
        pytest.skip("this machine is of the package's own kind")
    (tmp_path / "var/lib/dpkg/info").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/updates").mkdir()
    (tmp_path / "var/lib/dpkg/status").touch()
    command = ["dpkg", f"--root={tmp_path}", "--force-not-root", "--dry-run", "--install", str(packages["agent"])]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"package architecture (arm64) does not match system ({native})" in done.stderr


def test_a_release_lists_its_content(packages: dict[str, Path], tmp_path: Path) -> None:
    debs = [Path(shutil.copy2(packages[side], tmp_path)) for side in ("agent", "server")]
    release.complete(tmp_path, debs, None)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(deb.name for deb in debs),
        *("THIRD-PARTY.txt", "wasmfleet.cdx.json", "SHA256SUMS"),
    }
    bill = json.loads((tmp_path / "wasmfleet.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    listed = {each["name"].lower().replace("_", "-"): each for each in bill["components"]}
    carried = {
        re.sub(r"[-_.]+", "-", found[1]).lower()
        for side in ("agent", "server")
        for name in files(packages[side])
        if (found := re.search(r"/site-packages/([^/]+?)-[0-9][^/]*\.dist-info/$", name))
    } - {"wasmfleet"}
    assert carried == set(listed), "every package that is carried along is in the bill, and nothing else"
    notices = (tmp_path / "THIRD-PARTY.txt").read_text()
    for name in carried:
        assert listed[name]["licenses"], f"{name} has a licence"
        assert re.search(rf"^{name.replace('-', '[-_.]')} \(", notices, re.MULTILINE | re.IGNORECASE), name
    # the checksums cover everything except themselves
    check = subprocess.run(
        ["sha256sum", "--check"],
        stdin=(tmp_path / "SHA256SUMS").open(),
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0
    assert len(check.stdout.splitlines()) == len(debs) + 2


def test_a_licence_is_named_and_its_exceptions_kept() -> None:
    text = (
        "Apache License\nTERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION\n...\n--- LLVM Exceptions ---\nso"
    )
    shortened = build._without_apache(text)
    assert "common-licenses/Apache-2.0" in shortened
    assert shortened.endswith("--- LLVM Exceptions ---\nso")
    assert build._without_apache("MIT License\n...") == "MIT License\n..."
