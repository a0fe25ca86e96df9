// A scheduled component: each run writes one log line with the number of the run since the instance started.
#include "guest.h"

enum { LEVEL_INFO = 2 };

__attribute__((import_module("wasi:logging/logging@0.1.0-draft"), import_name("log")))
void logging_log(int32_t level, const char *context, size_t context_size, const char *message, size_t message_size);

static unsigned runs;
static outcome done;

EXPORT("wasmfleet:schedule/task@0.1.0#run")
outcome *run(uint64_t scheduled_ms) {
    char line[16] = "run ";
    char digits[10];
    size_t size = 4;
    int count = 0;
    (void)scheduled_ms;
    runs++;
    for (unsigned rest = runs; rest != 0; rest /= 10) digits[count++] = (char)('0' + rest % 10);
    while (count != 0) line[size++] = digits[--count];
    text context = TEXT("ticker");
    logging_log(LEVEL_INFO, context.data, context.size, line, size);
    done.failed = 0;
    return &done;
}
