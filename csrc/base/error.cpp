#include "base/error.hpp"

#include <cerrno>
#include <system_error>

namespace pgs {

Error os_error(int os_errno, const std::string& action, const std::string& path) {
    const bool space = os_errno == ENOSPC || os_errno == EDQUOT || os_errno == EFBIG;
    Error e(space ? Kind::out_of_space : Kind::os, action + ": " + std::generic_category().message(os_errno));
    e.path = path;
    e.os_errno = os_errno;
    if (os_errno == EFBIG)
        e.hint = "the file size limit of this process (ulimit -f) or of the file system is too small";
    if (os_errno == EDQUOT) e.hint = "the disk quota of this user is used up";
    return e;
}

std::string bytes_text(std::uint64_t n) { return std::to_string(n) + " bytes"; }

}  // namespace pgs
