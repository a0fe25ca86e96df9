"""Third-party software in a release: SBOM, crates, checksums."""

from datetime import UTC, datetime
from pathlib import Path

from deploy.packages import release

WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def test_every_pin_is_in_the_bill_of_materials_with_its_hash() -> None:
    bill = release.sbom(release.pinned(), "1.2.3", WHEN)
    found = {each["purl"]: each for each in bill["components"]}
    assert "pkg:pypi/wasmtime@50.0.1" in found
    assert found["pkg:pypi/tuf@7.0.1"]["hashes"][0]["alg"] == "SHA-256"
    # several builds of the same version have no common hash
    assert len([each for each in found["pkg:pypi/wasmtime@50.0.1"]["properties"] if "sha256" in each["name"]]) == 2
    references = [each["bom-ref"] for each in bill["components"]]
    assert len(set(references)) == len(references)


def test_crates_of_the_native_library_are_listed() -> None:
    crates = list(release.crates())
    assert len(crates) > 100
    assert any(each.url == "pkg:cargo/wasmtime@50.0.1" for each in crates)
    assert all(len(each.sha256[0]) == 64 for each in crates)


def test_the_same_release_has_the_same_bill() -> None:
    assert release.sbom(release.pinned(), "1", WHEN) == release.sbom(release.pinned(), "1", WHEN)
    assert release.sbom(release.pinned(), "1", WHEN) != release.sbom(release.pinned(), "2", WHEN)


def test_checksums_are_read_by_sha256sum(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "a.deb").write_bytes(b"one")
    (tmp_path / "b.whl").write_bytes(b"two")
    (tmp_path / "SHA256SUMS").write_text(release.checksums(tmp_path))
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=False).returncode == 0
    (tmp_path / "a.deb").write_bytes(b"two")
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=False).returncode == 1
