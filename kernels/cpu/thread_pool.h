// The threads of the operators: one job at a time, its work handed out in stretches, with work stealing.
//
// Each thread begins at a part of its own, so that it streams its own weights, and goes on to what is left of the others'. Nobody waits
// for a thread that has not come, only for stretches under way: where something else takes a core, that holds up one stretch and not a
// thread's whole part. Beside one process that never sleeps, a step of SmolLM2-135M takes 0.4 to 0.5 times what OpenMP's parts, cut in
// advance, take (two cores; 1 and 8 sequences).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace sluice {

// One thread's stretches of a job.
class Share {
public:
    // The next stretch [first, last), no longer than the job's grain; false: nothing is left.
    bool take(int64_t& first, int64_t& last);

private:
    friend class ThreadPool;
    bool find();

    int64_t count_ = 0;
    int64_t grain_ = 1;
    int64_t stretches_ = 0;
    int64_t taken_ = 0;   // stretches so far
    int64_t found_ = -1;  // a stretch taken and not yet handed over
    uint32_t job_ = 0;
    int32_t threads_ = 0;  // 0: the caller alone
    int32_t thread_ = 0;   // 0: the caller's
    int32_t emptied_ = 0;  // parts in which nothing is left, from its own on
};

using JobBody = void (*)(const void* context, Share& share) noexcept;

// Calls body(context, share) on the caller's thread and on as many others as come in time, omp_get_max_threads() in all, where it takes
// until nothing is left; returns when all of [0, count) is done. Of two callers at once one works alone. Fewer than 2^31 stretches.
void run_job(int64_t count, int64_t grain, JobBody body, const void* context);

// Runs tasks one after another on a thread of their own, the jobs in them with one thread of the pool less: whoever waits for a task is the
// one that is missing, so that no two of them want the same core. A task must not throw.
class TasksBeside {
public:
    static TasksBeside& instance();

    // `done` is set to 1 behind the task; both must live until then.
    void begin(std::function<void()> task, std::atomic<uint32_t>& done);

    // Takes part in the jobs of tasks until `done` is set.
    void wait(std::atomic<uint32_t>& done);

private:
    struct State;
    TasksBeside();
    State* state_;  // never destroyed: its thread ends with the process
};

// body(share), as above.
template <class Body>
inline void parallel(int64_t count, int64_t grain, const Body& body) {
    run_job(count, grain, [](const void* context, Share& share) noexcept { (*(const Body*)context)(share); }, &body);
}

// body(i) for each i of [0, count).
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
    parallel(count, grain, [&body](Share& share) {
        for (int64_t first, last; share.take(first, last);) {
            for (int64_t i = first; i < last; ++i) body(i);
        }
    });
}

}  // namespace sluice
