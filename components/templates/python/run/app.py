"""Run by the device. The modules imported are made of the WIT in wit/ by componentize-py."""

from wit_world import exports


class Run(exports.Run):
    def run(self) -> None:
        print("hello from {{name}}", flush=True)
