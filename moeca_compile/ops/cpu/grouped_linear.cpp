// out[r, n] = sum over k of x[r, k] * weight_g[n, k] + bias_g[n], for the rows r of each group g.
//
// Rows become lanes: a tile of rows is packed with the rows side by side, and each weight, broadcast, is multiplied
// with all of them. So weights are read as they lie and are never packed: with few rows they are nearly all that is
// read. A tile is a vector or half a vector wide; a block is OUT outputs of one tile, held in registers.
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int OUT = 8;      // accumulators: enough to hide the latency of a multiply-add, few enough for registers
constexpr int BLOCKS = 8;   // blocks of a task: their weights stay in the second-level cache over a group's tiles
constexpr int AHEAD = 16;   // terms between two prefetches of the next block, a line each, into the second-level cache

template <int W> struct Lanes { typedef float type __attribute__((vector_size(4 * W))); };

// A term is what one multiply-add takes of a row: one float, or a pair of bfloat16.
struct Float32 {
  typedef float value;
  typedef float term;
  static constexpr int values = 1;
  template <int W> static inline void add(typename Lanes<W>::type& sum, typename Lanes<W>::type x, term weight) {
    sum += x * weight;
  }
  static value rounded(float x) { return x; }
  static float widened(value x) { return x; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  typedef uint16_t value;
  typedef uint32_t term;
  static constexpr int values = 2;
  template <int W> static inline void add(typename Lanes<W>::type& sum, typename Lanes<W>::type x, term weight) {
    if constexpr (W == 16) sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(weight));
    else sum = _mm256_dpbf16_ps(sum, (__m256bh)x, (__m256bh)_mm256_set1_epi32(weight));
  }
  static value rounded(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  static float widened(value x) {
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
};
#endif

// sums[i][row] over all terms, for N weight rows of `terms` terms each and a tile of W rows.
// Not inlined: its loop needs all registers.
template <class T, int W, int N>
[[gnu::noinline]] static void block(const typename T::term* weight, const typename T::term* tile, int64_t terms, float* sums) {
  typename Lanes<W>::type sum[N] = {};
  for (int64_t start = 0; start < terms; start += AHEAD) {
    for (int i = 0; i < N; ++i) __builtin_prefetch(weight + (N + i) * terms + start, 0, 2);
    const int64_t end = std::min(terms, start + AHEAD);
    for (int64_t k = start; k < end; ++k) {
      typename Lanes<W>::type x;
      std::memcpy(&x, tile + k * W, sizeof(x));
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) T::template add<W>(sum[i], x, weight[i * terms + k]);
    }
  }
  std::memcpy(sums, sum, sizeof(sum));
}

template <class T> struct Product {
  typedef typename T::value value;
  typedef typename T::term term;
  const value* x;
  const int64_t* offsets;
  const value* const* weights;
  const value* const* biases;
  int64_t terms, outputs;
  value* out;
  term* packed;

  // Packed rows of a group begin behind room for those of the groups before it, each rounded up to half a vector.
  term* tile(int64_t group, int64_t row) const { return packed + (row + group * (LANES / 2 - 1)) * terms; }

  // Calls f.run<W>(row, rows) for each tile of a group.
  template <class F> void tiles(int64_t group, const F& f) const {
    const int64_t end = offsets[group + 1];
    for (int64_t row = offsets[group]; row < end; row += LANES) {
      const int64_t rows = std::min<int64_t>(LANES, end - row);
      rows > LANES / 2 ? f.template run<LANES>(row, rows) : f.template run<LANES / 2>(row, rows);
    }
  }

  struct Pack {
    const Product& of;
    int64_t group;
    template <int W> void run(int64_t row, int64_t rows) const {
      term* to = of.tile(group, row);
      for (int64_t lane = 0; lane < W; ++lane) {
        const value* from = of.x + (row + lane) * of.terms * T::values;
        for (int64_t k = 0; k < of.terms; ++k) {
          to[k * W + lane] = 0;
          if (lane < rows) std::memcpy(&to[k * W + lane], from + k * T::values, sizeof(term));
        }
      }
    }
  };

  struct Multiply {
    const Product& of;
    int64_t group, first, end;
    template <int W> void run(int64_t row, int64_t rows) const {
      int64_t output = first;
      for (; output + OUT <= end; output += OUT) write<W, OUT>(row, rows, output);
      for (; output < end; ++output) write<W, 1>(row, rows, output);
    }
    template <int W, int N> void write(int64_t row, int64_t rows, int64_t output) const {
      alignas(64) float sums[N * W];
      const term* weight = (const term*)of.weights[group] + output * of.terms;
      block<T, W, N>(weight, of.tile(group, row), of.terms, sums);
      for (int64_t lane = 0; lane < rows; ++lane)
        for (int i = 0; i < N; ++i) {
          const float bias = of.biases ? T::widened(of.biases[group][output + i]) : 0.0f;
          of.out[(row + lane) * of.outputs + output + i] = T::rounded(sums[i * W + lane] + bias);
        }
    }
  };

  void run(int64_t groups, int threads) const {
    const int64_t step = OUT * BLOCKS, tasks = (outputs + step - 1) / step;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t group = 0; group < groups; ++group) tiles(group, Pack{*this, group});
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t task = 0; task < tasks; ++task)
          tiles(group, Multiply{*this, group, task * step, std::min(outputs, (task + 1) * step)});
    }
  }
};

#define ENTRY(NAME, T)                                                                                               \
  extern "C" void NAME(const void* x, const void* offsets, const void* weights, const void* biases, int64_t groups,  \
                       int64_t inputs, int64_t outputs, void* out, void* packed, int threads) {                      \
    Product<T>{(const T::value*)x, (const int64_t*)offsets, (const T::value* const*)weights,                         \
               (const T::value* const*)biases, inputs / T::values, outputs, (T::value*)out, (T::term*)packed}        \
        .run(groups, threads);                                                                                       \
  }

extern "C" int lanes() { return LANES; }
ENTRY(grouped_linear_float32, Float32)
#if defined(__AVX512BF16__)
ENTRY(grouped_linear_bfloat16, BFloat16)
#endif
