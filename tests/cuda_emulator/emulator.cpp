/* One thread block at a time; its threads are fibers of one host thread, switched where an instruction waits and, by the
 * seed, at other moments too. A block in which nobody can run any more is a deadlock and fails.
 */
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <memory>
#include <random>
#include <vector>

#include "products.h"
#include "runtime.h"

namespace latemax {

namespace {

constexpr int STACK = 128 << 10, CANARY = 4096, MOST_THREADS = 1024;

struct {
    unsigned seed = 0;
    Device device{90, 3, 232448, 233472, 0};
    int changes = 1;
    std::map<void *, int> prepared;
} config;

struct Group {  // cp.async
    std::vector<std::pair<uint32_t, const void *>> copies;
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
    jmp_buf at;
    bool started = false, done = false;
    Group open;
    std::deque<Group> groups;
};

struct Meeting {
    std::vector<void *> brought;
    std::vector<int> waiting;
    const char *what = nullptr;
    int count = 0;
};

struct Barrier {
    int arrivals, pending;
    int64_t bytes = 0;
    uint32_t phase = 0;
    std::vector<int> waiting;
};

struct Products {
    std::vector<emulator::Product> open;
    std::deque<std::vector<emulator::Product>> groups;
};

struct Load {
    uint32_t to, barrier;
    TensorMap map;
    int at[4];
};

std::vector<Fiber> fibers;
std::vector<int> ready;
std::vector<char> memory;
char *shared_base;
size_t shared_size;
std::map<std::pair<int, int>, Meeting> meetings;  // by first thread and size
std::map<int, Meeting> barriers;                  // by name
std::map<uint32_t, Barrier> mbarriers;
std::map<int, Products> products;  // by the warpgroup's first thread
std::vector<Load> loads;
std::mt19937 random_;
int current, block_, grid_, threads_;
int64_t products_ = 0;  // wgmma since the device was set
jmp_buf scheduler;
std::string failure;
const std::function<void()> *kernel_;

bool chance(int percent, int of = 100) { return config.seed && static_cast<int>(random_() % of) < percent; }

void enter() {
    (*kernel_)();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

void resume(int index) {
    current = index;
    Fiber &fiber = fibers[index];
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
}

/* Until somebody wakes this fiber. */
void sleep() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
void wake(std::vector<int> &who) {
    ready.insert(ready.end(), who.begin(), who.end());
    who.clear();
}

char *at(uint32_t address, size_t bytes) {
    if (address + bytes > shared_size) emulator::fail("an access beyond shared memory");
    return shared_base + address;
}

void land(const Load &load) {
    const int bytes = load.map.bytes;
    for (int row = 0; row < load.map.rows; ++row)
        for (int column = 0; column < 128 / bytes; ++column) {
            const int64_t x[4] = {load.at[0] + column, load.at[1] + row, load.at[2], load.at[3]};
            bool inside = true;
            for (int i = 0; i < 4; ++i) inside &= x[i] >= 0 && x[i] < static_cast<int64_t>(load.map.sizes[i]);
            int64_t offset = bytes * x[0];
            for (int i = 0; i < 3; ++i) offset += x[i + 1] * static_cast<int64_t>(load.map.strides[i]);
            const uint32_t plain = load.to + row * 128 + column * bytes;
            char *to = at(plain ^ (plain >> 7 & 7) << 4, bytes);
            if (inside) memcpy(to, load.map.base + offset, bytes);
            else memset(to, 0, bytes);
        }
    Barrier &barrier = mbarriers.at(load.barrier);
    barrier.bytes -= load.map.rows * 128;
    if (barrier.bytes < 0) emulator::fail("more bytes than a barrier expects");
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.arrivals, ++barrier.phase;
        wake(barrier.waiting);
    }
}

void finish_products(int warpgroup, size_t pending) {
    auto &groups = products[warpgroup].groups;
    for (; groups.size() > pending; groups.pop_front())
        for (const emulator::Product &p : groups.front()) emulator::multiply(p);
}

void run_block() {
    memset(shared_base, 0xff, shared_size);
    memset(shared_base + shared_size, 0x5a, CANARY);
    meetings.clear(), barriers.clear(), mbarriers.clear(), products.clear(), loads.clear(), ready.clear();
    for (int i = 0; i < threads_; ++i) {
        fibers[i].started = fibers[i].done = false;
        fibers[i].open.copies.clear(), fibers[i].groups.clear();
        ready.push_back(i);
    }
    // in a thousand, how often a copy lands at a step: seeds 1, 4, ... wait until nothing else can run
    constexpr int LANDING[] = {3, 0, 50};
    while (failure.empty()) {
        if (!loads.empty() && (ready.empty() || chance(LANDING[config.seed % 3], 1000) || !config.seed)) {
            const size_t which = config.seed ? random_() % loads.size() : 0;
            const Load load = loads[which];
            loads.erase(loads.begin() + which);
            land(load);
            continue;
        }
        // like copies, products are made as late as they can with seeds 1, 4, ...
        if (config.seed % 3 != 1 && chance(3))
            for (auto &entry : products)
                if (const size_t count = entry.second.groups.size()) finish_products(entry.first, count - 1);
        if (ready.empty()) break;
        const size_t which = config.seed ? random_() % ready.size() : ready.size() - 1;
        const int index = ready[which];
        ready[which] = ready.back();
        ready.pop_back();
        resume(index);
    }
    for (int i = 0; failure.empty() && i < threads_; ++i)
        if (!fibers[i].done) failure = "deadlock: thread " + std::to_string(i) + " of block " + std::to_string(block_) + " never ended";
    for (int i = 0; failure.empty() && i < CANARY; ++i)
        if (shared_base[shared_size + i] != 0x5a) failure = "a write beyond shared memory";
    for (auto &entry : mbarriers)
        if (failure.empty() && entry.second.bytes) failure = "a barrier still waits for bytes";
}

}  // namespace

const Device &device_of(int) { return config.device; }

namespace emulator {

int thread() { return current; }
int block() { return block_; }
int grid() { return grid_; }
char *shared() { return shared_base; }

void fail(const char *what) {
    failure = std::string(what) + " (block " + std::to_string(block_) + ", thread " + std::to_string(current) + ")";
    _longjmp(scheduler, 1);
}

uint16_t &shared_u16(uint32_t address) { return *reinterpret_cast<uint16_t *>(at(address, 2)); }

void may_yield() {
    if (!chance(20)) return;
    ready.push_back(current);
    sleep();
}

void meet(const char *what, int first, int size, void *mine, void (*all)(void **)) {
    Meeting &m = meetings[{first, size}];
    if (m.count == 0) m.what = what, m.brought.assign(size, nullptr);
    if (strcmp(m.what, what)) fail("threads of a warp meet at different instructions");
    m.brought[current - first] = mine;
    if (++m.count < size) {
        m.waiting.push_back(current);
        sleep();
        return;
    }
    m.count = 0;
    all(m.brought.data());
    wake(m.waiting);
    may_yield();
}

void named_barrier(int id, int threads) {
    if (id > 15) fail("no such barrier");
    Meeting &m = barriers[id];
    if (++m.count < (threads ? threads : threads_)) {
        m.waiting.push_back(current);
        sleep();
        return;
    }
    m.count = 0;
    wake(m.waiting);
    may_yield();
}

void cp_async(uint32_t to, const void *from, int bytes) {
    memset(at(to, 16), 0xff, 16);
    fibers[current].open.copies.push_back({to, bytes ? from : nullptr});
}
void cp_async_commit() {
    Fiber &fiber = fibers[current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open = {};
}
void cp_async_wait(int pending) {
    Fiber &fiber = fibers[current];
    while (static_cast<int>(fiber.groups.size()) > pending) {
        for (auto &[to, from] : fiber.groups.front().copies) {
            if (from) memcpy(at(to, 16), from, 16);
            else memset(at(to, 16), 0, 16);
        }
        fiber.groups.pop_front();
    }
    may_yield();
}

void mbarrier_init(uint32_t barrier, int arrivals) {
    at(barrier, 8);
    mbarriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
    may_yield();
    Barrier &b = mbarriers.at(barrier);
    if (b.pending == 0) fail("one arrival too many");
    b.bytes += bytes;
    if (--b.pending == 0 && b.bytes == 0) {
        b.pending = b.arrivals, ++b.phase;
        wake(b.waiting);
    }
}
void mbarrier_wait(uint32_t barrier, uint32_t lap) {
    may_yield();
    while ((mbarriers.at(barrier).phase & 1) == (lap & 1)) {
        mbarriers.at(barrier).waiting.push_back(current);
        sleep();
    }
    // the instruction returns on parity only; a right protocol never lets another generation answer
    if (mbarriers.at(barrier).phase != lap + 1) fail("a wait ended in another generation of its barrier");
}
void tensor_load(uint32_t to, const TensorMap &map, uint32_t barrier, const int (&x)[4]) {
    // groups of 8 rows are 1,024 bytes; the swizzle goes by the address
    if (to % 1024) fail("a swizzled box that starts within a group of 8 rows");
    memset(at(to, map.rows * 128), 0xff, map.rows * 128);
    loads.push_back({to, barrier, map, {x[0], x[1], x[2], x[3]}});
    may_yield();
}

struct Issued {
    void *d;
    const uint32_t *registers;
    uint64_t a, b;
    int accumulate, n;
    Type type;
};
void wgmma(void *d, const uint32_t *registers, uint64_t a, uint64_t b, int accumulate, int n, Type type) {
    Issued mine{d, registers, a, b, accumulate, n, type};
    meet("wgmma", current / 128 * 128, 128, &mine, [](void **all) {
        const Issued &first = *static_cast<Issued *>(all[0]);
        Product p{{}, {}, first.a, first.b, first.accumulate, first.n, first.type};
        for (int i = 0; i < 128; ++i) {
            const Issued &x = *static_cast<Issued *>(all[i]);
            if (x.a != first.a || x.b != first.b || x.accumulate != first.accumulate) fail("wgmma: the warpgroup disagrees");
            p.d[i] = x.d, p.registers[i] = x.registers;
            // an accumulator that is read too early is NaN, or greater than any sum
            if (x.accumulate) continue;
            if (x.type == TYPE_I8) std::fill_n(static_cast<int32_t *>(x.d), x.n / 2, 0x7f000000);
            else std::fill_n(static_cast<float *>(x.d), x.n / 2, NAN);
        }
        products[current / 128 * 128].open.push_back(p);
        ++products_;
    });
}
void wgmma_fence() { meet("wgmma.fence", current / 128 * 128, 128, nullptr, [](void **) {}); }
void wgmma_commit() {
    meet("wgmma.commit", current / 128 * 128, 128, nullptr, [](void **) {
        Products &mine = products[current / 128 * 128];
        mine.groups.push_back(std::move(mine.open));
        mine.open.clear();
    });
}
void wgmma_wait(int pending) {
    meet("wgmma.wait", current / 128 * 128, 128, &pending,
         [](void **all) { finish_products(current / 128 * 128, *static_cast<int *>(all[0])); });
}

int configured() { return config.changes; }
void prepare(void *kernel, int shared) {
    if (shared > config.device.shared_block) throw std::runtime_error("more shared memory than the device has");
    if (!config.prepared.insert({kernel, shared}).second) throw std::runtime_error("a kernel's attributes were set twice");
}
void may_launch(void *kernel, int shared) {
    const auto found = config.prepared.find(kernel);
    if (found == config.prepared.end()) throw std::runtime_error("a kernel was not loaded before its launch");
    if (shared > found->second) throw std::runtime_error("more shared memory than the kernel opted in to");
}

void run(const std::function<void()> &kernel, int blocks, int threads, int shared) {
    if (shared > config.device.shared_block) throw std::runtime_error("more shared memory than the device has");
    if (threads > MOST_THREADS) throw std::runtime_error("more threads than a block has");
    fibers.resize(std::max<size_t>(fibers.size(), threads));
    memory.resize(shared + CANARY + 1024);
    shared_base = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
    shared_size = shared;
    kernel_ = &kernel, threads_ = threads, grid_ = blocks;
    random_.seed(config.seed);
    failure.clear();
    // a block that writes what belongs to another is right in one order only
    std::vector<int> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (config.seed) std::shuffle(order.begin(), order.end(), random_);
    for (const int block : order) {
        if (!failure.empty()) break;
        block_ = block;
        run_block();
    }
    if (!failure.empty()) throw std::runtime_error("emulator: " + failure);
}

}  // namespace emulator
}  // namespace latemax

/* seed 0: always the same order, and copies land at once; other seeds: random orders and moments. */
extern "C" __attribute__((visibility("default"))) void latemax_emulator(unsigned seed, int capability, int multiprocessors,
                                                                        int shared, int launch_clocks) {
    latemax::config.seed = seed;
    latemax::config.device = {capability, multiprocessors, shared, shared + 1024, launch_clocks};
    ++latemax::config.changes;
    latemax::products_ = 0;
    latemax::config.prepared.clear();
}
extern "C" __attribute__((visibility("default"))) int64_t latemax_products() { return latemax::products_; }
