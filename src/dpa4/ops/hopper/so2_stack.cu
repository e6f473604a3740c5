// The stack of SO(2) layers and its derivative with respect to features, in one kernel each for Hopper GPUs; launched
// by dpa4.ops.hopper.so2_stack. docs/adr/0017 explains the design and what was tried.
//
// A thread block takes 64 edges through all layers. Their features never leave the chip between layers: their float16
// parts (see dpa4.ops.triton.split_matmul) are in shared memory, where tensor cores read them, and sums are in
// registers. Two groups of four warps, the consumers, compute. Each has half of the channels of every row of the edge
// frame, so that everything a gate needs is in one group. A third group, the producers, copies weights to shared memory
// in the order of their use, from a stream that has the layout of shared memory already.
//
// "Block" below means a row of the edge frame with its 64 channels: order 0 of degrees 0..3, then order -1 and order +1
// of degrees 1..3. Of every block a thread holds 8 channels, in two runs of four, of two edges.

constexpr int DEGREES = 4;                   // 0..3
constexpr int GATED = DEGREES - 1;           // degrees above zero: degrees of order 1, and degrees with weights of gates
constexpr int BLOCKS = DEGREES + 2 * GATED;  // rows of the edge frame
constexpr int CHANNELS = 64;
constexpr int HALF = CHANNELS / 2;           // channels of a group
constexpr int WIDTH = BLOCKS * CHANNELS;
constexpr int EDGES = 64;                    // edges of a thread block
constexpr int MAX_GATES = 8;                 // gated layers

// Shared memory: features of edges, slots for weights of both groups, barriers, largest entries of edges. Sizes in
// bytes.
constexpr int PIECE = EDGES * CHANNELS * 2;  // one float16 part of a block
constexpr int BLOCK = 2 * PIECE;             // the high part, then the low part
constexpr int SLOT = 8192;
constexpr int SLOTS = 4;                     // slots of a group
constexpr int AT_SLOTS = BLOCKS * BLOCK;
constexpr int AT_BARRIERS = AT_SLOTS + 2 * SLOTS * SLOT;
constexpr int AT_MAXIMA = AT_BARRIERS + 2 * SLOTS * 16;

// Sections of a stream, each for one slot. They hold both float16 parts of 32 rows and COLUMNS_0 or COLUMNS_1 columns
// of weights; of 64 rows and 32 columns of the weights of gates or their transpose; or half of a block of saved
// features.
constexpr int COLUMNS_0 = 2 * HALF, COLUMNS_1 = GATED * HALF / 2;  // for orders 0 and 1
constexpr int PART_0 = 128 * COLUMNS_0, PART_1 = 128 * COLUMNS_1, PART_GATE = 256 * HALF, PART_KEPT = BLOCK / 2;

struct Tensors { float* of[MAX_GATES]; };

// --- Tensor cores -------------------------------------------------------------------------------------------------

// Descriptors of operands in shared memory, with swizzled rows of 128 bytes (edges) and of 64 bytes (weights). The
// lower half of a descriptor is an address in units of 16 bytes; adding to it moves the operand.
__device__ inline unsigned descriptor(unsigned at) { return at / 16 | 1 << 16; }
__device__ inline unsigned long long edges_at(unsigned d) { return (1ull << 62) | (64ull << 32) | d; }
__device__ inline unsigned long long weights_at(unsigned d) { return (2ull << 62) | (32ull << 32) | d; }

#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R8(i) R4(i), R4(i + 4)
#define MMA(N, REGISTERS, A, B, ADD, SIGN, ...)                                                             \
  template <int sign>                                                                                       \
  __device__ inline void mma(float (&d)[N / 2], unsigned long long a, unsigned long long b, int add) {      \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0;\n"                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGISTERS "}, " A ", " B ", p, " \
                 SIGN ", 1, 0, 0;}\n" : __VA_ARGS__ : "l"(a), "l"(b), "r"(add), "n"(sign));                 \
  }
