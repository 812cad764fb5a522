#include "thread_pool.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif

#include "courtesy.h"

namespace sluice {
namespace {

constexpr int most_threads = 256;

thread_local bool beside = false;  // whether this is the thread of TasksBeside
thread_local Courtesy courtesy;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Rounds of looking before a thread sleeps, as OpenMP's own threads are told (engine/openmp.py sets what is best here); never for long,
// since OpenMP's threads, where torch has begun some, would have the same cores.
int spin_rounds() {
    constexpr int usual = 3000, most = 100'000;
    const char *rounds = std::getenv("GOMP_SPINCOUNT"), *policy = std::getenv("OMP_WAIT_POLICY");
    if (rounds && *rounds >= '0' && *rounds <= '9') {
        char* end;
        const unsigned long long number = std::strtoull(rounds, &end, 10);
        return *end ? most : (int)std::min<unsigned long long>(number, most);  // with a suffix: thousands and more
    }
    if (rounds && (*rounds == 'i' || *rounds == 'I')) return most;  // "infinite"
    if (policy && (*policy == 'p' || *policy == 'P')) return 0;
    return policy && (*policy == 'a' || *policy == 'A') ? most : usual;
}

void wait_until_changed(const std::atomic<uint32_t>& number, uint32_t seen, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (number.load(std::memory_order_acquire) != seen) return;
        relax();
    }
    number.wait(seen, std::memory_order_acquire);
}

// Where OpenMP binds threads to places, the pool's stay there too, each at the place of its number as with OMP_PROC_BIND=close: the
// caller's is at the first.
void stay_at_place(int thread) {
#ifdef __linux__
    const int places = omp_get_num_places();
    if (omp_get_proc_bind() == omp_proc_bind_false || places == 0) return;
    const int place = thread % places, count = omp_get_place_num_procs(place);
    int cores[CPU_SETSIZE];
    if (count > CPU_SETSIZE) return;
    omp_get_place_proc_ids(place, cores);
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < count; ++i) CPU_SET(cores[i], &set);
    sched_setaffinity(0, sizeof set, &set);  // a wish
#endif
}

}  // namespace

class ThreadPool {
public:
    // Never destroyed: its threads end with the process.
    static ThreadPool& instance() {
        static ThreadPool* pool = new ThreadPool;
        return *pool;
    }

    void run(int64_t count, int64_t grain, JobBody body, const void* context) {
        Share mine;
        mine.count_ = count;
        mine.grain_ = grain;
        mine.stretches_ = (count + grain - 1) / grain;
        mine.threads_ = (int32_t)std::min<int64_t>({omp_get_max_threads(), most_threads, mine.stretches_});
        if (mine.threads_ > 1 && !busy_.test_and_set(std::memory_order_acquire)) {
            publish(mine, body, context, mine.threads_ - 1 - beside, beside);
            if (mine.find()) body(context, mine);
            for (uint32_t done = add_done(mine); done != mine.stretches_; done = done_.load(std::memory_order_acquire)) {
                wait_until_changed(done_, done, spins_);
            }
            busy_.clear(std::memory_order_release);
        } else {
            mine.threads_ = 0;
            body(context, mine);
        }
    }

    // Takes part in the jobs of the thread of TasksBeside until `done` is set and `wake` is called.
    void help(const std::atomic<uint32_t>& done) {
        while (!done.load(std::memory_order_acquire)) {
            Share share;
            take_part(share, -1);
            // Looked at once more: behind what is set from now on, the job's number changes.
            if (!done.load(std::memory_order_acquire)) wait_until_changed(job_, share.job_, spins_);
        }
    }

    // All threads look for a job, and find none.
    void wake() {
        while (busy_.test_and_set(std::memory_order_acquire)) relax();
        Share none;
        publish(none, nullptr, nullptr, 0, true);
        busy_.clear(std::memory_order_release);
    }

    // The next stretch of a part for a thread of `share.job_`, or -1.
    int64_t take(const Share& share, int part) {
        std::atomic<uint64_t>& next = parts_[part].next;
        const uint64_t end = stamped(share.job_, first_of(share, part + 1));
        uint64_t now = next.load(std::memory_order_relaxed);
        while (now >> 32 == share.job_ && now < end) {
            if (next.compare_exchange_weak(now, now + 1, std::memory_order_relaxed)) return (int64_t)(now & 0xffffffffu);
        }
        return -1;
    }

private:
    // The job's number above, the part's next stretch below: whoever comes late takes nothing of the job after.
    struct alignas(64) Part {
        std::atomic<uint64_t> next{0};
    };

