// What the scans of a CPU share: scratch, tasks on threads, states in registers.
#pragma once

#include <atomic>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "tiles.h"

namespace {

constexpr int STATES = 4;  // that pass over a tile together
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// Hands out scratch; without memory it only counts. No two buffers begin at the same place of a page: a load waits
// for a store that is still under way to an address with the same last twelve bits.
struct Arena {
    static constexpr int64_t APART_BY = 5 * 64;
    char* base;
    int64_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base + used);
        used += (count * int64_t(sizeof(T)) + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES + APART_BY;
        return at;
    }
};

// Denormals are zero inside a task: one slow operation costs a hundred fast ones.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

template <class Work, class Scan>
struct Job {
    const Scan& scan;
    const int64_t tasks;
    std::atomic<int64_t> next_task{0}, next_thread{0};

    void work() {
        const FlushDenormals flush;
        char* scratch = scan.scratch + next_thread++ * scan.scratch_bytes;
        for (int64_t task; (task = next_task++) < tasks;) {
            Arena arena{scratch};
            Work(scan, task, arena).run();
        }
    }
};

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

// Runs Work(scan, task, arena) for every task, each thread with scratch_bytes of its own.
template <class Work, class Scan>
void run(const Scan& scan, int64_t tasks, int threads, Parallel parallel) {
    Job<Work, Scan> job{scan, tasks};
    const auto work = [](void* job) { static_cast<Job<Work, Scan>*>(job)->work(); };
    if (threads < 2) {
        work(&job);
    } else if (parallel) {
        parallel(work, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; ++i) others.emplace_back(work, &job);
        } catch (const std::system_error&) {
            // Fewer threads do the same tasks.
        }
        work(&job);
        for (auto& thread : others) thread.join();
    }
}

// The bytes of scratch of one task.
template <class Work, class Scan>
int64_t scratch_bytes(const Scan& scan) {
    Arena arena{nullptr};
    Work(scan, 0, arena);
    return (arena.used + 4095) / 4096 * 4096;
}

template <class T>
inline void add(T* to, Vec<T> value) {
    put(to, get(to) + value);
}

// Calls with STATES states at a time, then one by one, and the number of the call. The kernels are compiled for how
// many they get, so these stay in registers.
template <class F>
void each_state_block(int states, F&& function) {
    int n = 0, number = 0;
    for (; n + STATES <= states; n += STATES) function(n, number++, std::integral_constant<int, STATES>{});
    for (; n < states; ++n) function(n, number++, std::integral_constant<int, 1>{});
}
inline int state_blocks(int64_t states) { return int(states / STATES + states % STATES); }

}  // namespace