#define REGISTERS_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
MMA(32, REGISTERS_32, "%16", "%17", "%18", "%19", R8(0), R8(8))
#define REGISTERS_48 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"
MMA(48, REGISTERS_48, "%24", "%25", "%26", "%27", R8(0), R8(8), R8(16))
#define REGISTERS_64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
MMA(64, REGISTERS_64, "%32", "%33", "%34", "%35", R8(0), R8(8), R8(16), R8(24))

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ inline void end_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Adds the product of 64 columns of edge features with weights, without the product of both low parts. weights:
// addresses of the high and low part for the first 32 feature columns, then of the high and low part for the last 32; N
// columns each. Small terms are added first, since tensor cores truncate.
template <int N, int sign>
__device__ inline void add_products(float (&d)[N / 2], unsigned edges, const unsigned (&weights)[4], int add) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    unsigned high = weights[i / 2 * 2] + i % 2 * 2, low = weights[i / 2 * 2 + 1] + i % 2 * 2;
    mma<sign>(d, edges_at(edges + (PIECE + 32 * i) / 16), weights_at(high), add | i);
    mma<sign>(d, edges_at(edges + 32 * i / 16), weights_at(low), 1);
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    mma<sign>(d, edges_at(edges + 32 * i / 16), weights_at(weights[i / 2 * 2] + i % 2 * 2), 1);
}

// --- Asynchronous copies from memory --------------------------------------------------------------------------------

__device__ inline void init_barrier(unsigned at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ inline void wait(unsigned at, unsigned parity) {
  asm volatile(
      "{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;}\n"
      ::"r"(at), "r"(parity) : "memory");
}

// The stream of one group. Its slots form a ring: the producer fills and the consumers empty one after another.
struct Stream {
  unsigned slots, barriers;  // addresses; each slot has two barriers, full and empty
  int count, parity;         // producer: sections filled so far; consumer: parity of the next four sections

  __device__ Stream(unsigned shared, int group) : count(0), parity(0) {
    slots = shared + AT_SLOTS + group * SLOTS * SLOT;
    barriers = shared + AT_BARRIERS + group * SLOTS * 16;
  }
  __device__ void fill(const char*& from, int bytes, int parts = 1) {
    for (int i = 0; i < parts; i++) {
      unsigned full = expect(bytes);
      copy(slots + SLOT * (count % SLOTS), from, bytes, full);
      from += bytes;
      count++;
    }
  }
  // Waits until the next slot is empty, announces the number of bytes to come, and returns the barrier "full".
  __device__ unsigned expect(int bytes) const {
    unsigned full = barriers + 16 * (count % SLOTS);
    wait(full + 8, count / SLOTS % 2 ^ 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes) : "memory");
    return full;
  }
  __device__ static void copy(unsigned to, const void* from, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
  }
  // Skips a slot without data, so that the following sections begin with the first slot.
  __device__ void skip() {
    unsigned full = barriers + 16 * (count % SLOTS);
    wait(full + 8, count / SLOTS % 2 ^ 1);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(full) : "memory");
    count++;
  }
  __device__ void fill_product(const char*& from) {
    fill(from, PART_1, 8 * GATED);
    fill(from, PART_0, 4 * DEGREES);
  }
  // Waits for section i, counted from the last `advance`, and returns its address.
  __device__ unsigned take(int i) const {
    wait(barriers + 16 * (i % SLOTS), parity ^ i / SLOTS % 2);
    return slots + SLOT * (i % SLOTS);
  }
  __device__ void release(int i) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barriers + 16 * (i % SLOTS) + 8) : "memory");
  }
  // Releases a section that was read by ordinary loads. Without the fence the copy engine would not wait for them, and
  // would rarely overwrite the slot too early.
  __device__ void release_read(int i) const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    release(i);
  }
  __device__ void advance(int parts) { parity ^= parts / SLOTS % 2; }  // parts: a multiple of the number of slots
};