    static uint64_t stamped(uint32_t job, int64_t stretch) { return (uint64_t)job << 32 | (uint64_t)stretch; }
    static int64_t first_of(const Share& share, int part) { return share.stretches_ * part / share.threads_; }

    // `own`: the pool's threads that it wants; `of_task`: whether it belongs to a task.
    void publish(Share& mine, JobBody body, const void* context, int32_t own, bool of_task) {
        while (size_ < own && begin(size_ + 1)) ++size_;
        mine.threads_ -= own - std::min(own, size_);
        mine.job_ = ++last_job_;
        done_.store(0, std::memory_order_relaxed);
        // Those that this job does not ask for as well: none may be left to an earlier job.
        parts_used_ = std::max(parts_used_, mine.threads_);
        for (int i = 0; i < parts_used_; ++i) {
            const int64_t first = i < mine.threads_ ? first_of(mine, i) : 0;
            parts_[i].next.store(stamped(mine.job_, first), std::memory_order_relaxed);
        }
        // After the parts: a thread still at an earlier job that reads any of these finds every part stamped anew.
        count_.store(mine.count_, std::memory_order_release);
        grain_.store(mine.grain_, std::memory_order_release);
        threads_.store(mine.threads_, std::memory_order_release);
        own_.store(std::min(own, size_), std::memory_order_release);
        kept_.store(of_task ? omp_get_max_threads() - 1 : most_threads, std::memory_order_release);
        body_.store(body, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        job_.store(mine.job_, std::memory_order_seq_cst);
        job_.notify_all();
        if (of_task) return;
        other_jobs_.fetch_add(1, std::memory_order_seq_cst);
        other_jobs_.notify_all();
    }

    // False where the system gives no more threads: those that there are do the work.
    bool begin(int thread) {
        try {
            std::thread([this, thread] { work(thread); }).detach();
        } catch (const std::exception&) {  // no memory for one, too
            return false;
        }
        return true;
    }

    void work(int thread) {
        stay_at_place(thread);
        Share share;
        for (uint32_t seen = 0;; seen = share.job_) {
            wait_until_changed(job_, seen, spins_);
            const uint32_t others = other_jobs_.load(std::memory_order_acquire);
            share = Share();
            // While tasks do without it, it may take no time from whoever stands in for it.
            if (!take_part(share, thread)) wait_until_changed(other_jobs_, others, 0);
        }
    }

    // In the job that there is, as the pool's thread of that number; -1: as the one that waits for a task. False: it is a task's, all of whose
    // jobs do without this thread.
    bool take_part(Share& share, int thread) {
        share.job_ = job_.load(std::memory_order_acquire);
        // Of a job that is over by now, or some of one job and some of the next: then there is nothing that it could take.
        share.count_ = count_.load(std::memory_order_acquire);
        share.grain_ = grain_.load(std::memory_order_acquire);
        share.threads_ = threads_.load(std::memory_order_acquire);
        const int32_t own = own_.load(std::memory_order_acquire);
        const int32_t kept = kept_.load(std::memory_order_acquire);
        const JobBody body = body_.load(std::memory_order_acquire);
        const void* context = context_.load(std::memory_order_acquire);
        share.stretches_ = (share.count_ + share.grain_ - 1) / share.grain_;
        share.thread_ = thread < 0 ? own + 1 : thread;
        if (thread > own) return thread < kept;
        if (share.thread_ >= share.threads_ || !share.find()) return true;
        body(context, share);
        if (add_done(share) == share.stretches_) done_.notify_one();
        return true;
    }

    uint32_t add_done(const Share& share) {
        return done_.fetch_add((uint32_t)share.taken_, std::memory_order_seq_cst) + (uint32_t)share.taken_;
    }

    const int spins_ = spin_rounds();
    std::atomic_flag busy_{};
    int size_ = 0;  // threads begun
    int32_t parts_used_ = 0;
    uint32_t last_job_ = 0;
    alignas(64) std::atomic<uint32_t> job_{0};  // looked at all the time: in a line of its own
    alignas(64) std::atomic<int64_t> count_{0};
    std::atomic<int64_t> grain_{1};
    std::atomic<int32_t> threads_{0};
    std::atomic<int32_t> own_{0};
    std::atomic<int32_t> kept_{0};  // the pool's threads below this number stay awake: other jobs of the same caller may want them
    std::atomic<JobBody> body_{nullptr};
    std::atomic<const void*> context_{nullptr};
    // Not at a line's start, as job_ is: libstdc++ would take who waits for one to wait for the other as well.
    alignas(64) uint32_t unused_ = 0;
    std::atomic<uint32_t> done_{0};  // stretches of the job
    alignas(64) uint32_t unused_too_[2] = {};
    std::atomic<uint32_t> other_jobs_{0};  // no task's
    Part parts_[most_threads];
};

bool Share::find() {
    if (threads_ == 0) {
        found_ = taken_ < stretches_ ? taken_++ : -1;
        return found_ >= 0;
    }
    for (; emptied_ < threads_; ++emptied_) {
        found_ = ThreadPool::instance().take(*this, (thread_ + emptied_) % threads_);
        if (found_ < 0) continue;
        ++taken_;
        return true;
    }
    return false;
}

bool Share::take(int64_t& first, int64_t& last) {
    if (found_ < 0) {
        courtesy.give_way();
        if (!find()) return false;
    }
    first = found_ * grain_;
    last = std::min(count_, first + grain_);
    found_ = -1;
    return true;
}

struct TasksBeside::State {
    struct Task {
        std::function<void()> run;
        std::atomic<uint32_t>* done;
        int threads;
    };
    const int spins = spin_rounds();
    std::mutex mutex;
    std::deque<Task> tasks;
    std::atomic<uint32_t> begun{0};
    std::atomic<uint32_t> over{0};
    bool threadless = false;  // none was to be had, or is there any more: whoever begins a task runs it

