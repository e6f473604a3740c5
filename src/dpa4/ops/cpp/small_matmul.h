// Products of small matrices, and elementwise functions, in vectors of the widest registers.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kSums = 24;  // 24 of 32 registers hold sums
#else
constexpr int kVectorBytes = 32, kSums = 12;  // 12 of 16 registers
#endif

// Properties of a floating-point type. Integers: integer vector of the same size; kFraction: bits of the fraction;
// kBias: bias of the exponent; kTerms: terms of the series of exp; kRounding: adding it rounds to an integer; kLargest:
// bound of the argument of exp.
template <class T> struct Format;
template <> struct Format<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr int kFraction = 23, kBias = 127, kTerms = 7;
  static constexpr float kRounding = 12582912.0f, kLargest = 87.0f;
};
template <> struct Format<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr int kFraction = 52, kBias = 1023, kTerms = 13;
  static constexpr double kRounding = 6755399441055744.0, kLargest = 708.0;
};
template <class T> using Vector = typename Format<T>::Vector;
template <class T> constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T> inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T> inline void store(T* p, Vector<T> v) { std::memcpy(p, &v, sizeof v); }

// Calls f(i) for i = 0, lanes, 2 lanes, ... below n, which is a multiple of the lanes.
template <class T, class F> inline void in_vectors(int n, F f) {
  for (int i = 0; i < n; i += kLanes<T>) f(i);
}

// Aligned, uninitialised memory.
template <class T> class Buffer {
 public:
  explicit Buffer(size_t n) : data_(new (std::align_val_t(64)) T[n]) {}
  ~Buffer() { ::operator delete[](data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// A matrix whose element (i, k) is data[i * row + k * step].
template <class T> struct Strided {
  const T* data;
  ptrdiff_t row, step;
};

// Computes M rows and N vectors of columns of C = A B, or C += A B.
template <class T, int M, int N>
inline void block(int k, Strided<T> a, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, bool add) {
  Vector<T> sum[M][N];
  const T* pairs[(M + 1) / 2];  // addresses of every second row only, to save registers
#pragma GCC unroll 16
  for (int i = 0; i < M; i += 2) pairs[i / 2] = a.data + i * a.row;
  if (!add)  // the memory of the result may not be in the cache yet
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) __builtin_prefetch(c + i * ldc + j * kLanes<T>, 1);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) sum[i][j] = add ? load(c + i * ldc + j * kLanes<T>) : Vector<T>{};
  for (int l = 0; l < k; l++) {
    Vector<T> row[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) row[j] = load(b + l * ldb + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      T of_row = pairs[i / 2][l * a.step + (i % 2) * a.row];
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) sum[i][j] += of_row * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) store(c + i * ldc + j * kLanes<T>, sum[i][j]);
}

// Computes a block of m <= M rows, with m known at run time only.
template <class T, int N, int M>
inline void rest(int m, int k, Strided<T> a, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, bool add) {
  if constexpr (M > 0) {
    if (m == M) block<T, M, N>(k, a, b, ldb, c, ldc, add);
    else rest<T, N, M - 1>(m, k, a, b, ldb, c, ldc, add);
  }
}

// Computes N vectors of columns, M rows at a time.
template <class T, int N, int M = kSums / std::max(N, 2)>
inline void columns(int m, int k, Strided<T> a, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, bool add) {
  int i = 0;
  for (; i + M <= m; i += M)
    block<T, M, N>(k, {a.data + i * a.row, a.row, a.step}, b, ldb, c + i * ldc, ldc, add);
  if (i < m) rest<T, N, M - 1>(m - i, k, {a.data + i * a.row, a.row, a.step}, b, ldb, c + i * ldc, ldc, add);
}

// Calls f(first, N) for panels of N <= 4 vectors of columns; n is a multiple of the lanes.
template <class T, class F> inline void in_panels(int n, F f) {
  constexpr int lanes = kLanes<T>;
  using std::integral_constant;
  for (int j = 0; j < n;) {
    int left = (n - j) / lanes;
    if (left == 4 || left > 6) f(j, integral_constant<int, 4>()), j += 4 * lanes;
    else if (left > 2) f(j, integral_constant<int, 3>()), j += 3 * lanes;
    else if (left == 2) f(j, integral_constant<int, 2>()), j += 2 * lanes;
    else f(j, integral_constant<int, 1>()), j += lanes;
  }
}

// C (m, n) = A (m, k) B (k, n), or C += A B; n is a multiple of the lanes.
template <class T>
inline void product(int m, int n, int k, Strided<T> a, const T* b, ptrdiff_t ldb, T* c, ptrdiff_t ldc, bool add) {
  in_panels<T>(n, [&](int j, auto width) { columns<T, width>(m, k, a, b + j, ldb, c + j, ldc, add); });
}

// The same for B stored panel by panel, see `pack`. In ordinary storage its rows would compete for a few sets of the
// cache.
template <class T>
inline void packed_product(int m, int n, int k, Strided<T> a, const T* b, T* c, ptrdiff_t ldc, bool add) {
  in_panels<T>(n, [&](int j, auto width) {
    columns<T, width>(m, k, a, b + ptrdiff_t(j) * k, width * kLanes<T>, c + j, ldc, add);
  });
}

// Stores B (k, n) panel by panel.
template <class T> void pack(int k, int n, Strided<T> b, T* out) {
  in_panels<T>(n, [&](int j, auto width) {
    for (int l = 0; l < k; l++)
      for (int i = 0; i < width * kLanes<T>; i++) *out++ = b.data[l * b.row + (j + i) * b.step];
  });
}

// exp(x) up to rounding; x is clipped to the range in which the result is finite.
template <class T> inline Vector<T> exponential(Vector<T> x) {
  using F = Format<T>;
  constexpr T log2e = T(1.4426950408889634074), high = T(0.693359375), low = T(-2.12194440054690583e-4);
  x = x < -F::kLargest ? Vector<T>{} - F::kLargest : x;
  x = x > F::kLargest ? Vector<T>{} + F::kLargest : x;
  Vector<T> shifted = x * log2e + F::kRounding, n = shifted - F::kRounding;
  Vector<T> r = x - n * high - n * low, sum = Vector<T>{} + T(1);
  for (int k = F::kTerms; k > 0; k--) sum = T(1) + sum * r * T(1.0 / k);
  auto bits = (typename F::Integers)shifted - (typename F::Integers)(Vector<T>{} + F::kRounding);
  return sum * (Vector<T>)((bits + F::kBias) << F::kFraction);
}

template <class T> inline Vector<T> sigmoid(Vector<T> x) { return T(1) / (T(1) + exponential<T>(-x)); }

}  // namespace
