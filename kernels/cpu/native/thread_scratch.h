// Memory of a thread that its calls share.
#pragma once
#include <cstdint>
#include <cstdlib>

// A thread's own memory, aligned to cache lines; it grows and is kept for the next call.
template <int SLOT>
static char* scratch(int64_t bytes) {
    struct Buffer {
        char* data = nullptr;
        int64_t size = 0;
        ~Buffer() { free(data); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < bytes) {
        free(buffer.data);
        buffer.size = (bytes + 4095) / 4096 * 4096;
        buffer.data = (char*)aligned_alloc(4096, buffer.size);
    }
    return buffer.data;
}
