// out[r, n] = sum over k of x[r, k] * weight_g[n, k] + bias_g[n], for the rows r of each group g.
//
// Weights are read in place and never packed: with few rows, reading them takes most of the time. Vectors are filled in
// two ways, and both keep their sums in registers:
//  - Full tiles of rows: a lane is a row. The tile is packed with its rows side by side, and each weight is broadcast
//    and multiplied with all of them.
//  - Left-over rows, which would leave lanes empty: a lane is a term, and the lanes are added up at the end.
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#pragma GCC optimize("fp-contract=fast")  // Inductor's flags forbid fused multiply-adds

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int OUT = 8;      // outputs of a tile's block: enough to hide the latency of a multiply-add
constexpr int FEW_OUT = 4;  // outputs and rows of a block of left-over rows: as many sums as fit in registers
constexpr int FEW_ROWS = LANES == 16 ? 6 : 3;
constexpr int LEFT_OVER = LANES * 3 / 4;  // with more rows than these a tile with empty lanes is faster
constexpr int TASK = 64;    // outputs of a task: their weights stay in the L2 cache for all rows of a group
constexpr int AHEAD = 16;   // terms between two prefetches of the next block, one cache line each, into L2

typedef float Vector __attribute__((vector_size(4 * LANES)));

// A term is what one multiply-add reads of a row: four bytes, one float or a pair of bfloat16.
struct Float32 {
  typedef float value;
  typedef float term;
  static constexpr int values = 1;
  static inline void add(Vector& sum, Vector x, Vector weight) { sum += x * weight; }
  static inline Vector broadcast(term weight) { return weight - Vector{}; }
  static value rounded(float x) { return x; }
  static float widened(value x) { return x; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  typedef uint16_t value;
  typedef uint32_t term;
  static constexpr int values = 2;
  static inline void add(Vector& sum, Vector x, Vector weight) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)weight);
  }
  static inline Vector broadcast(term weight) { return (Vector)_mm512_set1_epi32(weight); }
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

static inline Vector load(const void* from, int64_t terms = LANES) {
  Vector result = {};
  if (terms >= LANES) std::memcpy(&result, from, sizeof(result));
  else std::memcpy(&result, from, 4 * terms);
  return result;
}

// The sum of each of four vectors.
static inline void add_lanes(const Vector* of, float* sums) {
#if defined(__AVX512DQ__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < FEW_OUT; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < LANES; ++lane) sums[i] += of[i][lane];
  }
#endif
}

// sums[i][row] over all terms, for N weight rows of `terms` terms each and a packed tile of rows.
// Not inlined, here and below: the loop needs all registers.
template <class T, int N>
[[gnu::noinline]] static void tile_block(const typename T::term* weight, const typename T::term* tile, int64_t terms, float* sums) {
  Vector sum[N] = {};
  for (int64_t start = 0; start < terms; start += AHEAD) {
    for (int i = 0; i < N; ++i) __builtin_prefetch(weight + (N + i) * terms + start, 0, 2);
    const int64_t end = std::min(terms, start + AHEAD);
    for (int64_t k = start; k < end; ++k) {
      const Vector x = load(tile + k * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) T::add(sum[i], x, T::broadcast(weight[i * terms + k]));
    }
  }
  std::memcpy(sums, sum, sizeof(sum));
}

// sums[row][i] over all terms, for R rows of x and N of FEW_OUT weight rows.
template <class T, int R, int N>
[[gnu::noinline]] static void few_block(const typename T::term* weight, const typename T::term* x, int64_t terms, float* sums) {
  Vector sum[R][FEW_OUT] = {};
  for (int64_t k = 0; k < terms; k += LANES) {
    Vector w[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      w[i] = load(weight + i * terms + k, terms - k);
      __builtin_prefetch(weight + (N + i) * terms + k, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector value = load(x + r * terms + k, terms - k);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) T::add(sum[r][i], value, w[i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) add_lanes(sum[r], sums + r * FEW_OUT);
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

  int64_t rows(int64_t group) const { return offsets[group + 1] - offsets[group]; }

  // How many of a group's rows, counted from its first, are computed in tiles.
  int64_t tiled(int64_t group) const {
    const int64_t left = rows(group) % LANES;
    return left > LEFT_OVER ? rows(group) : rows(group) - left;
  }

  const term* row(int64_t group, int64_t at) const { return (const term*)x + (offsets[group] + at) * terms; }
  const term* weight(int64_t group, int64_t output) const { return (const term*)weights[group] + output * terms; }

  // Where a group's packed rows begin: after those of all earlier groups, with LANES spare rows for each.
  term* tile(int64_t group, int64_t at) const { return packed + (offsets[group] + at + group * LANES) * terms; }

  void pack(int64_t group) const {
    for (int64_t first = 0; first < tiled(group); first += LANES) {
      term* to = tile(group, first);
      for (int64_t lane = 0; lane < LANES; ++lane)
        for (int64_t k = 0; k < terms; ++k) to[k * LANES + lane] = first + lane < rows(group) ? row(group, first + lane)[k] : 0;
    }
  }

  void write(int64_t group, int64_t at, int64_t output, float sum) const {
    const float bias = biases ? T::widened(biases[group][output]) : 0.0f;
    out[(offsets[group] + at) * outputs + output] = T::rounded(sum + bias);
  }

  template <int N> void multiply_tile(int64_t group, int64_t first, int64_t output) const {
    alignas(64) float sums[N * LANES];
    tile_block<T, N>(weight(group, output), tile(group, first), terms, sums);
    for (int64_t lane = 0; lane < std::min<int64_t>(LANES, rows(group) - first); ++lane)
      for (int i = 0; i < N; ++i) write(group, first + lane, output + i, sums[i * LANES + lane]);
  }

  template <int N, int R = FEW_ROWS> void multiply_few(int64_t group, int64_t first, int64_t count, int64_t output) const {
    if constexpr (R > 1)
      if (count < R) return multiply_few<N, R - 1>(group, first, count, output);
    float sums[R * FEW_OUT];
    few_block<T, R, N>(weight(group, output), row(group, first), terms, sums);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) write(group, first + r, output + i, sums[r * FEW_OUT + i]);
  }

  template <int N> void multiply_left_over(int64_t group, int64_t output) const {
    const int64_t first = tiled(group), left = rows(group) - first, parts = (left + FEW_ROWS - 1) / FEW_ROWS;
    for (int64_t part = 0; part < parts; ++part) {  // of nearly equal sizes
      const int64_t begin = left * part / parts, end = left * (part + 1) / parts;
      multiply_few<N>(group, first + begin, end - begin, output);
    }
  }

  void multiply(int64_t group, int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < tiled(group); first += LANES) {
      int64_t output = begin;
      for (; output + OUT <= end; output += OUT) multiply_tile<OUT>(group, first, output);
      for (; output < end; ++output) multiply_tile<1>(group, first, output);
    }
    int64_t output = begin;
    for (; output + FEW_OUT <= end; output += FEW_OUT) multiply_left_over<FEW_OUT>(group, output);
    for (; output < end; ++output) multiply_left_over<1>(group, output);
  }

  void run(int64_t groups, int threads) const {
    const int64_t tasks = (outputs + TASK - 1) / TASK;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t group = 0; group < groups; ++group) pack(group);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t task = 0; task < tasks; ++task) multiply(group, task * TASK, std::min(outputs, (task + 1) * TASK));
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
