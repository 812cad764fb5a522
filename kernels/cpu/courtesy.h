// A thread that computes without a pause lets whoever else wants its core have it, once a millisecond.
#pragma once

#include <chrono>
#include <cstdint>
#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#endif

namespace sluice {

// One thread's. Where the scheduler holds that another has had its share already, the clock's next tick alone would move this thread
// aside, 4 ms away and more: a token on its way out passes seven threads of the service, of gRPC and of its client, and one in ten waited
// so at one of them. Nothing is given away beside a process that never sleeps, to which the core would go again and again: there the
// scheduler's own shares hold.
class Courtesy {
public:
#ifdef __linux__
    Courtesy() = default;
    Courtesy(const Courtesy&) = delete;
    ~Courtesy() {
        if (file_ >= 0) close(file_);
    }
#endif

    void give_way() {
#ifdef __linux__
        using namespace std::chrono_literals;
        if (++asked_ % 4) return;  // asking for the time, thousands of times a step, took 0.5 % of it
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        if (now < next_) return;
        next_ = now + 1ms;
        if (const auto passed = now - looked_; passed > 32ms) {
            const std::chrono::nanoseconds waited(time_in_queue());
            crowded_ = waited < 0ns || waited - waited_ > passed / 4;
            waited_ = waited;
            looked_ = now;
        }
        if (!crowded_) sched_yield();
#endif
    }

private:
#ifdef __linux__
    // Nanoseconds that this thread has been ready to run while others had its core; -1 where the system does not say.
    long long time_in_queue() {
        if (file_ < 0) file_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
        char text[96];
        text[std::max<ssize_t>(pread(file_, text, sizeof text - 1, 0), 0)] = 0;
        long long waited;
        return std::sscanf(text, "%*d %lld", &waited) == 1 ? waited : -1;
    }

    std::chrono::nanoseconds next_{0}, looked_{0}, waited_{0};
    int file_ = -1;
    uint32_t asked_ = 0;
    bool crowded_ = false;
#endif
};

}  // namespace sluice
