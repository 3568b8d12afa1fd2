// out[t] = sum over branches j and slots r of factors[t, j, r] * ring[r][t, j], for rows of `width` values.
// Each slot is read once, and not at all where its factor is 0. Sums are in float32 and rounded once.
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;  // the compiler splits it on CPUs with shorter vectors
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Float32 {
  typedef float value;
  static inline Vector load(const value* from, int64_t count) {
    Vector result = {};
    std::memcpy(&result, from, 4 * count);
    return result;
  }
  static inline void store(value* to, Vector x, int64_t count) { std::memcpy(to, &x, 4 * count); }
};

struct BFloat16 {
  typedef uint16_t value;
  static inline Vector load(const value* from, int64_t count) {
    Halves halves = {};
    std::memcpy(&halves, from, 2 * count);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
  }
  static inline void store(value* to, Vector x, int64_t count) {  // to nearest, ties to even; NaN stays NaN
    const Bits bits = (Bits)x, nan = (Bits)(x != x);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
    std::memcpy(to, &halves, 2 * count);
  }
};

template <class T>
static inline void piece(const typename T::value* const* ring, const float* factors, int64_t branches, int64_t slots,
                         int64_t start, int64_t width, int64_t count, typename T::value* out) {
  Vector sum = {};
  for (int64_t j = 0; j < branches; ++j)
    for (int64_t r = 0; r < slots; ++r) {
      const float factor = factors[j * slots + r];
      if (factor != 0) sum += factor * T::load(ring[r] + start + j * width, count);
    }
  T::store(out, sum, count);
}

template <class T>
static void combine(const typename T::value* const* ring, const float* factors, int64_t tokens, int64_t branches,
                    int64_t slots, int64_t width, typename T::value* out, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; ++t) {
    const float* own = factors + t * branches * slots;
    const int64_t start = t * branches * width;
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES)
      piece<T>(ring, own, branches, slots, start + d, width, LANES, out + t * width + d);
    if (d < width) piece<T>(ring, own, branches, slots, start + d, width, width - d, out + t * width + d);
  }
}

#define ENTRY(NAME, T)                                                                                            \
  extern "C" void NAME(const void* const* ring, const void* factors, int64_t tokens, int64_t branches,            \
                       int64_t slots, int64_t width, void* out, int threads) {                                    \
    combine<T>((const T::value* const*)ring, (const float*)factors, tokens, branches, slots, width,               \
               (T::value*)out, threads);                                                                          \
  }

ENTRY(combine_float32, Float32)
ENTRY(combine_bfloat16, BFloat16)
