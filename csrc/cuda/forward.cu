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

}  // namespace

int parts(int64_t l_q, int device, int capability) {
    return chunks_of(l_q, hopper(device_of(device), capability) ? LONGEST_SM90 : LONGEST_SM80);
}

Versions versions() { return {driver_version(), runtime_version()}; }

void forward(const maxsim_args &a, const Workspace &work, int index, void *stream, int capability) {
    use(index);
    prepare_all(index, capability);
    const Device &device = device_of(index);
    const bool sm90 = hopper(device, capability);
    Forward f{a, work, {}};
    // coordinates and tokens are 32-bit in the kernels, addresses 64-bit
    constexpr int64_t MOST = 0x7fffff00;
    if (a.n_c > MOST || a.n_q > MOST || a.d.l > MOST || a.q.total > MOST || a.d.total > MOST)
        throw std::runtime_error("more than 2^31 tokens, queries or documents on one axis");
    const Stream on = static_cast<Stream>(stream);
    if (a.normalize) launch_norms(f, !sm90, on);
    if (a.d.mask) launch_lengths(f, on);
    (sm90 ? launch_sm90 : launch_sm80)(f, device, on);
    if (f.plan.chunks > 1) launch_sum(f, on);
}

}  // namespace latemax
