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

#include "cpu_backward.h"
#include "cpu_forward.h"

namespace {

bool is_double(const Scan& scan) { return scan.A.type == Type::FLOAT64; }

int64_t tasks_of(const Scan& scan) { return scan.batch * scan.segments * scan.blocks; }

template <class T>
int64_t scratch_of(const Scan& scan, bool backward) {
    return backward ? scratch_bytes<Backward<T>>(scan) : scratch_bytes<Forward<T>>(scan);
}

}  // namespace

extern "C" {

int visrep_scan_vector_bytes() { return VECTOR_BYTES; }
int visrep_scan_steps() { return STEPS; }

int64_t visrep_scan_scratch_bytes(const Scan* scan, int backward) {
    return is_double(*scan) ? scratch_of<double>(*scan, backward) : scratch_of<float>(*scan, backward);
}

void visrep_scan_forward(const Scan* scan, int threads, Parallel parallel) {
    is_double(*scan) ? run<Forward<double>>(*scan, tasks_of(*scan), threads, parallel)
                     : run<Forward<float>>(*scan, tasks_of(*scan), threads, parallel);
}

void visrep_scan_backward(const Scan* scan, int threads, Parallel parallel) {
    is_double(*scan) ? run<Backward<double>>(*scan, tasks_of(*scan), threads, parallel)
                     : run<Backward<float>>(*scan, tasks_of(*scan), threads, parallel);
}
}
