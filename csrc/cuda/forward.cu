#include <type_traits>

#include "launch.h"
#include "maxsim_cuda.h"

namespace latemax {

namespace {

/* Only Hopper has wgmma; later chips take the sm_80 kernel, from its PTX. */
bool hopper(const Device &device, int capability) { return (capability ? capability : device.capability) == 90; }

/* All kernels of the device at once, so that a warmup of any shape serves every later first launch in a capture. */
void prepare_all(int index, int capability) {
    const Device &device = device_of(index);
    if (hopper(device, capability)) once_per_device(index, [&] { prepare_sm90(device), prepare_shared(device); });
    else once_per_device(index, [&] { prepare_sm80(device), prepare_shared(device); });
}

/* Cuts the workspace from `memory`; returns its bytes. */
int64_t cut(Forward &f, char *memory) {
    const maxsim_args &a = f.a;
    const Plan &p = f.plan;
    int64_t used = 0;
    const auto take = [&](auto *&pointer, bool wanted, int64_t count) {
        if (!wanted) return;
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
        used += (count * static_cast<int64_t>(sizeof *pointer) + 15) / 16 * 16;
    };
    const bool from_tiles = p.stages > 0;  // only the sm_90 kernel has a ring that is planned
    take(f.work.q_norms, a.normalize, a.q.offsets ? a.q.total : a.n_q * a.q.l);
    take(f.work.d_norms, a.normalize && !from_tiles, a.d.total);
    f.q_factors = f.work.q_norms ? f.work.q_norms : a.q.scale;
    f.d_factors = f.work.d_norms ? f.work.d_norms : a.d.scale;
    take(f.work.d_lengths, a.d.mask, a.d.offsets ? a.d.n : (a.own ? a.n_q : 1) * a.n_c);
    take(f.work.units, a.q.offsets, a.n_q + 1);
    take(f.work.partial, in_parts(a, p), p.units * a.n_c);
    take(f.work.piece_values, p.split, int64_t{2} * p.grid * p.rows);
    take(f.work.piece_wheres, p.split && a.argmax, int64_t{2} * p.grid * p.rows);
    return used;
}

Forward planned(const maxsim_args &a, const Device &device, int capability) {
    // coordinates and tokens are 32-bit in the kernels, addresses 64-bit
    constexpr int64_t MOST = 0x7fffff00;
    if (a.n_c > MOST || a.n_q > MOST || a.d.l > MOST || a.q.total > MOST || a.d.total > MOST)
        throw std::runtime_error("more than 2^31 tokens, queries or documents on one axis");
    const Plan p = (hopper(device, capability) ? plan_sm90 : plan_sm80)(a, device);
    if (p.units > MOST) throw std::runtime_error("more than 2^31 query blocks");
    return {a, {}, p, nullptr, nullptr};
}

}  // namespace

int64_t scratch_bytes(const maxsim_args &a, int index, int capability) {
    Forward f = planned(a, device_of(index), capability);
    return cut(f, nullptr);
}

Versions versions() { return {driver_version(), runtime_version()}; }

void forward(const maxsim_args &a, void *scratch, int index, void *stream, int capability) {
    use(index);
    prepare_all(index, capability);
    const Device &device = device_of(index);
    Forward f = planned(a, device, capability);
    cut(f, static_cast<char *>(scratch));
    const Stream on = static_cast<Stream>(stream);
    if (a.normalize) launch_norms(f, on);
    if (a.d.mask) launch_lengths(f, on);
    if (a.q.offsets) launch_units(f, on);
    (hopper(device, capability) ? launch_sm90 : launch_sm80)(f, device, on);
    if (f.plan.split) launch_pieces(f, on);
    if (in_parts(a, f.plan)) launch_sum(f, on);
}

}  // namespace latemax
