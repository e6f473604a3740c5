// Stages of a stack of SO(2) layers (dpa4.ops.so2_stack) for CPUs. A tile of a few edges passes through all layers, so
// that features between layers stay in the cache. Formulas and names of the gates are those of dpa4.ops.gate.

#include <omp.h>

#include <memory>
#include <vector>

#include "small_matmul.h"

namespace {

constexpr int kTile = 48;  // edges of a tile; a multiple of the rows of a block in small_matmul.h

// Sizes and weights. Features have the shape (F, E, W), W = rows * channels. Layer t has a matrix (F, K, K) for each
// order, from matrices[t * (mmax + 1)] on, and gates[t] (F, c, lmax c) unless it is the last.
//
// Matrices of orders above zero have the form [[U, V], [-V, U]]: they multiply complex numbers x + iy by U + iV, for
// which three products of half the size suffice instead of four (Gauss). If separate is not zero, they are U alone,
// (F, K / 2, K / 2), and x and y are multiplied by U each.
template <class T> struct Stack {
  int64_t focuses, edges, layers, lmax, mmax, channels, separate, threads;
  const T* const* matrices;
  const T* const* gates;

  int num_gates() const { return (lmax + 1) * channels; }  // per edge, including those of the scalars
  int order_size(int m) const { return (m ? 2 : 1) * (lmax - m + 1) * channels; }
  int matrix_size(int m) const { return m && separate ? order_size(m) / 2 : order_size(m); }
  bool is_complex(int m) const { return m && !separate; }
  int width() const { return end_of(mmax); }
  int end_of(int m) const {
    int total = 0;
    for (int i = 0; i <= m; i++) total += order_size(i);
    return total;
  }

  // Calls f(column, columns, gate) for the rows of each signed order: first column, number of columns, first gate.
  template <class F> void runs(F f) const {
    f(0, num_gates(), 0);
    for (int m = 1; m <= mmax; m++) {
      int size = order_size(m) / 2, first = end_of(m - 1);
      f(first, size, m * int(channels));
      f(first + size, size, m * int(channels));
    }
  }
};

// Weights of one focus stream, stored in panels.
template <class T> class Weights {
 public:
  // transposed: stores transposed matrices, for derivatives.
  Weights(const Stack<T>& s, int focus, bool transposed) : s_(s), orders_(s.mmax + 1) {
    for (int i = 0; i < s.layers * orders_; i++) {
      int n = s.matrix_size(i % orders_);
      const T* w = s.matrices[i] + ptrdiff_t(focus) * n * n;
      if (s.is_complex(i % orders_)) add_complex(w, n, transposed);
      else add(matrices_, w, n, n, transposed);
    }
    int c = s.channels, gates = s.lmax * c;
    for (int t = 0; t + 1 < s.layers; t++) {
      const T* g = s.gates[t] + ptrdiff_t(focus) * c * gates;
      add(gates_, g, c, gates, false);
      if (transposed) add(transposed_gates_, g, c, gates, true);
    }
  }

  // Multiplies features by the matrices of layer t, which are transposed if the weights were stored so. spare: memory
  // for features.
  void layer(int n, int t, const T* x, T* y, bool add, T* spare) const {
    int width = s_.width(), size = s_.order_size(0);
    packed_product<T>(n, size, size, {x, width, 1}, *matrices_[t * orders_], y, width, add);
    for (int m = 1; m < orders_; m++) {
      int half = s_.order_size(m) / 2, first = s_.end_of(m - 1), second = first + half;
      const T* w = *matrices_[t * orders_ + m];
      if (s_.separate) {
        for (int at : {first, second}) packed_product<T>(n, half, half, {x + at, width, 1}, w, y + at, width, add);
        continue;
      }
      T *sum = spare, *common = spare + n * half;
      for (int e = 0; e < n; e++)
        in_vectors<T>(half, [&](int j) {
          store(sum + e * half + j, load(x + e * width + first + j) + load(x + e * width + second + j));
        });
      packed_product<T>(n, half, half, {sum, half, 1}, w, common, half, false);
      for (int e = 0; e < n; e++)
        in_vectors<T>(half, [&](int j) {
          Vector<T> v = load(common + e * half + j);
          T *one = y + e * width + first + j, *other = y + e * width + second + j;
          store(one, add ? load(one) + v : v);
          store(other, add ? load(other) + v : v);
        });
      packed_product<T>(n, half, half, {x + first, width, 1}, w + half * half, y + second, width, true);
      packed_product<T>(n, half, half, {x + second, width, 1}, w + 2 * half * half, y + first, width, true);
    }
  }

  // Arguments z of the gates: the scalars s, then s G.
  void logits(int n, int t, const T* u, T* z) const {
    int c = s_.channels, width = s_.width(), gates = s_.num_gates();
    for (int i = 0; i < n; i++) std::copy(u + i * width, u + i * width + c, z + i * gates);
    packed_product<T>(n, gates - c, c, {u, width, 1}, *gates_[t], z + c, gates, false);
  }

  // Adds p_0 + (p_1, p_2, ...) G^T to the scalars of y.
  void through_scalars(int n, int t, const T* p, T* y) const {
    int c = s_.channels, width = s_.width(), gates = s_.num_gates();
    packed_product<T>(n, c, gates - c, {p + c, gates, 1}, *transposed_gates_[t], y, width, true);
    for (int i = 0; i < n; i++)
      in_vectors<T>(c, [&](int j) { store(y + i * width + j, load(y + i * width + j) + load(p + i * gates + j)); });
  }

 private:
  using Panels = std::vector<std::unique_ptr<Buffer<T>>>;

  static void add(Panels& panels, const T* w, int rows, int columns, bool transposed) {
    panels.push_back(std::make_unique<Buffer<T>>(size_t(rows) * columns));
    if (transposed) pack<T>(columns, rows, {w, 1, columns}, *panels.back());
    else pack<T>(rows, columns, {w, columns, 1}, *panels.back());
  }

  // Stores U, V - U and -U - V. With sum = x + y: common = sum U, then x U - y V = common - y (U + V) and
  // x V + y U = common + x (V - U).
  void add_complex(const T* w, int n, bool transposed) {
    int half = n / 2, size = half * half;
    std::vector<T> parts(3 * size);
    for (int k = 0; k < half; k++)
      for (int j = 0; j < half; j++) {
        T u = transposed ? w[j * n + k] : w[k * n + j];
        T v = transposed ? w[(half + j) * n + k] : w[k * n + half + j];
        int i = k * half + j;
        parts[i] = u, parts[size + i] = v - u, parts[2 * size + i] = -u - v;
      }
    matrices_.push_back(std::make_unique<Buffer<T>>(parts.size()));
    for (int i = 0; i < 3; i++) pack<T>(half, half, {parts.data() + i * size, half, 1}, *matrices_.back() + i * size);
  }

  const Stack<T>& s_;
  int orders_;
  Panels matrices_, gates_, transposed_gates_;
};

// Elementwise functions of a tile of n edges, with features (n, W) and gates (n, (lmax + 1) c).
template <class T> struct Tile {
  const Stack<T>& s;
  int n, width, gates;
  T* spare;  // memory for the features of two tiles

  Tile(const Stack<T>& s, int n, T* spare) : s(s), n(n), width(s.width()), gates(s.num_gates()), spare(spare) {}

  // Calls f(i, g) with the offset of each vector of features and the offset of its gates.
  template <class F> void features(F f) const {
    s.runs([&](int column, int columns, int gate) {
      for (int e = 0; e < n; e++)
        in_vectors<T>(columns, [&](int j) { f(e * width + column + j, e * gates + gate + j); });
    });
  }

  template <class F> void all_gates(F f) const { in_vectors<T>(n * gates, f); }

  void sigmoids(T* z) const {
    all_gates([&](int i) { store(z + i, sigmoid<T>(load(z + i))); });
  }

  // Sums a u over the rows of each degree; add: adds the sums to p.
  void contract(const T* a, const T* u, T* p, bool add) const {
    s.runs([&](int column, int columns, int gate) {
      for (int e = 0; e < n; e++)
        in_vectors<T>(columns, [&](int j) {
          int i = e * width + column + j, g = e * gates + gate + j;
          Vector<T> product = load(a + i) * load(u + i);
          store(p + g, add || column ? load(p + g) + product : product);
        });
    });
  }

  // Computes du = a D from the sums p, see dpa4.ops.gate.
  void weighted(const Weights<T>& w, int t, const T* a, const T* sigma, const T* p, T* du) const {
    features([&](int i, int g) { store(du + i, load(a + i) * load(sigma + g)); });
    w.through_scalars(n, t, p, du);
  }

  void copy(const T* from, T* to) const { std::copy(from, from + ptrdiff_t(n) * width, to); }
};

template <class T> inline Vector<T> slope(Vector<T> sigma) { return sigma - sigma * sigma; }

// Calls f(w, tile, offset, focus, work) for all tiles of all edges. offset: first feature of the tile; work: memory for
// four times the features and four times the gates of a tile; always_same: whether every thread gets the same tiles in
// every call, for results that are the same to the last bit.
template <class T, class F> void in_tiles(const Stack<T>& s, bool transposed, bool always_same, F f) {
  int64_t tiles = (s.edges + kTile - 1) / kTile;
  omp_set_schedule(always_same ? omp_sched_static : omp_sched_dynamic, always_same ? 0 : 4);
  for (int focus = 0; focus < s.focuses; focus++) {
    Weights<T> w(s, focus, transposed);
#pragma omp parallel num_threads(s.threads)
    {
      size_t features = size_t(kTile) * s.width(), gates = size_t(kTile) * s.num_gates();
      Buffer<T> memory(6 * features + 4 * gates);
      T *work[8], *spare = memory + 4 * (features + gates);
      for (int i = 0; i < 4; i++) work[i] = memory + i * features, work[4 + i] = memory + 4 * features + i * gates;
#pragma omp for schedule(runtime)
      for (int64_t i = 0; i < tiles; i++) {
        Tile<T> tile(s, std::min<int64_t>(kTile, s.edges - i * kTile), spare);
        f(w, tile, (focus * s.edges + i * kTile) * s.width(), focus, work);
      }
    }
  }
}

// Stage 0. us: products of the gated layers; kept: input of the last layer, or null.
template <class T> void value(const Stack<T>& s, const T* x_all, T* y_all, T* const* us, T* kept) {
  in_tiles(s, false, false, [&](const Weights<T>& w, const Tile<T>& tile, ptrdiff_t at, int, T* const* work) {
    T *x = work[0], *sigma = work[4];
    tile.copy(x_all + at, x);
    for (int t = 0; t + 1 < s.layers; t++) {
      T* u = us[t] + at;
      w.layer(tile.n, t, x, u, false, tile.spare);
      w.logits(tile.n, t, u, sigma);
      tile.sigmoids(sigma);
      tile.features([&](int i, int g) { store(x + i, load(x + i) + load(u + i) * load(sigma + g)); });
    }
    if (kept) tile.copy(x, kept + at);
    tile.copy(x, y_all + at);
    w.layer(tile.n, s.layers - 1, x, y_all + at, true, tile.spare);
  });
}

// Stage 1. kept: gradients of the results of the gated layers, or null.
template <class T>
void vjp(const Stack<T>& s, const T* a_all, const T* const* us, T* dx, T* const* kept) {
  in_tiles(s, true, false, [&](const Weights<T>& w, const Tile<T>& tile, ptrdiff_t at, int, T* const* work) {
    T *a = dx + at, *du = work[0], *sigma = work[4], *p = work[5];
    tile.copy(a_all + at, a);
    w.layer(tile.n, s.layers - 1, a_all + at, a, true, tile.spare);
    for (int t = s.layers - 2; t >= 0; t--) {
      const T* u = us[t] + at;
      if (kept) tile.copy(a, kept[t] + at);
      w.logits(tile.n, t, u, sigma);
      tile.sigmoids(sigma);
      tile.contract(a, u, p, false);
      tile.all_gates([&](int i) { store(p + i, load(p + i) * slope<T>(load(sigma + i))); });
      tile.weighted(w, t, a, sigma, p, du);
      w.layer(tile.n, t, du, a, true, tile.spare);
    }
  });
}

// Stage 2. vs: changes of the products; kept: change of the input of the last layer, or null.
template <class T>
void tangent(const Stack<T>& s, const T* d_all, const T* const* us, T* y_all, T* const* vs, T* kept) {
  in_tiles(s, false, false, [&](const Weights<T>& w, const Tile<T>& tile, ptrdiff_t at, int, T* const* work) {
    T *d = work[0], *sigma = work[4], *change = work[5];
    tile.copy(d_all + at, d);
    for (int t = 0; t + 1 < s.layers; t++) {
      const T* u = us[t] + at;
      T* v = vs[t] + at;
      w.layer(tile.n, t, d, v, false, tile.spare);
      w.logits(tile.n, t, u, sigma);
      w.logits(tile.n, t, v, change);
      tile.sigmoids(sigma);
      tile.all_gates([&](int i) { store(change + i, load(change + i) * slope<T>(load(sigma + i))); });
      tile.features([&](int i, int g) {
        store(d + i, load(d + i) + load(v + i) * load(sigma + g) + load(u + i) * load(change + g));
      });
    }
    if (kept) tile.copy(d, kept + at);
    tile.copy(d, y_all + at);
    w.layer(tile.n, s.layers - 1, d, y_all + at, true, tile.spare);
  });
}

// Gradients of the weights, summed per thread. Each thread has one buffer with the gradients of all weights, one after
// another.
template <class T> class Gradients {
 public:
  Gradients(const Stack<T>& s, T* const* matrices, T* const* gates) : s_(s) {
    size_t total = 0;
    auto place = [&](T* out, size_t size) {
      outs_.push_back(out), sizes_.push_back(size), starts_.push_back(total);
      total += size * s.focuses;
    };
    for (int i = 0; i < s.layers * (s.mmax + 1); i++) {
      size_t n = s.matrix_size(i % (s.mmax + 1));
      place(matrices[i], s.is_complex(i % (s.mmax + 1)) ? 3 * n * n / 4 : n * n);
    }
    for (int t = 0; t + 1 < s.layers; t++) place(gates[t], size_t(s.channels) * s.lmax * s.channels);
    for (int i = 0; i < s.threads; i++) sums_.push_back(std::make_unique<Buffer<T>>(total));
#pragma omp parallel for num_threads(s.threads)
    for (int i = 0; i < s.threads; i++) std::fill(*sums_[i] + 0, *sums_[i] + total, T(0));
  }

  // Adds x^T y of n rows for each order of layer t; for complex matrices, the three products from which write_complex
  // computes the gradients of U and V. spare: memory for two sets of n features.
  void add_to_layer(int t, int focus, int n, const T* x, const T* y, T* spare) {
    int width = s_.width(), size = s_.order_size(0), orders = s_.mmax + 1;
    product<T>(size, size, n, {x, 1, width}, y, width, of_thread(t * orders, focus), size, true);
    for (int m = 1; m < orders; m++) {
      int half = s_.order_size(m) / 2, first = s_.end_of(m - 1), second = first + half;
      T *sum = of_thread(t * orders + m, focus), *less = spare, *more = spare + n * half;
      if (s_.separate) {
        for (int at : {first, second}) product<T>(half, half, n, {x + at, 1, width}, y + at, width, sum, half, true);
        continue;
      }
      auto combine = [&](const T* from, int sign, T* to) {
        for (int e = 0; e < n; e++)
          in_vectors<T>(half, [&](int j) {
            store(to + e * half + j, load(from + e * width + second + j) + T(sign) * load(from + e * width + first + j));
          });
      };
      combine(x, -1, less);
      product<T>(half, half, n, {less, 1, half}, y + first, width, sum, half, true);
      combine(y, -1, less);
      combine(y, 1, more);
      product<T>(half, half, n, {x + first, 1, width}, less, half, sum + half * half, half, true);
      product<T>(half, half, n, {x + second, 1, width}, more, half, sum + 2 * half * half, half, true);
    }
  }

  // Adds s^T p, with the scalars s of u and p of the degrees above zero.
  void add_to_gates(int t, int focus, int n, const T* u, const T* p) {
    int c = s_.channels, gates = s_.num_gates();
    T* sum = of_thread(s_.layers * (s_.mmax + 1) + t, focus);
    product<T>(c, gates - c, n, {u, 1, s_.width()}, p + c, gates, sum, gates - c, true);
  }

  void write() const {
    int orders = s_.mmax + 1, matrices = s_.layers * orders;
    for (int i = 0; i < int(outs_.size()); i++) {
      add_threads(i);
      int m = i < matrices ? i % orders : 0;
      for (int focus = 0; focus < s_.focuses; focus++) {
        const T* sum = *sums_[0] + starts_[i] + focus * sizes_[i];
        if (s_.is_complex(m))
          write_complex(sum, s_.order_size(m) / 2, outs_[i] + ptrdiff_t(focus) * s_.order_size(m) * s_.order_size(m));
        else std::copy(sum, sum + sizes_[i], outs_[i] + focus * sizes_[i]);
      }
    }
  }

 private:
  // Adds the sums of all threads to those of the first thread.
  void add_threads(int i) const {
    int64_t size = sizes_[i] * s_.focuses;
    T* total = *sums_[0] + starts_[i];
#pragma omp parallel for num_threads(s_.threads)
    for (int64_t j = 0; j < size; j++)
      for (size_t k = 1; k < sums_.size(); k++) total[j] += (*sums_[k])[starts_[i] + j];
  }

  // U and V occur twice in the matrix, so their gradient is a sum over both places. Half of it goes to either place.
  static void write_complex(const T* sum, int half, T* out) {
    int size = half * half, n = 2 * half;
    for (int k = 0; k < half; k++)
      for (int j = 0; j < half; j++) {
        int i = k * half + j;
        T u = (sum[2 * size + i] - sum[i]) / 2, v = (sum[size + i] - sum[i]) / 2;
        out[k * n + j] = out[(half + k) * n + half + j] = u;
        out[k * n + half + j] = v;
        out[(half + k) * n + j] = -v;
      }
  }

  T* of_thread(int i, int focus) { return *sums_[omp_get_thread_num()] + starts_[i] + focus * sizes_[i]; }

  const Stack<T>& s_;
  std::vector<T*> outs_;
  std::vector<size_t> sizes_, starts_;
  std::vector<std::unique_ptr<Buffer<T>>> sums_;
};

// Stage 3. Without ds, vs and grads: the gradient of <b, y> alone. Without xs: the gradient of x alone. xs and ds are
// inputs of the first and the last layer and their changes; those in between are recomputed from the last ones.
template <class T>
void joint(Stack<T> s, const T* b_all, const T* const* xs, const T* const* us, const T* const* grads,
           const T* const* ds, const T* const* vs, T* dx, T* const* matrices, T* const* gates) {
  // Every further thread has to clear and add the gradients of all weights, which a few tiles do not justify.
  s.threads = std::max<int64_t>(1, std::min(s.threads, s.focuses * s.edges / (8 * kTile)));
  std::unique_ptr<Gradients<T>> sums(xs ? new Gradients<T>(s, matrices, gates) : nullptr);
  int last = s.layers - 1;
  // The rounding of a thread's sums depends on its tiles, so the tiles must be the same in every call.
  in_tiles(s, true, sums != nullptr, [&](const Weights<T>& w, const Tile<T>& tile, ptrdiff_t at, int focus, T* const* work) {
    int n = tile.n;
    // x and d, du and da are adjacent in memory, so that one product yields the gradient x^T du + d^T da.
    T *b = dx + at, *du = work[0], *da = du + n * tile.width, *x = work[2], *d = x + n * tile.width;
    int rows = ds ? 2 * n : n;
    T *sigma = work[4], *p = work[5], *q = work[6], *change = work[7];
    tile.copy(b_all + at, b);
    if (sums) {
      tile.copy(xs[last > 0] + at, x);
      tile.copy(b, du);
      if (ds) {
        tile.copy(ds[last > 0] + at, d);
        tile.copy(grads[last] + at, da);
      }
      sums->add_to_layer(last, focus, rows, x, du, tile.spare);
    }
    w.layer(n, last, b_all + at, b, true, tile.spare);
    for (int t = last - 1; t >= 0; t--) {
      const T* u = us[t] + at;
      w.logits(n, t, u, sigma);
      tile.sigmoids(sigma);
      tile.contract(b, u, q, false);
      if (ds) {
        const T *a = grads[t] + at, *v = vs[t] + at;
        w.logits(n, t, v, change);
        tile.contract(a, u, p, false);
        tile.contract(v, a, q, true);
        tile.all_gates([&](int i) {
          Vector<T> of = load(sigma + i), sum = load(p + i), zeta = load(change + i);
          store(q + i, (load(q + i) + zeta * sum * (T(1) - T(2) * of)) * slope<T>(of));
          store(p + i, sum * slope<T>(of));
          store(change + i, zeta * slope<T>(of));
        });
        tile.weighted(w, t, b, sigma, q, du);
        tile.features([&](int i, int g) { store(du + i, load(du + i) + load(a + i) * load(change + g)); });
        if (sums) {
          tile.weighted(w, t, a, sigma, p, da);
          if (t == 0)
            tile.copy(ds[0] + at, d);
          else
            tile.features([&](int i, int g) {
              store(d + i, load(d + i) - load(v + i) * load(sigma + g) - load(u + i) * load(change + g));
            });
          sums->add_to_gates(t, focus, n, v, p);
        }
      } else {
        tile.all_gates([&](int i) { store(q + i, load(q + i) * slope<T>(load(sigma + i))); });
        tile.weighted(w, t, b, sigma, q, du);
      }
      if (sums) {
        if (t == 0)
          tile.copy(xs[0] + at, x);
        else
          tile.features([&](int i, int g) { store(x + i, load(x + i) - load(u + i) * load(sigma + g)); });
        sums->add_to_layer(t, focus, rows, x, du, tile.spare);
        sums->add_to_gates(t, focus, n, u, q);
      }
      w.layer(n, t, du, b, true, tile.spare);
    }
  });
  if (sums) sums->write();
}

}  // namespace

#define DPA4_EXPORT(T)                                                                                              \
  extern "C" void so2_value_##T(const Stack<T>* s, const T* x, T* y, T* const* us, T* kept) {                       \
    value<T>(*s, x, y, us, kept);                                                                                   \
  }                                                                                                                 \
  extern "C" void so2_vjp_##T(const Stack<T>* s, const T* a, const T* const* us, T* dx, T* const* kept) {           \
    vjp<T>(*s, a, us, dx, kept);                                                                                    \
  }                                                                                                                 \
  extern "C" void so2_tangent_##T(const Stack<T>* s, const T* d, const T* const* us, T* y, T* const* vs,            \
                                  T* kept) {                                                                        \
    tangent<T>(*s, d, us, y, vs, kept);                                                                             \
  }                                                                                                                 \
  extern "C" void so2_joint_##T(const Stack<T>* s, const T* b, const T* const* xs, const T* const* us,              \
                                const T* const* grads, const T* const* ds, const T* const* vs, T* dx,               \
                                T* const* matrices, T* const* gates) {                                              \
    joint<T>(*s, b, xs, us, grads, ds, vs, dx, matrices, gates);                                                    \
  }
DPA4_EXPORT(float)
DPA4_EXPORT(double)
