// The selective scan on a CPU, called through ctypes by cpu.py. README.md derives the gradients.
//
//     h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = <C_t, h_t> + D u_t,   y *= silu(z)
//
// One task is one batch element and one block of channels, a few vectors wide: a lane is a channel, so nothing is
// summed across lanes while time runs, and any number of states fits. Time goes in tiles of STEPS steps. A tile is
// converted and transposed once into [step][channel] scratch; then the states pass over it, four at a time in
// registers. The forward keeps the states before every tile; the backward takes the tiles from the last to the
// first, computes their states again and runs the adjoint. Whatever tasks share (dA, dB, dC, dD, the bias) each
// writes into a part of its own, which cpu.py adds in a fixed order: the schedule cannot change a bit.

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu_backward.h"
#include "cpu_forward.h"

namespace {

// Denormals are zero inside a task: one slow operation costs a hundred fast ones.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

template <class Work>
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

template <class Work>
void run(const Scan& scan, int threads, Parallel parallel) {
    Job<Work> job{scan, scan.batch * scan.groups * scan.blocks};
    const auto work = [](void* job) { static_cast<Job<Work>*>(job)->work(); };
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

template <class T>
int64_t scratch_bytes(const Scan& scan, bool backward) {
    Arena arena{nullptr};
    if (backward)
        Backward<T>(scan, 0, arena);
    else
        Forward<T>(scan, 0, arena);
    return (arena.used + 4095) / 4096 * 4096;
}

bool is_double(const Scan& scan) { return scan.A.type == Type::FLOAT64; }

}  // namespace

extern "C" {

int visrep_scan2d_vector_bytes() { return VECTOR_BYTES; }
int visrep_scan2d_steps() { return STEPS; }

int64_t visrep_scan2d_scratch_bytes(const Scan* scan, int backward) {
    return is_double(*scan) ? scratch_bytes<double>(*scan, backward) : scratch_bytes<float>(*scan, backward);
}

void visrep_scan2d_forward(const Scan* scan, int threads, Parallel parallel) {
    is_double(*scan) ? run<Forward<double>>(*scan, threads, parallel)
                     : run<Forward<float>>(*scan, threads, parallel);
}

void visrep_scan2d_backward(const Scan* scan, int threads, Parallel parallel) {
    is_double(*scan) ? run<Backward<double>>(*scan, threads, parallel)
                     : run<Backward<float>>(*scan, threads, parallel);
}
}
