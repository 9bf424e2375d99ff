// Calls that are written down and made again: what Python needs to make one takes longer than most
// kernels take for one token.
//
// REPLAYABLE(f) stands behind an exported function f and exports `replay_f`, which makes a call of f
// from a row of slots, one for each argument. `replay` makes many in turn.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

union Slot {
    int64_t integer;
    double number;
    void* pointer;
};

template <class T>
static inline T from_slot(Slot slot) {
    if constexpr (std::is_pointer<T>::value) return (T)slot.pointer;
    else if constexpr (std::is_floating_point<T>::value) return (T)slot.number;
    else return (T)slot.integer;
}

template <class... A, size_t... I>
static inline void call_from(void (*f)(A...), const Slot* slots, std::index_sequence<I...>) {
    f(from_slot<A>(slots[I])...);
}

template <class... A>
static inline void call_from(void (*f)(A...), const Slot* slots) {
    call_from(f, slots, std::index_sequence_for<A...>());
}

#define REPLAYABLE(f) \
    EXPORT void replay_##f(const Slot* slots) { call_from(f, slots); }
