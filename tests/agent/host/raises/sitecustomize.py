"""Have the resolver raise what a name says: `raises-memoryerror.test`; loaded by PYTHONPATH."""

import builtins
import socket

resolve = socket.getaddrinfo
KINDS = {name.lower(): kind for name, kind in vars(builtins).items() if isinstance(kind, type)}


def getaddrinfo(host, *args, **kwargs):
    if isinstance(host, str) and host.startswith("raises-"):
        raise KINDS[host.partition("-")[2].partition(".")[0]]("for a test")
    return resolve(host, *args, **kwargs)


socket.getaddrinfo = getaddrinfo
