// A step reads every weight once, and blocks of a cache in any order: of small pages a processor remembers a hundredth of them, and its own
// prefetching stops at their ends. SmolLM2-135M in bfloat16 on Zen 3: a step of 8 rows spends 20 % less time in its linears than on small
// pages, one of 1 row 7 %, and one of 32 rows over 512 tokens each 12 % less as a whole.
#include "memory.h"

#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace sluice {
namespace {

constexpr int64_t huge_page = 2 << 20, region_bytes = 64 << 20, line = 64;

// Zeros, given back with the object.
class Mapping {
public:
    explicit Mapping(int64_t bytes) : mapped_((size_t)(bytes + huge_page)) {
        memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        TORCH_CHECK(memory_ != MAP_FAILED, bytes, " bytes cannot be had: ", std::strerror(errno));
        start_ = (char*)(((uintptr_t)memory_ + huge_page - 1) / huge_page * huge_page);
#ifdef MADV_HUGEPAGE
        madvise(start_, (size_t)bytes, MADV_HUGEPAGE);  // a wish: small pages do as well
#endif
    }
    ~Mapping() { munmap(memory_, mapped_); }
    Mapping(const Mapping&) = delete;

    char* start() const { return start_; }

private:
    void* memory_;
    size_t mapped_;
    char* start_;
};

// One mapping for many tensors, given back when the last of them goes.
class Region {
public:
    explicit Region(int64_t bytes) : mapping_(bytes), end_(bytes) {}

    // What is left begins at next().
    bool has(int64_t bytes) const { return bytes <= end_ - used_; }
    void* next() const { return mapping_.start() + used_; }
    void take(int64_t bytes) { used_ = (used_ + bytes + line - 1) / line * line; }

private:
    Mapping mapping_;
    int64_t end_;
    int64_t used_ = 0;
};

void check_size(int64_t bytes) {
    TORCH_CHECK(bytes >= 0 && bytes < INT64_MAX - huge_page, "bytes must not be negative, and some must be left");
}

using Storage = c10::weak_intrusive_ptr<c10::StorageImpl>;

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
// A little less urgent than whoever computes.
void take_pages(const std::vector<Storage>& storages, size_t first, size_t last) {
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 10);
    for (; first < last; first += huge_page) {
        for (const Storage& storage : storages) {
            const auto held = storage.lock();
            if (!held || first >= held->nbytes()) continue;
            const size_t bytes = std::min(std::min(held->nbytes(), last) - first, (size_t)huge_page);
            if (madvise((char*)held->mutable_data() + first, bytes, MADV_POPULATE_WRITE) != 0) return;
        }
    }
}
#endif

}  // namespace

at::Tensor weight_memory(int64_t bytes, const std::function<int64_t(void*)>& fill) {
    check_size(bytes);
    static std::mutex one_at_a_time;
    static std::weak_ptr<Region> last;
    std::lock_guard<std::mutex> hold(one_at_a_time);
    std::shared_ptr<Region> region = last.lock();
    if (!region || !region->has(bytes)) {
        region = std::make_shared<Region>(std::max(bytes, region_bytes));
        last = region;
    }
    void* memory = region->next();
    const int64_t filled = fill(memory);
    region->take(filled);
    return at::from_blob(memory, {filled}, [region](void*) {}, at::kByte);
}

at::Tensor zeroed_memory(int64_t bytes) {
    check_size(bytes);
    auto mapping = std::make_shared<Mapping>(bytes);
    return at::from_blob(mapping->start(), {bytes}, [mapping](void*) {}, at::kByte);
}

void take_ahead(at::TensorList tensors, int64_t first, int64_t last) {
    TORCH_CHECK(first >= 0 && first % huge_page == 0 && first <= last, "first and last must be a range that begins with a page of ", huge_page,
                " bytes");
    std::vector<Storage> storages;
    for (const at::Tensor& tensor : tensors) {
        TORCH_CHECK((uintptr_t)tensor.storage().data() % huge_page == 0, "tensors must lie in zeroed_memory");
        storages.emplace_back(tensor.storage().getWeakStorageImpl());
    }
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    try {
        std::thread(take_pages, std::move(storages), (size_t)first, (size_t)last).detach();
    } catch (const std::system_error&) {
        // No thread is to be had: memory is taken when it is first written.
    }
#endif
}

}  // namespace sluice
