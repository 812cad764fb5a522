// Memory that a thread keeps between calls.
#pragma once

namespace SLUICE_ISA {

// As much as is asked for and no more, where a sanitizer watches what lies behind.
#ifdef __SANITIZE_ADDRESS__
constexpr bool exact_scratch = true;
#else
constexpr bool exact_scratch = false;
#endif

// At least `bytes` for one use: 0 the rows of a product, 1 what a thread needs for itself, 2 to 4 greedy_linear.h. Throws
// std::bad_alloc, which ends the process in a job; what is large (0, 2, 3) is taken before one.
inline uint8_t* scratch(int which, int64_t bytes) {
    struct Buffer {
        void* data;
        int64_t size;
    };
    struct Kept {
        Buffer buffers[5] = {};
        ~Kept() {
            for (Buffer& buffer : buffers) std::free(buffer.data);
        }
    };
    static thread_local Kept kept;
    Buffer& buffer = kept.buffers[which];
    if (buffer.size < bytes || (exact_scratch && buffer.size != bytes)) {
        std::free(buffer.data);
        buffer = {};
        const int64_t size = exact_scratch ? bytes : round_up(bytes + bytes / 2, 4096);
        if (posix_memalign(&buffer.data, 64, (size_t)size)) throw std::bad_alloc();
        buffer.size = size;
    }
    return (uint8_t*)buffer.data;
}

}  // namespace SLUICE_ISA
