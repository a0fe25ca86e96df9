// The channel of a worker: frames between the router and the loop, over the engine's standard input and output.
//
// `agent/host/ipc/frames.py` says what a frame is; both ends of a compiled image are of one release, by the adapter's digest.
#pragma once
#include "abi.h"

// True from the loop's first turn on: bodies are frames then, not the store's standard input and output.
extern int looping;

// Bytes of a frame's payload at most.
#define FRAME_MAX 65536u

// True where the host is told of calls and of bytes, see `host.wrote`.
extern int metered;

// True where the router is told at once when a guest has returned after its answer had ended.
extern int prompt;

// True while a call of the channel is in hand, and frames of it may come.
extern int in_call;

// True once the answer to the call in hand has ended; the guest may go on.
extern int answer_ended;

// True where the rest of the request's body does not come: the client was answered before it had sent all of it.
extern int body_cut;

// What the guest has in place of the engine's streams, see `OURS`: the bodies of the call in hand, and an empty one.
#define REQUEST_BODY 0x7ffffff0u
#define RESPONSE_BODY 0x7ffffff1u
#define NO_BODY 0x7ffffff2u
#define IS_OURS(number) ((number) >= REQUEST_BODY)

// The router's frames that the loop's caller has to know of.
enum turn { CALL, CHANNEL_ENDED, LEAVE, MISPLACED };

// Discard what comes up to the token, which may lie anywhere: the store before this one ended inside a call.
int channel_align(text token);
// Wait for the next call and read its head; `exact`: read nothing beyond it.
enum turn channel_next(int exact, text *head);
// At most `most` bytes of the request's body, as far as they are there.
text channel_read(uint64_t most);
// Whether reading the body would give something, its end included; whether its trailers have come.
int channel_has_body(void);
int channel_has_trailers(void);
// The guest reads no more of the body: what is left of it is skipped.
void channel_skip_body(void);
// The trailers of the request's body, as lines; waits for them.
text channel_trailers(void);

// Bytes of the response's body that the router takes now.
uint32_t channel_credit(void);
void channel_write(const char *data, size_t size);
// Let the answer's head out, or an empty text where the body begins before it; 0 if it is too large.
int channel_head(text head);
// End the answer while the guest goes on.
void channel_answer_ended(text outcome);
// End the call, and the answer if that has not ended, and say what follows: CALL, or MISPLACED where this store has read what is another's.
enum turn channel_end(text outcome, int last);
// The number of the last call that has ended, 0 for none.
uint32_t channel_ended(void);
// Let out what is written.
void channel_flush(void);
// What arrives while a call is in hand: a pollable of the engine's for it, whether some of it has been read already, and
// one frame of it. `channel_look` takes frames as long as that takes no time.
int32_t channel_arrival(void);
int channel_has_read(void);
void channel_take(void);
void channel_look(void);