__device__ inline void prefetch(const float* from, int edges) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(edges * WIDTH * 4) : "memory");
}

// --- Features of edges --------------------------------------------------------------------------------------------

// 8 channels of two edges of a block: [2 runs][2 pairs of channels][2 edges][2 channels].
typedef float Part[16];
__device__ inline float4 run_of(const float* v, int half, int run) {
  const float* at = v + 8 * run + 2 * half;
  return make_float4(at[0], at[1], at[4], at[5]);
}
__device__ inline void set_run(float* v, int half, int run, float4 to) {
  float* at = v + 8 * run + 2 * half;
  at[0] = to.x, at[1] = to.y, at[4] = to.z, at[5] = to.w;
}

__device__ inline void sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
__device__ inline void published() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  sync();
}

struct Scale { float up, down; };

// Powers of two, see _power_of_two in dpa4.ops.triton.split_matmul.
__device__ inline Scale scale_of(float largest) {
  int exponent = max(__float_as_int(largest) >> 23, 15);
  return {__int_as_float((268 - exponent) << 23), __int_as_float((exponent - 14) << 23)};
}
__device__ inline float2 two_floats(unsigned halves) {
  float2 v;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(v.x), "=f"(v.y) : "r"(halves));
  return v;
}
__device__ inline unsigned two_halves(float a, float b) {
  unsigned v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  return v;
}

struct Thread {
  char* base;            // start of shared memory
  unsigned shared;       // the same as an address in shared memory
  int group, row, quad;  // group of warps; first edge (the second is row + 8); position among four threads of one edge
  char* runs[2];         // places of the two runs of four channels in a float16 part, in the layout of the tensor cores

  __device__ Thread(char* base, unsigned shared) : base(base), shared(shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    group = __shfl_sync(~0u, warp / 4, 0);  // the shuffle tells the compiler that it is uniform in a warp
    row = warp % 4 * 16 + lane / 4, quad = lane % 4;
#pragma unroll
    for (int run = 0; run < 2; run++)
      runs[run] = base + row * 128 + (((group * 4 + run * 2 + quad / 2) ^ (row & 7)) << 4) + quad % 2 * 8;
  }
  __device__ char* piece(int block, int half, int run) const { return runs[run] + block * BLOCK + half * 1024; }
  __device__ int place(int block, int half, int run) const {  // offset in memory from the first edge
    return (row + 8 * half) * WIDTH + block * CHANNELS + group * 32 + run * 16 + quad * 4;
  }
  __device__ float* maxima(int which) const { return (float*)(base + AT_MAXIMA) + which * 2 * EDGES; }

