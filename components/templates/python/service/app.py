"""Run by the device. The modules imported are made of the WIT in wit/ by componentize-py."""

import time

from wit_world import exports


class Run(exports.Run):
    def run(self) -> None:
        print("hello from {{name}}", flush=True)
        while True:
            time.sleep(60)
