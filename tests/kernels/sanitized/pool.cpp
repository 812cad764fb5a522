// The thread pool under the thread sanitizer: what each job wrote is read without a lock right after it, by the next job too.
//
// `pool SEED JOBS`: drawn counts, grains and numbers of threads; then two callers at once, tasks beside a caller who helps
// or has jobs of its own, and jobs within jobs. `pool planted` lets two
// threads write one number, which must end the program.
#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

using Bits = std::mt19937_64;

int64_t between(Bits& bits, int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits); }

void expect(bool holds, const char* what) {
    if (!holds) std::fprintf(stderr, "%s\n", what), std::exit(3);
}

void one_job(Bits& bits, std::vector<int64_t>& written, int64_t round) {
    const int64_t count = between(bits, 0, (int64_t)written.size()), grain = between(bits, 1, between(bits, 1, 40));
    sluice::parallel(count, grain, [&](sluice::Share& share) {
        for (int64_t first, last; share.take(first, last);) {
            expect(first % grain == 0 && last == std::min(count, first + grain), "a stretch is not one of the job's");
            for (int64_t i = first; i < last; ++i) written[i] += 1;
        }
        int64_t first, last;
        expect(!share.take(first, last), "there is more after the end");
    });
    for (int64_t i = 0; i < (int64_t)written.size(); ++i) {
        expect(written[i] == round + (i < count), "a number was not taken exactly once");
        written[i] = round + 1;
    }
}

void jobs(uint64_t seed, int64_t count) {
    Bits bits(seed);
    std::vector<int64_t> written(300);
    for (int64_t round = 0; round < count; ++round) {
        omp_set_num_threads((int)between(bits, 1, 5));
        one_job(bits, written, round);
    }
}

void tasks_beside(uint64_t seed, int64_t count) {
    Bits bits(seed), inner(seed + 1);
    std::vector<int64_t> written(300), own(300);
    int64_t round = 0, own_round = 0;
    for (int64_t i = 0; i < count; ++i) {
        omp_set_num_threads((int)between(bits, 1, 5));
        std::deque<std::atomic<uint32_t>> done;
        for (int64_t task = between(bits, 1, 3); task > 0; --task) {
            sluice::TasksBeside::instance().begin(
                [&] {
                    for (int job = 0; job < 4; ++job) one_job(inner, written, round++);
                },
                done.emplace_back(0));
        }
        if (between(bits, 0, 1)) one_job(bits, own, own_round++);
        for (auto& one : done) sluice::TasksBeside::instance().wait(one);
        expect(written[299] == round, "a task was not over when it was waited for");
    }
}

void within_each_other() {
    omp_set_num_threads(3);
    std::vector<int64_t> sums(20);
    sluice::parallel_for(20, 1, [&](int64_t i) {
        std::vector<int64_t> inner(50);
        sluice::parallel_for(50, 7, [&](int64_t j) { inner[j] = i * j; });
        for (int64_t x : inner) sums[i] += x;
    });
    for (int64_t i = 0; i < 20; ++i) expect(sums[i] == i * 49 * 50 / 2, "a job within a job was not done");
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 2 && std::string(arguments[1]) == "planted") {
        int64_t shared = 0;
        omp_set_num_threads(2);
        for (int i = 0; i < 2000; ++i) sluice::parallel_for(64, 1, [&](int64_t j) { shared += j; });
        std::printf("%lld\n", (long long)shared);
        return 0;
    }
    if (count != 3) return std::fprintf(stderr, "usage: pool SEED JOBS | pool planted\n"), 2;
    const auto seed = (uint64_t)std::atoll(arguments[1]);
    const int64_t wanted = std::atoll(arguments[2]);
    jobs(seed, wanted);
    std::thread other(jobs, seed + 1, wanted);
    jobs(seed + 2, wanted);
    other.join();
    tasks_beside(seed + 3, wanted / 10);
    within_each_other();
    std::printf("%lld jobs, as many beside others\n", (long long)wanted);
}
