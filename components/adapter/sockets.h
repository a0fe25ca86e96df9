// wasi:sockets as the guest sees it: what `sockets.c` and `io.c` share.
#pragma once
#include "io.h"

// Numbers of the host's sockets, which are above those of outgoing requests; errors of their streams: `SOCKET_ERROR` and
// the case of error-code. `host.write` gives one more, and `SOCKET_CLOSED` where the guest itself has shut it.
#define FIRST_SOCKET (1u << 27)
#define IS_SOCKET(number) ((number) > FIRST_SOCKET)
#define SOCKET_ERROR 64u
#define SOCKET_CLOSED 128u

// True while the guest holds a socket or a lookup that the host knows of.
extern uint32_t sockets_open;
