// The strict reader. What is refused (Error), what is accepted with a warning, and what is simply accepted follows one
// rule: refuse what cannot mean anything or would break a reader, warn about what llama.cpp or gguf-py would not write.
#include "gguf/header.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string_view>
#include <unordered_set>

#include "base/checked.hpp"
#include "base/error.hpp"

namespace pgs {

namespace {

constexpr std::uint64_t first_window = 1 << 20;
constexpr std::uint64_t fixed_header_bytes = 24;          // magic, version, number of tensors, number of keys
constexpr std::uint64_t smallest_kv = 8 + 1 + 4 + 1;      // key length, one letter, type, one byte
constexpr std::uint64_t smallest_tensor = 8 + 4 + 4 + 8;  // name length, n_dims, type, offset
constexpr std::size_t most_warnings = 200;

// The first bytes of the file in memory; grows by doubling, so it never holds more than twice what the header needs.
class Window {
public:
    explicit Window(Source& source) : source_(source) {}

    // Bytes [0, end) are readable afterwards; pointers from before are not. The caller has checked end <= size().
    void fetch(std::uint64_t end) {
        if (end <= have_) return;
        const std::uint64_t want = std::min(source_.size(), std::max({end, 2 * have_, first_window}));
        void* grown = std::realloc(bytes_.get(), want);
        if (!grown) throw std::bad_alloc();
        (void)bytes_.release();
        bytes_.reset(static_cast<char*>(grown));
        source_.read_at(have_, {reinterpret_cast<std::byte*>(bytes_.get()) + have_, want - have_});
        have_ = want;
    }
    const char* at(std::uint64_t offset) const { return bytes_.get() + offset; }

