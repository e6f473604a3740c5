// Kernels of dpa4.ops.edge_products and dpa4.ops.sparse_product for CPUs. They work edge by edge: the nodes stay in the
// cache, and nothing is copied.

#include <vector>

#include "small_matmul.h"

namespace {

// Edges per chunk of dynamic scheduling: on a machine with other load, threads are not equally fast.
constexpr int kEdges = 256;

// Shapes: matrices on edges (E, H, M, K), edge features (E, M, H c), node features (N, K, H c).
struct Sizes {
  int64_t edges, nodes, heads, rows, coefficients, channels, threads;
};

template <class T>
void edge_matmul(const Sizes& s, const T* a, const T* x, const int64_t* index, T* out) {
  int m = s.rows, k = s.coefficients, c = s.channels, width = s.heads * c;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, kEdges)
  for (int64_t e = 0; e < s.edges; e++)
    for (int h = 0; h < s.heads; h++) {
      const T* node = x + index[e] * k * width + h * c;
      product<T>(m, c, k, {a + (e * s.heads + h) * m * k, k, 1}, node, width, out + e * m * width + h * c, width, false);
    }
}

// One thread adds all edges of a node: order[offsets[n]] to order[offsets[n + 1]]. Without an order the edges of a node
// are adjacent, and with one head they are the rows of a single product.
template <class T>
void scatter_matmul(const Sizes& s, const T* a, const T* g, const int64_t* order, const int64_t* offsets, T* out) {
  int m = s.rows, k = s.coefficients, c = s.channels, width = s.heads * c;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 16)
  for (int64_t n = 0; n < s.nodes; n++) {
    T* node = out + n * k * width;
    if (!order && s.heads == 1) {
      int64_t first = offsets[n] * m;
      product<T>(k, c, offsets[n + 1] * m - first, {a + first * k, 1, k}, g + first * c, c, node, c, false);
      continue;
    }
    std::fill(node, node + k * width, T(0));
    for (int64_t i = offsets[n]; i < offsets[n + 1]; i++) {
      int64_t e = order ? order[i] : i;
      for (int h = 0; h < s.heads; h++)
        product<T>(k, c, m, {a + (e * s.heads + h) * m * k, 1, k}, g + e * m * width + h * c, width, node + h * c, width, true);
    }
  }
}

template <class T>
void edge_outer(const Sizes& s, const T* g, const T* x, const int64_t* index, T* out) {
  int m = s.rows, k = s.coefficients, c = s.channels, width = s.heads * c;
  int padded = (k + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  Buffer<T> transposed(size_t(s.nodes) * width * padded);  // (N, H c, K and padding): nodes are fewer than edges
#pragma omp parallel num_threads(s.threads)
  {
    Buffer<T> wide(m * padded);
#pragma omp for
    for (int64_t n = 0; n < s.nodes; n++)
      for (int j = 0; j < width; j++) {
        T* of_channel = transposed + (n * width + j) * padded;
        for (int i = 0; i < padded; i++) of_channel[i] = i < k ? x[(n * k + i) * width + j] : T(0);
      }
#pragma omp for schedule(dynamic, kEdges)
    for (int64_t e = 0; e < s.edges; e++)
      for (int h = 0; h < s.heads; h++) {
        const T* node = transposed + (index[e] * width + h * c) * padded;
        product<T>(m, padded, c, {g + e * m * width + h * c, width, 1}, node, padded, wide, padded, false);
        T* matrix = out + (e * s.heads + h) * m * k;
        for (int i = 0; i < m; i++) std::copy(wide + i * padded, wide + i * padded + k, matrix + i * k);
      }
  }
}

struct SparseSizes {
  int64_t items, a, b, result, width, terms, threads;
};

// A term of a bilinear map: result[k] += scale * a[i] * b[j].
template <class T> struct Term {
  int32_t i, j, k;
  T scale;
};

// Evaluates the map for N vectors of entries; row is the distance of the rows of an item in memory. Terms are sorted by
// k, so that sums stay in registers.
template <class T, int N>
inline void add_terms(const std::vector<Term<T>>& terms, const T* a, const T* b, T* result, ptrdiff_t row) {
  for (auto t = terms.begin(); t != terms.end();) {
    int32_t k = t->k;
    Vector<T> sum[N] = {};
    for (; t != terms.end() && t->k == k; t++) {
      const T *x = a + t->i * row, *y = b + t->j * row;
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[n] += t->scale * load(x + n * kLanes<T>) * load(y + n * kLanes<T>);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(result + k * row + n * kLanes<T>, sum[n]);
  }
}

// Transposes (count, n) to (n, lanes), and back.
template <class T> inline void transpose(int64_t count, int64_t n, const T* from, T* to) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t e = 0; e < count; e++) to[i * kLanes<T> + e] = from[e * n + i];
}
template <class T> inline void transpose_back(int64_t count, int64_t n, const T* from, T* to) {
  for (int64_t e = 0; e < count; e++)
    for (int64_t i = 0; i < n; i++) to[e * n + i] = from[i * kLanes<T> + e];
}