    void work() {
        beside = true;
        for (uint32_t seen = 0;; ++seen) {
            wait_until_changed(begun, seen, spins);
            Task task;
            {
                const std::lock_guard<std::mutex> lock(mutex);
                task = std::move(tasks.front());
                tasks.pop_front();
            }
            omp_set_num_threads(task.threads);              // each thread has a number of its own
            if (seen == 0) stay_at_place(task.threads - 1);  // the first is the waiter's
            task.run();
            task.done->store(1, std::memory_order_release);
            ThreadPool::instance().wake();
            over.store(seen + 1, std::memory_order_release);
            over.notify_all();
        }
    }

    // In a child of fork(), which has no thread but its own.
    void forked() {
        threadless = true;
        over.store(begun.load());
    }

    // Until every task that was begun is over.
    void drain() {
        const uint32_t last = begun.load(std::memory_order_acquire);
        // Another thread may have begun more meanwhile, of which more may be over.
        for (uint32_t now; (int32_t)((now = over.load(std::memory_order_acquire)) - last) < 0;) over.wait(now, std::memory_order_acquire);
    }
};

TasksBeside::TasksBeside() : state_(new State) {
    try {
        std::thread([state = state_] { state->work(); }).detach();
    } catch (const std::exception&) {
        state_->threadless = true;
    }
    // A task that is under way would never end in the child.
    pthread_atfork([] { instance().state_->drain(); }, nullptr, [] { instance().state_->forked(); });
    // Nothing that a task uses may be taken down under it.
    std::atexit([] { instance().state_->drain(); });
}

TasksBeside& TasksBeside::instance() {
    static TasksBeside* beside = new TasksBeside;
    return *beside;
}

void TasksBeside::begin(std::function<void()> task, std::atomic<uint32_t>& done) {
    if (state_->threadless) {
        task();
        done.store(1, std::memory_order_release);
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->tasks.push_back({std::move(task), &done, omp_get_max_threads()});
    }
    state_->begun.fetch_add(1, std::memory_order_release);
    state_->begun.notify_one();
}

void TasksBeside::wait(std::atomic<uint32_t>& done) { ThreadPool::instance().help(done); }

void run_job(int64_t count, int64_t grain, JobBody body, const void* context) {
    if (count > 0) ThreadPool::instance().run(count, grain, body, context);
}

}  // namespace sluice
