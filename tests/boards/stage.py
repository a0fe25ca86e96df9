"""From a Debian root and the packages under test to a disk that boots, cached by everything that it is made of."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy import debian
from deploy.image import disk
from deploy.image import root as board_root

DISK_MB = 1200
MODULES = (
    *disk.DISK_DRIVERS,
    *(
        "vfat",
        "nls_cp437",
        "nls_ascii",
        "nls_iso8859-1",
        "virtio_net",
        "virtio-rng",
        "sch_netem",
        "autofs4",
        "configfs",
        "i2c-dev",
        "loop",
    ),
)

CONSOLE_UNIT = """\
[Unit]
Description=a root shell for the tests
DefaultDependencies=no
After=systemd-udevd.service

[Service]
ExecStart=/bin/sh -c 'stty raw -echo; echo board-shell-ready; exec /bin/sh'
StandardInput=tty-force
StandardOutput=tty
StandardError=tty
TTYPath=/dev/hvc0
Environment=HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM=dumb PS1= PS2=
Restart=always
RestartSec=0
KillMode=process
OOMScoreAdjust=-1000

[Install]
WantedBy=sysinit.target
"""

NETWORK = """\
[Match]
Name=eth0

[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
LinkLocalAddressing=no
IPv6AcceptRA=no
"""

# On a busy machine an emulated board may not see its own disk within systemd's 90 seconds, and would call an emergency.
FSTAB = """\
/dev/vda2 / ext4 errors=remount-ro 0 1
/dev/vda1 /boot/firmware vfat defaults,x-systemd.device-timeout=15min 0 0
"""

# The board's owner opens the shared port, as the package's README says.
OWNER = "[Service]\nEnvironment=WASMFLEET_INGRESS=0.0.0.0:8080\n"

# What a board in a test does not need: masking it saves a third of a boot's processor time.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("getty@tty1.service", "serial-getty@ttyAMA0.service", "serial-getty@ttyS0.service", "serial-getty@hvc0.service"),
    *("systemd-firstboot.service", "systemd-networkd-wait-online.service", "e2scrub_reap.service"),
    *("man-db.timer", "systemd-pcrmachine.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount"),
    *("getty-static.service", "proc-sys-fs-binfmt_misc.mount"),
    # done when the image was made
    *("ldconfig.service", "systemd-journal-catalog-update.service", "systemd-sysusers.service"),
    *("systemd-update-done.service", "systemd-hwdb-update.service", "systemd-boot-random-seed.service"),
    # for hardware that QEMU's board lacks
    *("modprobe@efi_pstore.service", "modprobe@drm.service", "systemd-pstore.service", "systemd-battery-check.service"),
    *("systemd-tpm2-setup-early.service", "systemd-tpm2-setup.service", "systemd-hibernate-clear.service"),
    # file systems that nothing here uses
    *("modprobe@fuse.service", "sys-fs-fuse-connections.mount", "dev-hugepages.mount", "dev-mqueue.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
)


@dataclass(frozen=True)
class Image:
    """A disk to boot from, never written to: boards get overlays."""

    architecture: str
    kernel: Path
    initrd: Path
    disk: Path


def build(architecture: str, packages: Sequence[Path] = ()) -> Image:
    """The disk of a board with these packages installed.

    Args:
        architecture: of the board.
        packages: .deb files, installed by dpkg in this order.

    Raises:
        debian.BuildError: something is missing, or an installation failed.
    """
    root, kernel = board_root.root(architecture), board_root.kernel(architecture)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in packages]
    made_of = (root.name, kernel.name, digests, DISK_MB, MODULES, CONSOLE_UNIT, NETWORK, MASKED, FSTAB, OWNER)
    made_of += (Path(disk.__file__).read_text(),)
    place = debian.cache_dir() / f"disk-{architecture}-{debian.key(*made_of)}"
    if not place.exists():
        fresh = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=debian.cache_dir()))
        try:
            disk.make_initrd(kernel, fresh / "initrd")
            tree = fresh / "root"
            subprocess.run(["cp", "-a", "--reflink=auto", str(root), str(tree)], check=True)
            _install(tree, packages)
            _furnish(tree, kernel)
            disk.make_disk(tree, fresh / "disk.raw", size_mb=DISK_MB)
            shutil.rmtree(tree)
            fresh.rename(place)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return Image(architecture, disk.bootable(kernel), place / "initrd", place / "disk.raw")


def _install(tree: Path, packages: Sequence[Path]) -> None:
    if packages:
        stub, unstub = board_root.without_byte_compiling(tree)
        inside = tree / "var/tmp/packages"
        inside.mkdir()
        for package in packages:
            shutil.copy2(package, inside)
        names = [f"/var/tmp/packages/{package.name}" for package in packages]
        subprocess.run(["sh", "-ec", stub], check=True)
        debian.run_inside(tree, ["dpkg", "--install", *names], env={"DEBIAN_FRONTEND": "noninteractive"})
        subprocess.run(["sh", "-ec", unstub], check=True)
        shutil.rmtree(inside)
    board_root.byte_compile(tree)


def _furnish(tree: Path, kernel: Path) -> None:
    (tree / "boot/firmware").mkdir()
    (tree / "etc/fstab").write_text(FSTAB)
    (tree / "etc/hostname").write_text("board\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost board\n")
    (tree / "etc/machine-id").write_text(hashlib.md5(os.urandom(16)).hexdigest() + "\n")
    (tree / "etc/systemd/network").mkdir(parents=True, exist_ok=True)
    (tree / "etc/systemd/network/10-board.network").write_text(NETWORK)
    units = tree / "etc/systemd/system"
    (units / "fleet-host.service.d").mkdir(parents=True)
    (units / "fleet-host.service.d/owner.conf").write_text(OWNER)
    (units / "board-console.service").write_text(CONSOLE_UNIT)
    wants = units / "sysinit.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "board-console.service").symlink_to("/etc/systemd/system/board-console.service")
    networkd = units / "multi-user.target.wants"
    networkd.mkdir(exist_ok=True)
    link = networkd / "systemd-networkd.service"
    if not link.is_symlink():
        link.symlink_to("/usr/lib/systemd/system/systemd-networkd.service")
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    journal = tree / "etc/systemd/journald.conf.d"
    journal.mkdir(parents=True, exist_ok=True)
    (journal / "board.conf").write_text("[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n")
    disk.install_modules(kernel, tree, MODULES)


def overlay(image: Image, place: Path) -> Path:
    """A disk over the image's, which a board may write to."""
    debian.need("qemu-img")
    place.parent.mkdir(parents=True, exist_ok=True)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image.disk), str(place)]
    subprocess.run(command, check=True)
    return place
