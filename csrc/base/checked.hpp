// Arithmetic on numbers that come from a file. Every overflow is an answer (nullopt), never a wrap.
#pragma once
#include <concepts>
#include <optional>

namespace pgs {

template <std::integral T>
std::optional<T> checked_add(T a, T b) {
    T r;
    if (__builtin_add_overflow(a, b, &r)) return std::nullopt;
    return r;
}

template <std::integral T>
std::optional<T> checked_mul(T a, T b) {
    T r;
    if (__builtin_mul_overflow(a, b, &r)) return std::nullopt;
    return r;
}

// `value` rounded up to a multiple of `alignment`, a power of two.
template <std::unsigned_integral T>
std::optional<T> checked_pad(T value, T alignment) {
    auto r = checked_add(value, static_cast<T>(alignment - 1));
    if (r) *r &= static_cast<T>(~(alignment - 1));
    return r;
}

}  // namespace pgs
