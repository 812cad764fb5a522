// Calls of operators whose arguments have been checked, to be made later. What a thread does between two of them is then a load or two, where
// checks, outputs and torch's dispatch take 5 us each if a step's weights have just passed through the caches.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <type_traits>

#include "dispatch.h"

namespace sluice {

// A function of the operators and all that it was given: numbers and addresses.
class PreparedCall {
public:
    template <class Function>
    static PreparedCall of(const Function& function) {
        static_assert(std::is_trivially_copyable_v<Function> && sizeof(Function) <= most_bytes && alignof(Function) <= 8);
        PreparedCall made;
        made.run_ = [](const void* at) { (*(const Function*)at)(operators()); };
        std::memcpy(made.bytes_, &function, sizeof function);
        return made;
    }

    explicit operator bool() const { return run_; }
    void operator()() const { run_(bytes_); }

private:
    static constexpr size_t most_bytes = 272;

    void (*run_)(const void*) = nullptr;
    alignas(8) unsigned char bytes_[most_bytes];
};

// While one stands, an operator that is called on its thread is prepared and not run.
class Preparing {
public:
    // Memory for an output that somebody decides on.
    class Place {
    public:
        virtual at::Tensor make(at::IntArrayRef sizes, at::ScalarType type) = 0;

    protected:
        ~Place() = default;
    };

    Preparing(PreparedCall& call, Place& place) : call_(call), place_(place) { now() = this; }
    ~Preparing() { now() = nullptr; }
    Preparing(const Preparing&) = delete;
    Preparing& operator=(const Preparing&) = delete;

    static Preparing*& now() {
        static thread_local Preparing* standing = nullptr;
        return standing;
    }

private:
    template <class Function>
    friend void call(const Function& function);
    friend at::Tensor new_output(at::IntArrayRef sizes, at::ScalarType type);

    PreparedCall& call_;
    Place& place_;
};

// function(operators()), at once or later: all that an operator does with memory, integers that it checks excepted.
template <class Function>
inline void call(const Function& function) {
    if (Preparing* preparing = Preparing::now()) preparing->call_ = PreparedCall::of(function);
    else function(operators());
}

// An operator's output, undefined.
inline at::Tensor new_output(at::IntArrayRef sizes, at::ScalarType type) {
    Preparing* preparing = Preparing::now();
    return preparing ? preparing->place_.make(sizes, type) : at::empty(sizes, type);
}

}  // namespace sluice