  // Stores the largest entries of the two edges among this group's channels where the other group reads them.
  __device__ void tell(int which, float a, float b) const {
    float m[2] = {a, b};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 1));
      m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 2));
      if (quad == 0) maxima(which)[group * EDGES + row + 8 * h] = m[h];
    }
  }
  // Powers of two of the two edges, from the largest entries of both groups.
  __device__ void told(int which, Scale (&s)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int r = row + 8 * h;
      s[h] = scale_of(fmaxf(maxima(which)[r], maxima(which)[EDGES + r]));
    }
  }

  // Writes a block as float16 parts to shared memory, as operand of products.
  __device__ void publish(int block, const Part& v, const Scale (&s)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int run = 0; run < 2; run++) {
        float4 of = run_of(v, h, run);
        of = make_float4(of.x * s[h].up, of.y * s[h].up, of.z * s[h].up, of.w * s[h].up);
        uint2 high = make_uint2(two_halves(of.x, of.y), two_halves(of.z, of.w));
        float2 a = two_floats(high.x), b = two_floats(high.y);
        char* at = piece(block, h, run);
        *(uint2*)at = high;
        *(uint2*)(at + PIECE) = make_uint2(two_halves(of.x - a.x, of.y - a.y), two_halves(of.z - b.x, of.w - b.y));
      }
  }
  // Adds a published block, times a factor per edge.
  __device__ void add_published(int block, Part& v, const float (&down)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int run = 0; run < 2; run++) {
        const char* at = piece(block, h, run);
        uint2 high = *(const uint2*)at, low = *(const uint2*)(at + PIECE);
        float2 a = two_floats(high.x), b = two_floats(high.y), c = two_floats(low.x), d = two_floats(low.y);
        float4 of = run_of(v, h, run);
        set_run(v, h, run, make_float4(of.x + (a.x + c.x) * down[h], of.y + (a.y + c.y) * down[h],
                                       of.z + (b.x + d.x) * down[h], of.w + (b.y + d.y) * down[h]));
      }
  }
  // Stores numbers of this thread in float32, in the place of a block that is not published at the time.
  __device__ void park(int block, const float* v) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int run = 0; run < 2; run++) {
        char* at = piece(block, h, run);
        float4 of = run_of(v, h, run);
        *(float2*)at = make_float2(of.x, of.y);
        *(float2*)(at + PIECE) = make_float2(of.z, of.w);
      }
  }
  __device__ void unpark(int block, Part& v) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int run = 0; run < 2; run++) {
        const char* at = piece(block, h, run);
        float2 a = *(const float2*)at, b = *(const float2*)(at + PIECE);
        set_run(v, h, run, make_float4(a.x, a.y, b.x, b.y));
      }
  }
  __device__ void load(const float* from, int block, int edges, Part& v) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int run = 0; run < 2; run++)
        set_run(v, h, run, row + 8 * h < edges ? __ldg((const float4*)(from + place(block, h, run)))
                                               : make_float4(0, 0, 0, 0));
  }
  __device__ void store(float* to, int block, int edges, const Part& v) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int run = 0; run < 2; run++)
        if (row + 8 * h < edges) *(float4*)(to + place(block, h, run)) = run_of(v, h, run);
  }
  // Saves products for the derivative, in the order of the threads and degree by degree; see in_rows in so2_stack.py.
  __device__ void keep(float* to, int block, const Part& v) const {
    float4* at = (float4*)to + (group * BLOCKS + order(block)) * (BLOCK / 32) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 4; i++) at[128 * i] = run_of(v, i / 2, i % 2);
  }
  __device__ void kept(unsigned at, Part& v) const {
    const float4* from = (const float4*)(base + (at - shared)) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 4; i++) set_run(v, i / 2, i % 2, from[128 * i]);
  }
  __device__ static int order(int block) { return block < 1 ? 0 : 1 + (block - 1) % GATED * 3 + (block - 1) / GATED; }
};

__device__ inline void largest_of(const float* v, float (&m)[2]) {
#pragma unroll
  for (int i = 0; i < 16; i++) m[i / 2 % 2] = fmaxf(m[i / 2 % 2], fabsf(v[i]));
}
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// Features of all blocks in registers: order 0, and orders -1 and +1.
struct Features {
  float zero[16 * DEGREES], one[2][16 * GATED];

