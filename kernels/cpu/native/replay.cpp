// Makes calls that were written down, in turn; kernels/cpu/recording.py writes them.
#include "common.h"
#include "replay.h"

constexpr int MOST_ARGUMENTS = 16;

struct Call {
    void (*function)(const Slot*);
    Slot arguments[MOST_ARGUMENTS];
};

EXPORT void replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].arguments);
}
