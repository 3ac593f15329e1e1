// Encodes and decodes cases from stdin to stdout with the core's kernels, where there is no Python: test_neon.py. A
// case is type and what to do (0 encode, 1 encode best, 2 decode; int32 each), rows, row_elements, 1 if there is importance
// (uint64 each), the rows and the importance row; the answer is the result behind its size (uint64), or the size 0 for an
// error.
#include <cstdio>
#include <vector>

#include "base/error.hpp"
#include "quant/dispatch.hpp"
#include "quant/rows.hpp"
#include "quant/types.hpp"

template <class T>
bool take(T* to, std::size_t n) {
    return std::fread(to, sizeof(T), n, stdin) == n;
}

void give(const void* bytes, std::uint64_t n) {
    std::fwrite(&n, sizeof n, 1, stdout);
    std::fwrite(bytes, 1, n, stdout);
}

int main() {
    std::fprintf(stderr, "%s\n", pgs::choose_kernels().name);
    std::int32_t type[2];
    std::uint64_t size[3];
    while (take(type, 2) && take(size, 3)) {
        const pgs::TypeFacts& facts = pgs::type_facts(type[0]);
        if (type[1] == 2) {
            std::vector<std::byte> rows(size[0] * pgs::row_bytes(facts, size[1]));
            std::vector<float> out(size[0] * size[1]);
            if (!take(rows.data(), rows.size())) return 1;
            pgs::Decoder(facts, size[1]).decode(rows.data(), out.data(), size[0]);
            give(out.data(), out.size() * sizeof(float));
            continue;
        }
        std::vector<float> rows(size[0] * size[1]), importance(size[2] ? size[1] : 0);
        if (!take(rows.data(), rows.size()) || !take(importance.data(), importance.size())) return 1;
        std::vector<std::byte> out(size[0] * pgs::row_bytes(facts, size[1]));
        std::uint64_t n = out.size();
        try {
            const pgs::Encoder encoder(facts, size[1], type[1] != 0);
            encoder.encode(rows.data(), out.data(), size[0], size[2] ? importance.data() : nullptr, 0);
        } catch (const pgs::Error&) {
            n = 0;
        }
        give(out.data(), n);
    }
}