    // The string at `pos`, which moves behind it, if all of it is here already.
    bool string_at(std::uint64_t& pos, std::string_view& text) const {
        std::uint64_t length;
        if (have_ - pos < sizeof length) return false;
        std::memcpy(&length, at(pos), sizeof length);
        if (length > have_ - pos - sizeof length || length > max_string_bytes) return false;
        text = {at(pos + sizeof length), length};
        pos += sizeof length + length;
        return true;
    }

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    Source& source_;
    std::unique_ptr<char, Free> bytes_;
    std::uint64_t have_ = 0;
};

// Finds names that occur twice without a second copy of them: it holds indices into the vector that owns them.
template <typename Name>
class Names {
public:
    explicit Names(Name name) : set_(0, Hash{name}, Equal{name}) {}
    bool add(std::size_t index) { return set_.insert(index).second; }

private:
    struct Hash {
        Name name;
        std::size_t operator()(std::size_t i) const { return std::hash<std::string_view>{}(name(i)); }
    };
    struct Equal {
        Name name;
        bool operator()(std::size_t a, std::size_t b) const { return name(a) == name(b); }
    };
    std::unordered_set<std::size_t, Hash, Equal> set_;
};

std::string count_text(std::uint64_t n) {  // a count whose top bit is set was written as a negative number
    return n > INT64_MAX ? std::to_string(static_cast<std::int64_t>(n)) : std::to_string(n);
}

enum class Style { snake, hyphen_first, other };

// lower_snake.dot: segments of [a-z0-9_] with dots between. Architectures such as gpt-oss have a hyphen, so a key may
// have one in its first segment if that is the architecture.
Style key_style(std::string_view key) {
    bool hyphen = false;
    std::size_t segment = 0, length = 0;
    for (const char c : key) {
        if (c == '.') {
            if (length == 0) return Style::other;
            ++segment;
            length = 0;
            continue;
        }
        ++length;
        if (c == '-' && segment == 0)
            hyphen = true;
        else if (!((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'))
            return Style::other;
    }
    if (length == 0) return Style::other;
    return hyphen ? Style::hyphen_first : Style::snake;
}

class Reader {
public:
    Reader(Source& source, const TypeTable& types, const ReadOptions& options)
        : source_(source), types_(types), options_(options), window_(source), size_(source.size()) {}

    Header read() {
        read_fixed();
        read_metadata();
        read_tensors();
        check_layout();
        if (unlisted_warnings_ > 0)
            header_.warnings.push_back("and " + std::to_string(unlisted_warnings_) + " more warnings");
        return std::move(header_);
    }

private:
    Error bad(std::string problem, std::uint64_t offset, std::string object = {}) const {
        return Error(Kind::bad_file, std::move(problem)).in(source_.path()).on(std::move(object)).at(offset);
    }

    void warn(std::string problem, std::uint64_t offset, std::string object = {}) {
        if (options_.strict) throw bad(std::move(problem), offset, std::move(object));
        if (header_.warnings.size() >= most_warnings) {
            ++unlisted_warnings_;
            return;
        }
        header_.warnings.push_back(object.empty() ? std::move(problem) : object + ": " + problem);
    }

    std::uint64_t left() const { return size_ - pos_; }

    template <typename T>
    T take(const char* field, const std::string& object = {}) {
        if (left() < sizeof(T))
            throw bad(std::string("file ends inside the ") + field, pos_, object)
                .got(bytes_text(left()))
                .want(std::to_string(sizeof(T)))
                .advise("the file is truncated or damaged");
        window_.fetch(pos_ + sizeof(T));
        T word;
        std::memcpy(&word, window_.at(pos_), sizeof word);
        pos_ += sizeof word;
        return word;
    }

    // Valid until the next take: the window may move.
    std::string_view take_string(const char* field, const std::string& object = {}) {
        const std::uint64_t start = pos_;
        const auto length = take<std::uint64_t>(field, object);
        if (length > left())
            throw bad(std::string(field) + " runs past the end of the file", start, object)
                .got(count_text(length) + " bytes")
                .want("at most " + std::to_string(left()))
                .advise("the file is truncated or damaged");
        if (length > max_string_bytes)
            throw bad(std::string(field) + " is too long", start, object).got(bytes_text(length)).want("at most 1 GiB");
        window_.fetch(pos_ + length);
        const std::string_view text(window_.at(pos_), length);
        pos_ += length;
        return text;
    }

    void read_fixed() {
        if (size_ == 0) throw bad("file is empty", 0);
        const auto head_bytes = std::min<std::uint64_t>(size_, 64);
        window_.fetch(head_bytes);
        const std::string_view head(window_.at(0), head_bytes);
        if (!head.starts_with("GGUF"))
            throw bad("not a GGUF file", 0, "magic")
                .got("'" + shown(head.substr(0, 4)) + "'")
                .want("'GGUF'")
                .advise(std::string(foreign_format_hint(head)));
        if (size_ < fixed_header_bytes)
            throw bad("file ends inside its header", 0)
                .got(bytes_text(size_))
                .want("at least 24")
                .advise("the file is truncated");
        pos_ = 4;
        const auto version = take<std::uint32_t>("version");
        if (version != 0 && (version & 0xFFFF) == 0)
            throw bad("big-endian GGUF file", 4, "version")
                .got(std::to_string(version))
                .want("2 or 3")
                .advise("convert it with gguf-py's gguf_convert_endian");
        if (version == 1)
            throw bad("GGUF version 1 is no longer supported", 4, "version")
                .got("1")
                .want("2 or 3")
                .advise("convert the model again");
        if (version != 2 && version != 3)
            throw bad("unknown GGUF version", 4, "version").got(std::to_string(version)).want("2 or 3");
        header_.version = version;

        n_tensors_ = take<std::uint64_t>("number of tensors");
        n_kv_ = take<std::uint64_t>("number of keys");
        check_count(n_tensors_, smallest_tensor, 8, "n_tensors");
        check_count(n_kv_, smallest_kv, 16, "n_kv");
        // Neither product overflows: each count was bounded by the size of the file.
        if (n_tensors_ * smallest_tensor > left() - n_kv_ * smallest_kv)
            throw bad("the file is too short for its keys and tensors", 8)
                .got(std::to_string(n_tensors_) + " tensors, " + std::to_string(n_kv_) + " keys");
    }

    void check_count(std::uint64_t count, std::uint64_t smallest, std::uint64_t offset, const char* field) const {
        if (count > left() / smallest)
            throw bad("the file is too short for this count", offset, field)
                .got(count_text(count))
                .want("at most " + std::to_string(left() / smallest));
    }

    void read_metadata() {
        auto& metadata = header_.metadata;
        Names keys([&metadata](std::size_t i) { return std::string_view(metadata[i].first); });
        std::vector<std::pair<std::size_t, std::uint64_t>> hyphenated;  // index, offset
        for (std::uint64_t i = 0; i < n_kv_; ++i) {
            const std::uint64_t start = pos_;
            {
                const auto key = take_string("key", "key " + std::to_string(i));
                metadata.emplace_back(std::string(key), Value());
            }
            const std::string& key = metadata.back().first;
            const std::string object = shown(key);
            if (key.empty()) throw bad("key " + std::to_string(i) + " is empty", start);
            if (key.find('\0') != std::string::npos) throw bad("key contains a NUL byte", start, object);
            if (!is_utf8(key)) throw bad("key is not UTF-8", start, object);
            if (!keys.add(metadata.size() - 1)) throw bad("duplicate key", start, object);
            if (key.size() > max_key_bytes) warn("key is longer than 65535 bytes", start, object);
            switch (key_style(key)) {
                case Style::snake: break;
                case Style::hyphen_first: hyphenated.emplace_back(metadata.size() - 1, start); break;
                case Style::other: warn("key is not in lower_snake.dot form", start, object); break;
            }
            const std::uint64_t value_at = pos_;
            read_value(metadata.back().second, object);
            if (metadata.back().first == alignment_key) set_alignment(metadata.back().second, value_at);
        }
        if (hyphenated.empty()) return;
        std::string_view architecture;
        for (const auto& [key, value] : metadata)
            if (key == "general.architecture" && value.type == ValueType::str) architecture = value.raw;
        for (const auto& [i, start] : hyphenated) {
            const std::string_view key = metadata[i].first;
            if (key.substr(0, key.find('.')) != architecture)
                warn("key is not in lower_snake.dot form", start, shown(key));
        }
    }

    void read_value(Value& value, const std::string& object) {
        value.type = take_value_type(object);
        const std::uint64_t start = pos_;
        if (value.type == ValueType::array) return read_array(value, object);
        if (value.type == ValueType::str) {
            value.raw = take_string("string", object);
            if (!is_utf8(value.raw)) warn("string is not UTF-8", start, object);
            return;
        }
        take_raw(value, value_type_bytes(value.type), object);
        if (value.type == ValueType::boolean && static_cast<unsigned char>(value.raw[0]) > 1)
            warn("bool is neither 0 nor 1", start, object);
    }

    void read_array(Value& value, const std::string& object) {
        const std::uint64_t start = pos_;
        value.element = take_value_type(object);
        if (value.element == ValueType::array) throw bad("array of arrays", start, object);
        const std::uint64_t count_at = pos_;
        value.count = take<std::uint64_t>("array length", object);
        const std::uint64_t smallest = value.element == ValueType::str ? 8 : value_type_bytes(value.element);
        if (value.count > left() / smallest)
            throw bad("array runs past the end of the file", count_at, object)
                .got(count_text(value.count) + " elements")
                .want("at most " + std::to_string(left() / smallest))
                .advise("the file is truncated or damaged");
        if (value.count > max_array_count)
            throw bad("array is too long", count_at, object)
                .got(std::to_string(value.count) + " elements")
                .want("at most 2^30");
        if (value.element == ValueType::str) return read_strings(value, object);
        const std::uint64_t at = pos_;
        take_raw(value, value.count * smallest, object);  // bounded above by the file: no overflow
        if (value.element != ValueType::boolean) return;
        const auto odd = std::ranges::find_if(value.raw, [](char c) { return static_cast<unsigned char>(c) > 1; });
        if (odd != value.raw.end())
            warn("array has a bool that is neither 0 nor 1", at + static_cast<std::uint64_t>(odd - value.raw.begin()),
                 object);
    }

    void read_strings(Value& value, const std::string& object) {
        const std::uint64_t start = pos_;
        bool all_short = true;
        for (std::uint64_t i = 0; i < value.count; ++i) {
            std::string_view text;
            if (!window_.string_at(pos_, text)) text = take_string("string", object);
            all_short &= text.size() < 0x80;
        }
        value.raw.assign(window_.at(start), pos_ - start);
        // The eight bytes of a length below 128 are ASCII, so they end the text before and after them: one check of all
        // bytes is a check of each string, and several times as fast.
        if (all_short && is_utf8(value.raw)) return;
        std::uint64_t bad_strings = 0, first = 0;
        for (std::uint64_t at = start; at < pos_;) {
            const std::uint64_t begin = at;
            std::string_view text;
            window_.string_at(at, text);
            if (!is_utf8(text) && bad_strings++ == 0) first = begin;
        }
        if (bad_strings > 0)
            warn("array has " + std::to_string(bad_strings) + " strings that are not UTF-8", first, object);
    }

    ValueType take_value_type(const std::string& object) {
        const std::uint64_t at = pos_;
        const auto id = take<std::uint32_t>("value type", object);
        if (id >= value_type_count)
            throw bad("unknown value type", at, object)
                .got(std::to_string(static_cast<std::int32_t>(id)))
                .want("0..12");
        return static_cast<ValueType>(id);
    }

    void take_raw(Value& value, std::uint64_t bytes, const std::string& object) {
        if (bytes > left())
            throw bad("file ends inside a value", pos_, object)
                .got(bytes_text(left()))
                .want(std::to_string(bytes))
                .advise("the file is truncated or damaged");
        window_.fetch(pos_ + bytes);
        if (bytes > 0) value.raw.assign(window_.at(pos_), bytes);
        pos_ += bytes;
    }

    void set_alignment(const Value& value, std::uint64_t at) {
        if (value.type != ValueType::u32)
            throw bad("wrong value type", at, alignment_key).got(value_type_name(value.type)).want("u32");
        std::uint32_t alignment;
        std::memcpy(&alignment, value.raw.data(), sizeof alignment);
        if (!std::has_single_bit(alignment) || alignment > max_alignment)
            throw bad("unusable alignment", at + 4, alignment_key)  // behind the type
                .got(std::to_string(alignment))
                .want("a power of two, at most 1048576");
        header_.alignment = alignment;
    }

    void read_tensors() {
        auto& tensors = header_.tensors;
        Names names([&tensors](std::size_t i) { return std::string_view(tensors[i].name); });
        for (std::uint64_t i = 0; i < n_tensors_; ++i) {
            const std::uint64_t start = pos_;
            TensorInfo tensor;
            tensor.name = take_string("tensor name", "tensor " + std::to_string(i));
            const std::string object = tensor.name.empty() ? "tensor " + std::to_string(i) : shown(tensor.name);
            if (tensor.name.find('\0') != std::string::npos)
                throw bad("tensor name contains a NUL byte", start, object);
            if (!is_utf8(tensor.name)) throw bad("tensor name is not UTF-8", start, object);
            if (tensor.name.empty()) warn("tensor name is empty", start, object);
            if (tensor.name.size() > max_tensor_name_bytes)
                warn("tensor name is longer than 63 bytes, the limit of llama.cpp", start, object);

            const std::uint64_t dims_at = pos_;
            const auto n_dims = take<std::uint32_t>("number of dimensions", object);
            if (n_dims > max_tensor_dims)
                throw bad("too many dimensions", dims_at, object).got(std::to_string(n_dims)).want("at most 4");
            for (std::uint32_t d = 0; d < n_dims; ++d) tensor.ne.push_back(take<std::uint64_t>("dimensions", object));
            const std::uint64_t type_at = pos_;
            tensor.type = take<std::int32_t>("tensor type", object);
            try {
                tensor.nbytes = tensor_bytes(types_, tensor.type, tensor.ne);
            } catch (Error& e) {
                e.kind = Kind::bad_file;
                e.in(source_.path()).on(object).at(type_is_known(tensor.type) ? dims_at : type_at);
                throw;
            }
            offset_fields_.push_back(pos_);
            tensor.offset = take<std::uint64_t>("tensor offset", object);
            tensors.push_back(std::move(tensor));
            if (!names.add(tensors.size() - 1)) throw bad("duplicate tensor name", start, object);
        }
    }

    bool type_is_known(std::int32_t type) const {
        return type >= 0 && static_cast<std::size_t>(type) < types_.size() &&
               types_[static_cast<std::size_t>(type)].block > 0;
    }

    Error bad_offset(const char* problem, std::size_t i) const {
        const auto& tensor = header_.tensors[i];
        return bad(problem, offset_fields_[i], shown(tensor.name)).got("offset " + std::to_string(tensor.offset));
    }

    void check_layout() {
        const std::uint64_t alignment = header_.alignment;
        const auto padded_header = checked_pad(pos_, alignment);
        if (!padded_header) throw bad("size of the header overflows", pos_);
        header_.data_offset = *padded_header;
        warn_nonzero_header_padding();

        std::uint64_t sum = 0;
        std::vector<std::size_t> order;  // of the tensors that have bytes
        for (std::size_t i = 0; i < header_.tensors.size(); ++i) {
            const auto& tensor = header_.tensors[i];
            if (tensor.offset % alignment != 0)
                throw bad_offset("tensor offset is not aligned", i).want("a multiple of " + std::to_string(alignment));
            const auto padded = checked_pad(tensor.nbytes, alignment);
            const auto end = padded ? checked_add(tensor.offset, *padded) : std::nullopt;
            const auto new_sum = padded ? checked_add(sum, *padded) : std::nullopt;
            if (!end || !new_sum || !checked_add(*end, header_.data_offset))
                throw bad_offset("end of the tensor overflows", i).want("less than 2^64 bytes in all");
            sum = *new_sum;
            if (tensor.nbytes > 0) order.push_back(i);
        }

        std::uint64_t last = 0;
        bool ascending = true;
        for (const auto i : order) {
            ascending &= header_.tensors[i].offset >= last;
            last = header_.tensors[i].offset;
        }
        if (!ascending) {
            warn("tensor data is not in the order of the tensors", offset_fields_[order.front()]);
            std::ranges::sort(order, [this](std::size_t a, std::size_t b) {
                return header_.tensors[a].offset < header_.tensors[b].offset;
            });
        }
        const std::uint64_t data_end = check_gaps(order);
        check_end(data_end);
    }

    // Overlaps, gaps and padding between the tensors, in the order of their data. Returns where the last one ends.
    std::uint64_t check_gaps(const std::vector<std::size_t>& order) {
        std::uint64_t end = 0, padded = 0, gaps = 0, first_gap = 0;
        for (std::size_t k = 0; k < order.size(); ++k) {
            const auto& tensor = header_.tensors[order[k]];
            if (tensor.offset < end)
                throw bad_offset("tensor data overlaps", order[k])
                    .want("at least " + std::to_string(end) + ", the end of " +
                          shown(header_.tensors[order[k - 1]].name));
            if (k == 0 && tensor.offset > 0)
                warn("first tensor is not at the start of the data", offset_fields_[order[k]], shown(tensor.name));
            else if (tensor.offset > padded && gaps++ == 0)
                first_gap = offset_fields_[order[k]];
            end = tensor.offset + tensor.nbytes;
            padded = *checked_pad(end, header_.alignment);  // checked in check_layout
        }
        if (gaps > 0) warn("tensor data has " + std::to_string(gaps) + " gaps", first_gap);
        return end;
    }

    // The file against its end of data, an offset in the data section.
    void check_end(std::uint64_t data_end) {
        const std::uint64_t have = size_ > header_.data_offset ? size_ - header_.data_offset : 0;
        const std::uint64_t padded_end = *checked_pad(data_end, header_.alignment);
        if (have < data_end) {
            if (options_.metadata_only) return;
            for (std::size_t i = 0; i < header_.tensors.size(); ++i) {
                const auto& tensor = header_.tensors[i];
                if (tensor.nbytes > 0 && tensor.offset + tensor.nbytes > have)
                    throw bad_offset(have == 0 ? "the file has no tensor data" : "tensor data ends beyond the file", i)
                        .got("a file of " + std::to_string(size_) + " bytes")
                        .want("at least " + std::to_string(header_.data_offset + tensor.offset + tensor.nbytes))
                        .advise("the file is truncated: download or copy it again");
            }
        }
        for (std::size_t i = 0; i < header_.tensors.size(); ++i)
            if (header_.tensors[i].nbytes == 0 && header_.tensors[i].offset > std::max(have, padded_end) &&
                !options_.metadata_only)
                throw bad_offset("tensor offset is beyond the end of the file", i);

        if (have > padded_end)
            warn("file has " + std::to_string(have - padded_end) + " bytes after the last tensor",
                 header_.data_offset + padded_end);
        else if (have < padded_end || (size_ < header_.data_offset && !header_.tensors.empty()))
            warn("file lacks the padding after its last tensor", size_);
        warn_nonzero_tensor_padding(have);
    }

    void warn_nonzero_header_padding() {
        const std::uint64_t end = std::min(size_, header_.data_offset);
        window_.fetch(end);
        for (std::uint64_t at = pos_; at < end; ++at)
            if (*window_.at(at) != 0) return warn("header padding is not zero", at);
    }

    // Looks at the bytes between the tensors, at most as many as the header has (a file can declare padding of 1 MiB
    // per tensor, and opening must cost no more than its header).
    void warn_nonzero_tensor_padding(std::uint64_t have) {
        std::uint64_t budget = std::max<std::uint64_t>(pos_, 1 << 16);
        char buffer[4096];
        for (const auto& tensor : header_.tensors) {
            if (tensor.nbytes == 0) continue;
            const std::uint64_t end = tensor.offset + tensor.nbytes;
            const std::uint64_t stop = std::min(have, *checked_pad(end, header_.alignment));
            for (std::uint64_t at = end; at < stop;) {
                const auto n = std::min<std::uint64_t>(stop - at, sizeof buffer);
                if (n > budget) return;
                budget -= n;
                source_.read_at(header_.data_offset + at, {reinterpret_cast<std::byte*>(buffer), n});
                for (std::uint64_t j = 0; j < n; ++j)
                    if (buffer[j] != 0)
                        return warn("padding is not zero", header_.data_offset + at + j, shown(tensor.name));
                at += n;
            }
        }
    }

    Source& source_;
    const TypeTable& types_;
    const ReadOptions& options_;
    Window window_;
    const std::uint64_t size_;
    std::uint64_t pos_ = 0;
    std::uint64_t n_tensors_ = 0, n_kv_ = 0;
    std::vector<std::uint64_t> offset_fields_;  // where in the file each tensor's offset is
    std::uint64_t unlisted_warnings_ = 0;
    Header header_;
};

}  // namespace

Header read_header(Source& source, const TypeTable& types, const ReadOptions& options) {
    return Reader(source, types, options).read();
}

}  // namespace pgs