  __device__ Part& block(int b) {
    return *(Part*)(b < DEGREES ? zero + 16 * b : one[(b - DEGREES) / GATED] + (b - DEGREES) % GATED * 16);
  }
  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
      for (int i = 0; i < 16; i++) block(b)[i] = 0;
  }
  __device__ void load(const Thread& t, const float* from, int edges) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) t.load(from, b, edges, block(b));
  }
  __device__ void store(const Thread& t, float* to, int edges) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) t.store(to, b, edges, block(b));
  }
  __device__ void largest(int first, float (&m)[2]) {
    m[0] = m[1] = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
      if (b >= first) largest_of(block(b), m);
  }
  // Publishes all blocks; waits for both groups before and after.
  __device__ void publish(const Thread& t, float (&down)[2]) {
    float m[2];
    largest(0, m);
    t.tell(0, m[0], m[1]);
    sync();
    Scale s[2];
    t.told(0, s);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) t.publish(b, block(b), s);
    down[0] = s[0].down, down[1] = s[1].down;
    published();
  }
  // Adds the product of the published features with the next matrices of the stream, times a factor per edge. The loop
  // over degrees is unrolled only where registers suffice.
  template <int unrolled>
  __device__ void add_product(const Thread& t, Stream& w, const float (&down)[2], float scale_0, float scale_1) {
    float f[2] = {down[0] * scale_1, down[1] * scale_1};
    unsigned from = descriptor(t.shared), weights = descriptor(w.slots);
    // Except at the end of a loop, products are always running while the results of others are added.
#pragma unroll unrolled
    for (int k = 0; k < GATED; k++) {
      unsigned minus = from + (DEGREES + k) * BLOCK / 16, plus = minus + GATED * BLOCK / 16;
      float p[2][COLUMNS_1 / 2];
#pragma unroll
      for (int i = 0; i < 4; i++) {  // minus U - plus V, then minus V + plus U, each in two runs of channels
        int v = i / 2, run = i % 2;
        unsigned slot = weights + i % 2 * 2 * SLOT / 16;
        w.take(2 * i);
        w.take(2 * i + 1);
        begin_products();
        add_part<COLUMNS_1, 1>(p[0], minus, slot);
        commit_products();
        if (i > 0) {
          end_products<1>();
          w.release(2 * i - 2);
          w.release(2 * i - 1);
          add_run(i == 3 ? one[0] : one[1], p[1], 1 - run, f);
        }
        begin_products();
        if (v) add_part<COLUMNS_1, -1>(p[1], plus, slot);
        else add_part<COLUMNS_1, 1>(p[1], plus, slot);
        commit_products();
        end_products<1>();
        add_run(one[v], p[0], run, f);
      }
      end_products<0>();
      w.release(6);
      w.release(7);
      add_run(one[0], p[1], 1, f);
    }
    f[0] = down[0] * scale_0, f[1] = down[1] * scale_0;
#pragma unroll 1
    for (int k = 0; k < DEGREES; k++) {
      float p[COLUMNS_0 / 2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        w.take(2 * half);
        w.take(2 * half + 1);
        begin_products();
        add_part<COLUMNS_0, 1>(p, from + k * BLOCK / 16, weights + half * 2 * SLOT / 16);
        commit_products();
        end_products<0>();
        w.release(2 * half);
        w.release(2 * half + 1);
        add(zero + half * COLUMNS_0 / 2, p, f);
      }
      w.advance(4);
    }
  }
  // Multiplies 64 columns by the weights in two slots.
  template <int N, int sign>
  __device__ static void add_part(float (&p)[N / 2], unsigned edges, unsigned slot) {
    // The empty asm hides the addresses from the compiler. Otherwise it keeps precomputed descriptors in registers, and
    // spills sums (0.45 ms of the derivative, docs/adr/0017).
    asm volatile("" : "+r"(edges), "+r"(slot));
    unsigned weights[4] = {slot, slot + N * 4, slot + SLOT / 16, slot + SLOT / 16 + N * 4};
    add_products<N, sign>(p, edges, weights, 0);
  }
  __device__ static void add(float* to, const float (&p)[COLUMNS_0 / 2], const float (&f)[2]) {
#pragma unroll
    for (int i = 0; i < COLUMNS_0 / 2; i++) to[i] += p[i] * f[i / 2 % 2];
  }
  __device__ static void add_run(float* to, const float (&p)[COLUMNS_1 / 2], int run, const float (&f)[2]) {
#pragma unroll
    for (int i = 0; i < COLUMNS_1 / 2; i++) to[i / 8 * 16 + 8 * run + i % 8] += p[i] * f[i / 2 % 2];
  }
};

