// The functions of dpa4.kernels.rotate and dpa4.kernels.entries on a CPU, edge by edge: nodes stay in its cache, nothing
// is copied.

#include "product.h"

namespace {

// Matrices on edges (E, H, M, K), edge features (E, M, H c), node features (N, K, H c).
struct Sizes {
  int64_t edges, nodes, heads, rows, coefficients, channels, threads;
};

template <class T>
void edge_matmul(const Sizes& s, const T* a, const T* x, const int64_t* index, T* out) {
  int m = s.rows, k = s.coefficients, c = s.channels, width = s.heads * c;
#pragma omp parallel for num_threads(s.threads)
  for (int64_t e = 0; e < s.edges; e++)
    for (int h = 0; h < s.heads; h++) {
      const T* node = x + index[e] * k * width + h * c;
      product<T>(m, c, k, {a + (e * s.heads + h) * m * k, k, 1}, node, width, out + e * m * width + h * c, width, false);
    }
}

// Each node's edges by one thread: order[offsets[n]] to order[offsets[n + 1]], or without an order a run of edges, which
// are then the rows of a single product.
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
#pragma omp for
    for (int64_t e = 0; e < s.edges; e++)
      for (int h = 0; h < s.heads; h++) {
        const T* node = transposed + (index[e] * width + h * c) * padded;
        product<T>(m, padded, c, {g + e * m * width + h * c, width, 1}, node, padded, wide, padded, false);
        T* matrix = out + (e * s.heads + h) * m * k;
        for (int i = 0; i < m; i++) std::copy(wide + i * padded, wide + i * padded + k, matrix + i * k);
      }
  }
}

// out[place] += scale * a[left] * b[right] for all terms of every edge.
template <class T>
void entries(const int64_t* sizes, const int32_t* left, const int32_t* right, const int32_t* place, const double* scale,
             const T* a, const T* b, T* out) {
  int64_t edges = sizes[0], of_a = sizes[1], of_b = sizes[2], of_out = sizes[3], terms = sizes[4];
#pragma omp parallel for num_threads(sizes[5])
  for (int64_t e = 0; e < edges; e++) {
    const T *x = a + e * of_a, *y = b + e * of_b;
    T* z = out + e * of_out;
    std::fill(z, z + of_out, T(0));
    for (int64_t t = 0; t < terms; t++) z[place[t]] += T(scale[t]) * x[left[t]] * y[right[t]];
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
  extern "C" void entries_##T(const int64_t* sizes, const int32_t* left, const int32_t* right,                      \
                              const int32_t* place, const double* scale, const T* a, const T* b, T* out) {          \
    entries<T>(sizes, left, right, place, scale, a, b, out);                                                        \
  }
DPA4_EXPORT(float)
DPA4_EXPORT(double)
