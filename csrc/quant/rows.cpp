#include "quant/rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

#include "base/error.hpp"
#include "ggml.h"
#include "quant/dispatch.hpp"
#include "quant/grids.hpp"

// ggml is compiled with these names in place of printf and fprintf: a library inside a Python host must not print.
extern "C" {
int pgs_quiet_printf(const char*, ...) { return 0; }
int pgs_quiet_fprintf(std::FILE*, const char*, ...) { return 0; }
}

namespace pgs {

namespace {

// Bits of float32: see Rows.
constexpr std::uint32_t infinity_bits = 0x7f800000, extreme_bits = (127 + 48) << 23;

// The last net under the checks below. ggml's assertions call this instead of ending the process; ggml is compiled with
// -fexceptions, so the exception passes through its frames (what the failed call had allocated is leaked).
void on_ggml_abort(const char* message) {
    Error e(Kind::bad_plan, "ggml cannot encode these values");
    e.found = message;
    e.hint = "values or importance of extreme size; another type may take them";
    throw e;
}

void install_abort_net() {
    static std::once_flag once;
    std::call_once(once, [] { ggml_set_abort_callback(on_ggml_abort); });
}

Error value_error(const char* problem, std::uint64_t row, std::uint64_t column, float value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
    Error e(Kind::bad_plan,
            std::string(problem) + " in row " + std::to_string(row) + ", column " + std::to_string(column));
    e.found = text;
    return e;
}

}  // namespace

std::uint64_t chunk_rows(std::uint64_t row_elements) {
    constexpr std::uint64_t chunk_elements = 32768;
    return std::max<std::uint64_t>(1, chunk_elements / std::max<std::uint64_t>(1, row_elements));
}

Decoder::Decoder(const TypeFacts& type, std::uint64_t row_elements)
    : row_elements_(row_elements),
      row_bytes_(row_bytes(type, row_elements)),
      is_float32_(type.id == GGML_TYPE_F32),
      lane_(kernels().decode[type.id]),
      ggml_(ggml_get_type_traits(static_cast<ggml_type>(type.id))->to_float) {
    if (!type.decodes) throw Error(Kind::unsupported, "no decoder for this type").got(type.name);
}

void Decoder::decode(const std::byte* source, float* target, std::uint64_t rows) const {
    const std::uint64_t elements = rows * row_elements_;
    if (elements == 0) return;
    if (is_float32_) {
        std::memcpy(target, source, elements * sizeof(float));
        return;
    }
    if (lane_) return lane_(reinterpret_cast<const unsigned char*>(source), target, elements);
    std::vector<std::byte> aligned;
    if (reinterpret_cast<std::uintptr_t>(source) % 4 != 0) {  // the block structs of ggml hold 16- and 32-bit members
        aligned.assign(source, source + rows * row_bytes_);
        source = aligned.data();
    }
    ggml_(source, target, static_cast<std::int64_t>(elements));
}

const float* Decoder::in_place(const std::byte* source) const {
    const bool as_is = is_float32_ && reinterpret_cast<std::uintptr_t>(source) % alignof(float) == 0;
    return as_is ? reinterpret_cast<const float*>(source) : nullptr;
}

Encoder::Encoder(const TypeFacts& type, std::uint64_t row_elements, bool best)
    : type_(type),
      row_elements_(row_elements),
      row_bytes_(row_bytes(type, row_elements)),
      lanes_(kernels()),
      best_(best && type.has_best) {
    if (!type.encodes) throw Error(Kind::unsupported, "no encoder for this type").got(type.name);
}

// What ggml wrote but its own validation, and so llama.cpp, rejects: an infinite scale or half, an MXFP4 exponent of 255
// (written where the largest value of a block lies in [2^-126, 2^-125)).
Error Encoder::invalid(const float* source, const std::byte* target, std::uint64_t rows,
                       std::uint64_t first_row) const {
    const auto bad = first_invalid_block(type_, target, rows * row_bytes_);
    if (!bad) return {Kind::bad_plan, type_.name + " has no valid encoding of these values"};
    const std::uint64_t at = *bad * type_.block;
    const float* x = source + at;
    const float* largest =
        std::max_element(x, x + type_.block, [](float a, float b) { return (a < 0 ? -a : a) < (b < 0 ? -b : b); });
    return value_error((type_.name + " has no valid encoding of the block").c_str(), first_row + at / row_elements_,
                       at % row_elements_, *largest)
        .advise("its largest value is out of range; choose another type for this tensor");
}

void Encoder::encode(const float* source, std::byte* target, std::uint64_t rows, const float* importance,
                     std::uint64_t first_row) const {
    const std::uint64_t elements = rows * row_elements_;
    if (elements == 0) return;
    const std::uint32_t largest = lanes_.largest(source, elements);
    if (largest >= infinity_bits) {
        for (std::uint64_t i = 0; i < elements; ++i)
            if (!std::isfinite(source[i]))
                throw value_error("not a finite number", first_row + i / row_elements_, i % row_elements_, source[i]);
    }
    if (!importance && type_.needs_importance)
        throw Error(Kind::bad_plan, "this type needs an importance matrix").got(type_.name);
    if (!best_ && !type_.uses_importance) importance = nullptr;
    const Grid* grid = grid_of(type_.id);
    const bool ordinary =
        largest < extreme_bits && (!importance || lanes_.largest(importance, row_elements_) < extreme_bits);
    auto encoded_by = [&](pgs::Encode kernel) {
        return ordinary && kernel &&
               kernel({source, importance, rows, row_elements_, reinterpret_cast<unsigned char*>(target), grid});
    };
    bool done = encoded_by(best_ ? lanes_.encode_best[type_.id] : lanes_.encode[type_.id]);
    if (!done && best_) {
        if (rows > 1) {  // only the rows that need it become ggml's
            for (std::uint64_t row = 0; row < rows; ++row)
                encode(source + row * row_elements_, target + row * row_bytes_, 1, importance, first_row + row);
            return;
        }
        done = encoded_by(lanes_.encode[type_.id]);
    }
    const auto id = static_cast<ggml_type>(type_.id);
    if (!done) {
        install_abort_net();
        ggml_quantize_chunk(id, source, target, 0, static_cast<std::int64_t>(rows),
                            static_cast<std::int64_t>(row_elements_), type_.uses_importance ? importance : nullptr);
    }
    if (!ggml_validate_row_data(id, target, rows * row_bytes_)) throw invalid(source, target, rows, first_row);
}

std::optional<std::uint64_t> first_invalid_block(const TypeFacts& type, const std::byte* data, std::uint64_t nbytes) {
    const std::uint64_t bytes = type.block_bytes;
    const auto id = static_cast<ggml_type>(type.id);
    constexpr std::uint64_t step = 4096;  // blocks: look at single ones only where some are bad
    for (std::uint64_t block = 0; block < nbytes / bytes; block += step) {
        const std::uint64_t n = std::min(step, nbytes / bytes - block);
        if (ggml_validate_row_data(id, data + block * bytes, n * bytes)) continue;
        for (std::uint64_t i = block; i < block + n; ++i)
            if (!ggml_validate_row_data(id, data + i * bytes, bytes)) return i;
    }
    return std::nullopt;
}

void check_importance(const float* importance, std::uint64_t rows, std::uint64_t row_elements,
                      std::uint64_t first_row) {
    for (std::uint64_t row = 0; row < rows; ++row) {
        const float* x = importance + row * row_elements;
        bool any = row_elements == 0;
        for (std::uint64_t i = 0; i < row_elements; ++i) {
            if (!std::isfinite(x[i])) throw value_error("importance is not a finite number", first_row + row, i, x[i]);
            if (x[i] < 0) throw value_error("importance is negative", first_row + row, i, x[i]);
            any |= x[i] > 0;
        }
        if (!any) throw Error(Kind::bad_plan, "importance is all zero in row " + std::to_string(first_row + row));
    }
}

}  // namespace pgs