// Publishes the scalars s of both groups for the gates, and returns the factors of the products; waits for both groups
// before and after.
__device__ inline void publish_scalars(const Thread& t, const Part& s, float scale, float (&f)[2]) {
  float m[2] = {0, 0};
  largest_of(s, m);
  t.tell(1, m[0], m[1]);
  sync();
  Scale of_s[2];
  t.told(1, of_s);
  t.publish(0, s, of_s);
  published();
  f[0] = of_s[0].down * scale, f[1] = of_s[1].down * scale;
}
// Starts and ends the computation of the gates of a degree above zero; part: section of the stream with their weights.
__device__ inline void begin_gate(const Thread& t, const Stream& w, int part, Part& z) {
  unsigned weights[4], first = descriptor(w.take(part));
#pragma unroll
  for (int i = 0; i < 4; i++) weights[i] = first + i * HALF * 64 / 16;
  begin_products();
  add_products<HALF, 1>(z, descriptor(t.shared), weights, 0);
  commit_products();
}
__device__ inline void end_gate(const Stream& w, int part, const float (&f)[2], Part& z) {
  end_products<0>();
  w.release(part);
#pragma unroll
  for (int i = 0; i < 16; i++) z[i] = sigmoid(z[i] * f[i / 2 % 2]);
}

