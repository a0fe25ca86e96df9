"""Bootable disk image with a boot partition and a root, and an initrd that only mounts the root.

The boot partition is FAT and comes first, as on a Raspberry Pi and most other boards: a token can be put there when the
image is written to a card.

The initrd is made by hand (busybox, three or four modules, thirty lines of shell): generating Debian's under emulation
would take longer than booting the board. It serves `qemu-system -M virt`; a real board boots with its own.
"""

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from deploy import debian

DISK_DRIVERS = ("virtio_blk", "crc32c_generic", "ext4")  # the crc is asked for by name, not by symbol

_SECTOR = 512
_BOOT_MB = 64
_FAT32, _LINUX = 0x0C, 0x83

INIT = """\
#!/bin/busybox sh
busybox mkdir -p /proc /sys /dev /root
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules.order); do busybox insmod /modules/$module; done
tries=0
root=/dev/vda2
for word in $(busybox cat /proc/cmdline); do case $word in root=*) root=${word#root=} ;; esac; done
while [ ! -b $root ] && [ $tries -lt 100 ]; do busybox sleep 0.1; tries=$((tries + 1)); done
busybox mount -t ext4 -o rw,errors=remount-ro $root /root || busybox poweroff -f
busybox mount --move /dev /root/dev
busybox umount /sys
busybox umount /proc
exec busybox switch_root /root /sbin/init
"""


def version(kernel: Path) -> str:
    """Return the version of an unpacked kernel.

    Raises:
        debian.BuildError: there is none.
    """
    found = sorted(each.name for each in (kernel / "usr/lib/modules").iterdir())
    if not found:
        raise debian.BuildError(f"no kernel in {kernel}")
    return found[-1]


def bootable(kernel: Path) -> Path:
    """Return the file that QEMU boots: Debian calls it vmlinuz on Arm and vmlinux on RISC-V."""
    return next(iter(sorted((kernel / "boot").glob("vmlinu[xz]-*"))))


def dependencies(kernel: Path, names: Iterable[str]) -> list[Path]:
    """List the files of these modules and of their dependencies, in loading order."""
    debian.need("depmod")
    release = version(kernel)
    base = kernel / "usr/lib/modules" / release
    if not (base / "modules.dep").exists():
        if not (kernel / "lib").exists():
            (kernel / "lib").symlink_to("usr/lib")
        subprocess.run(["depmod", "-b", str(kernel), release], check=True)
    needs: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in (base / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        paths[_module(path)] = path
        needs[_module(path)] = [_module(each) for each in rest.split()]
    ordered: list[str] = []

    def add(name: str) -> None:
        for each in (*needs.get(name, ()), name):
            if each == name:
                if name in paths and name not in ordered:  # a name that is missing is built in
                    ordered.append(name)
            else:
                add(each)

    for name in names:
        add(name.replace("-", "_"))
    return [base / paths[name] for name in ordered]


def _module(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


def _plain(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def make_initrd(kernel: Path, out: Path) -> Path:
    """Write the initrd to `out`."""
    debian.need("cpio")
    tree = out.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy2(kernel / "usr/bin/busybox", tree / "bin/busybox")
    names = []
    for module in dependencies(kernel, DISK_DRIVERS):
        names.append(_module(module.name) + ".ko")
        (tree / "modules" / names[-1]).write_bytes(_plain(module))
    (tree / "modules.order").write_text("\n".join(names) + "\n")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    listing = "\n".join(sorted(str(each.relative_to(tree)) for each in tree.rglob("*"))) + "\n"
    command = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"]
    packed = subprocess.run(command, cwd=tree, input=listing.encode(), capture_output=True, check=True).stdout
    out.write_bytes(gzip.compress(packed, compresslevel=1, mtime=0))
    shutil.rmtree(tree)
    return out


def install_modules(kernel: Path, root: Path, names: Iterable[str]) -> None:
    """Copy these modules and their dependencies into a root, where `modprobe` finds them."""
    release = version(kernel)
    base = kernel / "usr/lib/modules" / release
    target = root / "usr/lib/modules" / release
    for module in dependencies(kernel, names):
        place = target / module.relative_to(base).with_suffix("" if module.suffix == ".xz" else module.suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_plain(module))
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        if (base / name).exists():
            shutil.copy2(base / name, target / name)
    subprocess.run(["depmod", "-b", str(root), release], check=True)


def make_disk(root: Path, out: Path, *, size_mb: int) -> Path:
    """Write an image: a boot partition (FAT) and a root (ext4) from a directory, owners kept (so it wants to be root).

    The boot partition is empty: QEMU is given kernel and initrd; the root's fstab says where it is mounted.
    """
    debian.need("mke2fs", "mkfs.fat")
    fresh = out.with_suffix(".new")
    root_mb = size_mb - _BOOT_MB - 2  # a MiB before the first partition, one after the last
    with fresh.open("wb") as file:
        file.truncate(size_mb << 20)
        file.write(_partition_table((_FAT32, 1, _BOOT_MB), (_LINUX, 1 + _BOOT_MB, root_mb)))
    boot = ["mkfs.fat", "-F", "32", "-s", "1", "-n", "FIRMWARE", "--offset", str((1 << 20) // _SECTOR)]
    subprocess.run([*boot, str(fresh), str(_BOOT_MB << 10)], check=True, capture_output=True)
    options = ["-t", "ext4", "-L", "root", "-m", "1", "-E", f"offset={(1 + _BOOT_MB) << 20}", "-d", str(root)]
    subprocess.run(["mke2fs", "-q", "-F", *options, str(fresh), f"{root_mb}M"], check=True)
    fresh.rename(out)
    return out


def _partition_table(*partitions: tuple[int, int, int]) -> bytes:
    """Return a master boot record; a partition is its type, its start and its size, in MiB."""
    sectors = (1 << 20) // _SECTOR
    beyond = b"\xfe\xff\xff"  # cylinders, heads and sectors say nothing any more
    entries = [
        struct.pack("<B3sB3sII", 0, beyond, kind, beyond, start * sectors, size * sectors)
        for kind, start, size in partitions
    ]
    return b"".join(entries).rjust(len(entries) * 16 + 446, b"\0").ljust(510, b"\0") + b"\x55\xaa"