template <class T>
void bilinear(const SparseSizes& s, const int32_t* i, const int32_t* j, const int32_t* k, const T* scale, const T* a,
              const T* b, T* result) {
  int64_t width = s.width;
  std::vector<Term<T>> terms(s.terms);
  for (int64_t t = 0; t < s.terms; t++) terms[t] = {i[t], j[t], k[t], scale[t]};
  std::stable_sort(terms.begin(), terms.end(), [](const Term<T>& s, const Term<T>& t) { return s.k < t.k; });
  if (width > 1) {
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 8)
    for (int64_t n = 0; n < s.items; n++) {
      T* z = result + n * s.result * width;
      std::fill(z, z + s.result * width, T(0));
      in_panels<T>(width, [&](int c, auto vectors) {
        add_terms<T, vectors>(terms, a + n * s.a * width + c, b + n * s.b * width + c, z + c, width);
      });
    }
    return;
  }
  // Width one: as many items as a vector has lanes are processed side by side.
  constexpr int lanes = kLanes<T>;
#pragma omp parallel num_threads(s.threads)
  {
    Buffer<T> x(s.a * lanes), y(s.b * lanes), z(s.result * lanes);
    std::fill(x + 0, x + s.a * lanes, T(0));
    std::fill(y + 0, y + s.b * lanes, T(0));
#pragma omp for schedule(dynamic, 16)
    for (int64_t first = 0; first < s.items; first += lanes) {
      int64_t count = std::min<int64_t>(lanes, s.items - first);
      transpose<T>(count, s.a, a + first * s.a, x);
      transpose<T>(count, s.b, b + first * s.b, y);
      std::fill(z + 0, z + s.result * lanes, T(0));
      add_terms<T, 1>(terms, x, y, z, lanes);
      transpose_back<T>(count, s.result, z, result + first * s.result);
    }
  }
}

}  // namespace

#define DPA4_EXPORT(T)                                                                                              \
  extern "C" void edge_matmul_##T(const Sizes* s, const T* a, const T* x, const int64_t* index, T* out) {           \
    edge_matmul<T>(*s, a, x, index, out);                                                                           \
  }                                                                                                                 \
  extern "C" void scatter_matmul_##T(const Sizes* s, const T* a, const T* g, const int64_t* order,                  \
                                     const int64_t* offsets, T* out) {                                              \
    scatter_matmul<T>(*s, a, g, order, offsets, out);                                                               \
  }                                                                                                                 \
  extern "C" void edge_outer_##T(const Sizes* s, const T* g, const T* x, const int64_t* index, T* out) {            \
    edge_outer<T>(*s, g, x, index, out);                                                                            \
  }                                                                                                                 \
  extern "C" void bilinear_##T(const SparseSizes* s, const int32_t* i, const int32_t* j, const int32_t* k,        \
                               const T* scale, const T* a, const T* b, T* result) {                                 \
    bilinear<T>(*s, i, j, k, scale, a, b, result);                                                                  \
  }
DPA4_EXPORT(float)
DPA4_EXPORT(double)