__device__ inline unsigned prepare(char* base) {
  unsigned shared = (unsigned)__cvta_generic_to_shared(base);
  if (threadIdx.x == 0) {
    if (shared % 1024) asm volatile("trap;");
    for (int i = 0; i < 2 * SLOTS; i++) {
      init_barrier(shared + AT_BARRIERS + 16 * i, 1);
      init_barrier(shared + AT_BARRIERS + 16 * i + 8, 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  return shared;
}

#define BEGIN_CONSUMERS asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#define BEGIN_PRODUCERS asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");

// Computes y (E, W). keep: also stores the products u of the gated layers and their largest entries (layers - 1, E),
// with E rounded up to a multiple of EDGES. weights: two streams of stream_bytes each; scales: for each layer the
// powers of two of orders 0 and 1 and of its gates.
extern "C" __global__ void __launch_bounds__(384, 1)
so2_value(const float* x, float* y, const __grid_constant__ Tensors us, float* maxima, const char* weights,
          const float* scales, int num_edges, int layers, int stream_bytes, int keep) {
  extern __shared__ char base[];
  unsigned shared = prepare(base);
  int tiles = (num_edges + EDGES - 1) / EDGES, warp = threadIdx.x / 32;
  if (warp >= 8) {
    BEGIN_PRODUCERS
    if (warp < 10 && threadIdx.x % 32 == 0) {
      Stream w(shared, warp - 8);
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const char* from = weights + (warp - 8) * stream_bytes;
        for (int layer = 0; layer < layers; layer++) {
          int next = (tile + gridDim.x) * EDGES;
          if (layer == layers - 1 && warp == 8 && next < num_edges)
            prefetch(x + (long long)next * WIDTH, min(EDGES, num_edges - next));
          w.fill_product(from);
          if (layer < layers - 1) w.fill(from, PART_GATE, GATED), w.skip();
        }
      }
    }
  } else {
    BEGIN_CONSUMERS
    Thread t(base, shared);
    Stream w(shared, t.group);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      int edges = min(num_edges - tile * EDGES, EDGES);
      long long first = (long long)tile * EDGES * WIDTH;
      Features v;
      float down[2];
      v.load(t, x + first, edges);
      v.publish(t, down);
#pragma unroll 1
      for (int layer = 0; layer < layers; layer++) {
        const float* scale = scales + 4 * layer;
        v.clear();
        v.add_product<GATED>(t, w, down, __ldg(scale), __ldg(scale + 1));
        if (layer == layers - 1) break;
        if (keep) {
#pragma unroll
          for (int b = 0; b < BLOCKS; b++) t.keep(us.of[layer] + first, b, v.block(b));
          float m[2];
          v.largest(0, m);
          t.tell(2, m[0], m[1]);
        }
        float f[2];
        {
          Part s, old = {};
          t.add_published(0, old, down);
#pragma unroll
          for (int i = 0; i < 16; i++) {
            s[i] = v.block(0)[i];
            v.block(0)[i] = old[i] + s[i] * sigmoid(s[i]);
          }
          publish_scalars(t, s, __ldg(scale + 2), f);
        }
        if (keep && threadIdx.x < EDGES)
          maxima[(long long)layer * tiles * EDGES + tile * EDGES + threadIdx.x] =
              fmaxf(t.maxima(2)[threadIdx.x], t.maxima(2)[EDGES + threadIdx.x]);
        Part z[2];
        begin_gate(t, w, 0, z[0]);
#pragma unroll
        for (int l = 0; l < GATED; l++) {
          end_gate(w, l, f, z[l % 2]);
          if (l + 1 < GATED) begin_gate(t, w, l + 1, z[1 - l % 2]);
#pragma unroll
          for (int b = 1 + l; b < BLOCKS; b += GATED) {
            Part& u = v.block(b);
#pragma unroll
            for (int i = 0; i < 16; i++) u[i] *= z[l % 2][i];
            t.add_published(b, u, down);
          }
        }
        w.take(GATED);
        w.release(GATED);
        w.advance(4);
        v.publish(t, down);
      }
      v.store(t, y + first, edges);
    }
  }
}

// Computes the gradient of x from g, the gradient of y, and the products u of the gated layers. The streams hold
// transposed matrices, from the last layer to the first.
extern "C" __global__ void __launch_bounds__(384, 1)
so2_vjp(const float* g, float* dx, const __grid_constant__ Tensors us, const float* maxima, const char* weights,
        const float* scales, int num_edges, int layers, int stream_bytes) {
  extern __shared__ char base[];
  unsigned shared = prepare(base);
  int tiles = (num_edges + EDGES - 1) / EDGES, warp = threadIdx.x / 32;
  if (warp >= 8) {
    BEGIN_PRODUCERS
    if (warp < 10 && threadIdx.x % 32 == 0) {
      int group = warp - 8;
      Stream w(shared, group);
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const char* from = weights + group * stream_bytes;
        for (int layer = layers - 1; layer >= 0; layer--) {
          if (layer < layers - 1) {
            const char* u = (const char*)(us.of[layer] + ((long long)tile * 2 + group) * EDGES * WIDTH / 2);
            unsigned full = w.expect(PART_KEPT + EDGES * 4);
            Stream::copy(shared + AT_MAXIMA + (8 + group) * EDGES * 4,
                         maxima + ((long long)layer * tiles + tile) * EDGES, EDGES * 4, full);
            Stream::copy(w.slots + SLOT * (w.count++ % SLOTS), u, PART_KEPT, full);
            u += PART_KEPT;
            for (int l = 0; l < GATED; l++) w.fill(from, PART_GATE), w.fill(u, PART_KEPT, 3);
            w.fill(from, PART_GATE, GATED);
          }
          int at = (layer ? tile : tile + gridDim.x) * EDGES;
          if (group == 0 && at < num_edges)
            prefetch((layer ? us.of[layer - 1] : g) + (long long)at * WIDTH,
                     layer ? EDGES : min(EDGES, num_edges - at));
          w.fill_product(from);
        }
      }
    }
  } else {
    BEGIN_CONSUMERS
    Thread t(base, shared);
    Stream w(shared, t.group);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      int edges = min(num_edges - tile * EDGES, EDGES);
      long long first = (long long)tile * EDGES * WIDTH;
      Features a;
      float down[2];
      a.load(t, g + first, edges);
      a.publish(t, down);
      const float* scale = scales + 4 * (layers - 1);
      a.clear();
      a.add_product<1>(t, w, down, __ldg(scale), __ldg(scale + 1));
#pragma unroll 1
      for (int layer = layers - 2; layer >= 0; layer--) {
        scale -= 4;
        Scale of_a[2], of_p[2], of_0[2];
        float m[2], f[2], bound[2];
        a.largest(1, m);  // gates are below 1, so this bounds the gated gradients
        t.tell(0, m[0], m[1]);
        {
          Part s;
          t.kept(w.take(0), s);
          bound[0] = t.maxima(4)[t.group * EDGES + t.row], bound[1] = t.maxima(4)[t.group * EDGES + t.row + 8];
          w.release_read(0);
          publish_scalars(t, s, __ldg(scale + 2), f);
          t.park(DEGREES, s);
        }
        t.told(0, of_a);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          // The scale of p is needed before p is known. p is a sum over three rows times sigma' <= 1 / 4, so it is at
          // most 3 / 4 of the product of the largest entries of a and u; the largest entry of a is below 2^15 times its
          // scale.
          bound[h] *= of_a[h].down * 32768;
          of_p[h] = scale_of(bound[h]);
        }
        Part z[2];
        begin_gate(t, w, 1, z[0]);
#pragma unroll
        for (int l = 0; l < GATED; l++) {
          Part &sigma = z[l % 2], sum = {}, u;
          end_gate(w, 1 + 4 * l, f, sigma);
          t.park(DEGREES + GATED + l, sigma);
#pragma unroll
          for (int b = 1 + l; b < BLOCKS; b += GATED) {
            int part = 2 + 4 * l + (b - 1) / GATED;
            t.kept(w.take(part), u);
            w.release_read(part);
            if (b < DEGREES && l + 1 < GATED) begin_gate(t, w, 5 + 4 * l, z[1 - l % 2]);
#pragma unroll
            for (int i = 0; i < 16; i++) sum[i] += u[i] * a.block(b)[i];
          }
#pragma unroll
          for (int i = 0; i < 16; i++) sum[i] *= sigma[i] - sigma[i] * sigma[i];
          t.publish(1 + l, sum, of_p);
        }
        published();
        Part d;
#pragma unroll
        for (int k = 0; k < GATED; k++) {
          unsigned weights[4], at = descriptor(w.take(13 + k));
#pragma unroll
          for (int i = 0; i < 4; i++) weights[i] = at + i * HALF * 64 / 16;
          begin_products();
          add_products<HALF, 1>(d, descriptor(t.shared) + (1 + k) * BLOCK / 16, weights, k);
          commit_products();
        }
        end_products<0>();
#pragma unroll
        for (int k = 0; k < GATED; k++) w.release(13 + k);
        w.advance(16);
        {
          Part s;
          t.unpark(DEGREES, s);
          m[0] = m[1] = 0;
#pragma unroll
          for (int i = 0; i < 16; i++) {
            float sigma = sigmoid(s[i]), of = a.block(0)[i] * sigma;
            d[i] = d[i] * of_p[i / 2 % 2].down * __ldg(scale + 2) + of + of * (1 - sigma) * s[i];
          }
          largest_of(d, m);
          t.tell(3, m[0], m[1]);
        }
        sync();
        t.told(3, of_0);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          of_a[h].up = fminf(of_a[h].up, of_0[h].up);
          of_a[h].down = fmaxf(of_a[h].down, of_0[h].down);
        }
        t.publish(0, d, of_a);
#pragma unroll
        for (int l = 0; l < GATED; l++) {
          Part sigma, du;
          t.unpark(DEGREES + GATED + l, sigma);
#pragma unroll
          for (int b = 1 + l; b < BLOCKS; b += GATED) {
#pragma unroll
            for (int i = 0; i < 16; i++) du[i] = a.block(b)[i] * sigma[i];
            t.publish(b, du, of_a);
          }
        }
        published();
        down[0] = of_a[0].down, down[1] = of_a[1].down;
        a.add_product<1>(t, w, down, __ldg(scale), __ldg(scale + 1));
      }
      a.store(t, dx + first, edges);
    }
  }
}
