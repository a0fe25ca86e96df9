"""The Rust toolchain root: Debian forky, whose rustc is new enough for wasmtime and knows riscv64 and wasm32.

Run `python -m deploy.toolchain` to make it and print its path. Besides deploy/riscv64, the Rust examples of
components/ are built with it.
"""

from pathlib import Path

from deploy import debian

SUITE = "forky"
PACKAGES = (
    "binutils ca-certificates cargo cmake gcc gcc-riscv64-linux-gnu libc6-dev libc6-dev:riscv64 libstd-rust-dev "
    "libstd-rust-dev-wasm32 libstd-rust-dev:riscv64 lld make rustc wasm-tools"
).split()


def toolchain() -> Path:
    """Return the root, created on first use (about two minutes and 2 GB)."""
    root = debian.bootstrap(
        debian.cache_dir() / SUITE,
        suite=SUITE,
        architectures=("amd64", "riscv64"),
        packages=PACKAGES,
        variant="essential",
    )
    debian.lend_network(root)
    return root


if __name__ == "__main__":
    print(toolchain())
