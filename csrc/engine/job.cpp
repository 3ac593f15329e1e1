#include "engine/job.hpp"

#include <cmath>
#include <unordered_set>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "quant/rows.hpp"
#include "quant/types.hpp"

namespace pgs {

bool by_row(const Job& job) {
    const Work work = work_of(job);
    return work == Work::encode || work == Work::remap || work == Work::merge;
}

Work work_of(const Job& job) {
    if (job.remap) return Work::remap;
    if (job.merge) return Work::merge;
    if (job.source_type != job.target_type) return Work::encode;
    return job.runs.empty() ? Work::literal : Work::move;
}

namespace {

Error bad(const Job& job, const char* problem) { return Error(Kind::bad_plan, problem).on(job.name); }

void check_importance_rows(const Job& job, const std::vector<std::shared_ptr<Source>>& sources) {
    if (job.importance_rows.empty()) return;
    if (work_of(job) != Work::encode && !job.merge) throw bad(job, "importance of a tensor that is not encoded");
    if (job.rows % job.importance_rows.size()) throw bad(job, "importance does not fit the rows");
    const std::uint64_t bytes = job.row_elements * sizeof(float);  // row_bytes has bounded the row
    for (const ImportanceRow& row : job.importance_rows) {
        if (!std::isfinite(row.divisor) || row.divisor <= 0)
            throw bad(job, "importance divisor is not a positive number").got(std::to_string(row.divisor));
        if (row.held) continue;  // complete has checked it
        if (row.source >= sources.size())
            throw bad(job, "no such source of importance").got(std::to_string(row.source));
        if (row.parts.empty()) throw bad(job, "an importance row of no parts");
        for (const ImportanceRow::Part& part : row.parts) {
            const auto end = checked_add(part.offset, bytes);
            if (!end || *end > sources[row.source]->size())
                throw bad(job, "importance row reaches beyond its source").at(part.offset);
            if (part.order && !(job.merge && *part.order < job.merge->orders.size() &&
                                job.merge->orders[*part.order].size() == job.row_elements))
                throw bad(job, "no such order of an importance row");
        }
        if (row.parts.size() > 1 && !job.merge) throw bad(job, "sums of importance without a merge");
    }
}

// source_bytes: of all runs.
void check_merge(const Job& job, std::uint64_t source_bytes) {
    const Merge& merge = *job.merge;
    const auto rows = checked_mul<std::uint64_t>(merge.slice_rows, merge.groups.size());
    if (!merge.slice_rows || rows != job.rows) throw bad(job, "groups do not give the rows");
    const auto slice_bytes = checked_mul(merge.slice_rows, job.source_row_bytes);
    if (!slice_bytes || !*slice_bytes || source_bytes % *slice_bytes) throw bad(job, "the source has no whole slices");
    const std::uint64_t neurons = merge.columns ? job.row_elements : merge.slice_rows;
    for (const auto& order : merge.orders) {
        std::vector<bool> seen(neurons);
        if (order.size() != neurons) throw bad(job, "an order of another length");
        for (const std::uint32_t i : order) {
            if (i >= neurons || seen[i]) throw bad(job, "an order that is not a permutation");
            seen[i] = true;
        }
    }
    bool decodes = job.source_type != job.target_type;
    for (const auto& group : merge.groups) {
        if (group.empty()) throw bad(job, "an empty group");
        for (const Merge::Member& member : group) {
            if (member.slice >= source_bytes / *slice_bytes)
                throw bad(job, "no such slice").got(std::to_string(member.slice));
            if (member.order && *member.order >= merge.orders.size()) throw bad(job, "no such order");
            if (!std::isfinite(member.weight)) throw bad(job, "a weight that is not finite");
            decodes |= group.size() > 1 || member.order;
        }
    }
    const TypeFacts& source = type_facts(job.source_type);
    const TypeFacts& target = type_facts(job.target_type);
    if (decodes && (!source.decodes || !target.encodes))
        throw Error(Kind::unsupported, "experts of this type cannot be merged")
            .on(job.name)
            .got(source.name + " to " + target.name);
}

}  // namespace

void complete(Job& job) {
    job.source_row_bytes = row_bytes(type_facts(job.source_type), job.row_elements);
    job.target_row_bytes = row_bytes(type_facts(job.target_type), job.row_elements);
    const auto bytes = checked_mul(job.rows, job.target_row_bytes);
    if (!bytes) throw bad(job, "size overflows");
    job.target_bytes = *bytes;
    std::unordered_set<const void*> checked;
    for (std::size_t i = 0; i < job.importance_rows.size(); ++i) {
        const auto& held = job.importance_rows[i].held;
        if (!held || !checked.insert(held.get()).second) continue;
        if (held->size() != job.row_elements) throw bad(job, "importance does not fit the rows");
        try {
            check_importance(held->data(), 1, job.row_elements, i);
        } catch (Error& e) {
            e.object = job.name;
            throw;
        }
    }
}

void check_job(const Job& job, const std::vector<std::shared_ptr<Source>>& sources) {
    const TypeFacts& source = type_facts(job.source_type);
    const TypeFacts& target = type_facts(job.target_type);
    if (job.row_elements % source.block || job.row_elements % target.block)
        throw bad(job, "row length is not a multiple of the block");
    if (job.rows > INT64_MAX) throw bad(job, "size overflows");
    const auto source_bytes = checked_mul(job.rows, job.source_row_bytes);
    if (!source_bytes || !checked_add(job.target_offset, job.target_bytes)) throw bad(job, "size overflows");
    std::uint64_t sum = job.literal.size();
    for (const Run& run : job.runs) {
        if (run.source) {
            if (*run.source >= sources.size()) throw bad(job, "no such source");
            const auto end = checked_add(run.offset, run.nbytes);
            if (!end || *end > sources[*run.source]->size()) throw bad(job, "run reaches beyond its source");
        }
        const auto next = checked_add(sum, run.nbytes);
        if (!next) throw bad(job, "size overflows");
        sum = *next;
    }
    if (!job.literal.empty() && !job.runs.empty()) throw bad(job, "both runs and literal");
    if (job.merge) {
        if (job.remap || !job.literal.empty()) throw bad(job, "a merge of no tensor");
        check_merge(job, sum);
    } else if (sum != *source_bytes) {
        throw bad(job, "source size does not follow from the shape");
    }
    if (job.source_type != job.target_type && (!source.decodes || !target.encodes))
        throw Error(Kind::unsupported, "no conversion between these types")
            .on(job.name)
            .got(source.name + " to " + target.name);
    // The encoders write blocks in place; the buffer agrees with the file in its lowest bits. GGUF aligns to 8 at least.
    if ((work_of(job) == Work::encode || job.merge) && job.target_bytes && job.target_offset % 8)
        throw bad(job, "an encoded target is not aligned");
    if (job.remap) {
        if (source.name != "I32" || job.source_type != job.target_type) throw bad(job, "remap needs I32");
        if (job.remap->column == 0 || job.row_elements % job.remap->column)
            throw bad(job, "remap column does not divide the row");
    }
    check_importance_rows(job, sources);
}

}  // namespace pgs
