// A step reads every weight once: of small pages a processor remembers a hundredth of them, and its own prefetching stops at their ends.
// SmolLM2-135M in bfloat16 on Zen 3: a step of 8 rows spends 20 % less time in its linears than on small pages, one of 1 row 7 %.
#include "weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>

namespace sluice {
namespace {

constexpr int64_t huge_page = 2 << 20, region_bytes = 64 << 20, line = 64;

// One mapping, given back when the last tensor in it goes. Memory is taken from the system when it is first written.
class Region {
public:
    explicit Region(int64_t bytes) : mapped_((size_t)(bytes + huge_page)), end_(bytes) {
        memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        TORCH_CHECK(memory_ != MAP_FAILED, bytes, " bytes of weights cannot be had: ", std::strerror(errno));
        start_ = (char*)(((uintptr_t)memory_ + huge_page - 1) / huge_page * huge_page);
#ifdef MADV_HUGEPAGE
        madvise(start_, (size_t)bytes, MADV_HUGEPAGE);  // a wish: small pages do as well
#endif
    }
    ~Region() { munmap(memory_, mapped_); }
    Region(const Region&) = delete;

    // Null when it does not fit.
    void* take(int64_t bytes) {
        if (bytes > end_ - used_) return nullptr;
        char* taken = start_ + used_;
        used_ = (used_ + bytes + line - 1) / line * line;
        return taken;
    }

private:
    void* memory_;
    size_t mapped_;
    char* start_;
    int64_t end_;
    int64_t used_ = 0;
};

}  // namespace

at::Tensor weight_memory(int64_t bytes) {
    TORCH_CHECK(bytes >= 0 && bytes < INT64_MAX - huge_page, "bytes must not be negative, and some must be left");
    static std::mutex one_at_a_time;
    static std::weak_ptr<Region> last;
    std::lock_guard<std::mutex> hold(one_at_a_time);
    std::shared_ptr<Region> region = last.lock();
    void* taken = region ? region->take(bytes) : nullptr;
    if (!taken) {
        region = std::make_shared<Region>(std::max(bytes, region_bytes));
        last = region;
        taken = region->take(bytes);
    }
    return at::from_blob(taken, {bytes}, [region](void*) {}, at::kByte);
}

}  // namespace sluice
