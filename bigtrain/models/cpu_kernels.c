/* The loops over bfloat16 memory that PyTorch's CPU kernels are slow at (cpu_kernels.py says how slow).

   Plain C that GCC and Clang vectorise for the machine at hand; bfloat16 travels as uint16_t, arithmetic is float32.
   NaN and infinity pass through, so that a broken step is still seen to be broken. `threads` is the OpenMP team. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static inline bf16 to_bf16(float x) { /* rounds to nearest, ties to even; NaN stays NaN */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

/* exp to about 2 units in the last place; 0 below -87 and finite (3e38) above 88. Cephes' polynomial. */
static inline float fast_exp(float x) {
  float bounded = x > 88.3f ? 88.3f : x;
  bounded = bounded < -87.3f ? -87.3f : bounded;
  float n = rintf(bounded * 1.44269504f);
  float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return x < -87.3f ? 0.0f : p * scale;
}

/* y = gelu_tanh(x) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3) */
static const float GELU_A = 1.5957691216f, GELU_B = 0.0713548162726f;

void gelu_tanh(const bf16 *x, bf16 *y, int64_t n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    float v = to_float(x[i]);
    y[i] = to_bf16(v / (1.0f + fast_exp(-v * (GELU_A + GELU_B * v * v))));
  }
}

/* dx = dy * gelu_tanh'(x); dx may be dy itself */
void gelu_tanh_backward(const bf16 *x, const bf16 *dy, bf16 *dx, int64_t n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    float v = to_float(x[i]), square = v * v;
    float s = 1.0f / (1.0f + fast_exp(-v * (GELU_A + GELU_B * square)));
    float slope = s + v * s * (1.0f - s) * (GELU_A + 3.0f * GELU_B * square);
    dx[i] = to_bf16(to_float(dy[i]) * slope);
  }
}

/* One row of logits at a time: its loss, and in its place the gradient with respect to the logits.
   A row whose target is negative counts nothing. scratch holds `threads` rows of `columns` floats. */
void cross_entropy(bf16 *logits, const int64_t *targets, float *loss, float *nll, float *scratch, int64_t rows,
                   int64_t columns, float smoothing, float z_loss, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
#ifdef _OPENMP
    extern int omp_get_thread_num(void);
    float *e = scratch + columns * omp_get_thread_num();
#else
    float *e = scratch;
#endif
    bf16 *x = logits + row * columns;
    int64_t target = targets[row];
    loss[row] = nll[row] = 0.0f;
    if (target < 0) {
      memset(x, 0, columns * sizeof(bf16));
      continue;
    }
    float largest = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < columns; i++) {
      float v = to_float(x[i]);
      largest = v > largest ? v : largest;
    }
#pragma omp simd reduction(+ : total, sum)
    for (int64_t i = 0; i < columns; i++) {
      float v = to_float(x[i]);
      sum += v;
      total += e[i] = fast_exp(v - largest);
    }
    float log_z = largest + logf(total), chosen = to_float(x[target]);
    nll[row] = log_z - chosen;
    loss[row] = log_z - (1.0f - smoothing) * chosen - smoothing * sum / columns + z_loss * log_z * log_z;
    float scale = (1.0f + 2.0f * z_loss * log_z) / total, floor = smoothing / columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; i++) x[i] = to_bf16(e[i] * scale - floor);
    x[target] = to_bf16(e[target] * scale - floor - (1.0f - smoothing));
  }
}

/* Causal scores (batch, queries, keys) in blocks that end at the diagonal: query r of a block sees the first
   keys - queries + r + 1 keys. largest (batch, queries) gets the largest score that each query sees. */
void attention_largest(const bf16 *scores, bf16 *largest, int64_t batch, int64_t queries, int64_t keys, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
  for (int64_t row = 0; row < batch * queries; row++) {
    const bf16 *s = scores + row * keys;
    int64_t seen = keys - queries + row % queries + 1;
    float found = to_float(s[0]);
#pragma omp simd reduction(max : found)
    for (int64_t i = 1; i < seen; i++) {
      float v = to_float(s[i]);
      found = v > found ? v : found;
    }
    largest[row] = to_bf16(found);
  }
}

/* The same blocks, less each query's largest score, become probabilities; log_sum (batch, queries) gets the logarithm of
   what their exponentials were divided by. scratch holds `threads` rows of `keys` floats. */
void attention_softmax(bf16 *scores, float *log_sum, float *scratch, int64_t batch, int64_t queries, int64_t keys,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
  for (int64_t row = 0; row < batch * queries; row++) {
#ifdef _OPENMP
    extern int omp_get_thread_num(void);
    float *e = scratch + keys * omp_get_thread_num();
#else
    float *e = scratch;
#endif
    bf16 *s = scores + row * keys;
    int64_t seen = keys - queries + row % queries + 1;
    float largest = to_float(s[0]), total = 0.0f; /* near 0; far from it where scores are too large for bfloat16 */
#pragma omp simd reduction(max : largest)
    for (int64_t i = 1; i < seen; i++) {
      float v = to_float(s[i]);
      largest = v > largest ? v : largest;
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < seen; i++) total += e[i] = fast_exp(to_float(s[i]) - largest);
    float scale = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < seen; i++) s[i] = to_bf16(e[i] * scale);
    memset(s + seen, 0, (keys - seen) * sizeof(bf16));
    log_sum[row] = largest + logf(total);
  }
}

/* Between the matmuls of attention's backward pass, for (batch, keys, queries):
   p holds log-probabilities and becomes probabilities, ds holds dP - delta and becomes p * ds;
   both 0 where a query is before its key. Query 0 and key 0 are the same token. */
void attention_probabilities(bf16 *p, bf16 *ds, int64_t batch, int64_t keys, int64_t queries, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
  for (int64_t row = 0; row < batch * keys; row++) {
    int64_t start = row % keys;
    bf16 *pr = p + row * queries, *dr = ds + row * queries;
    memset(pr, 0, start * sizeof(bf16));
    memset(dr, 0, start * sizeof(bf16));
#pragma omp simd
    for (int64_t i = start; i < queries; i++) {
      float v = fast_exp(to_float(pr[i]));
      pr[i] = to_bf16(v);
      dr[i] = to_bf16(v * to_float(dr[i]));
    }
  }
}

/* y = x / (1 - p) with probability 1 - p, else 0; y may be x. What is dropped is a hash of seed and place, so that the
   backward pass needs no mask, only the seed: two rounds of Wellons' lowbias32, each with half of the seed. */
static inline uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

void dropout(const bf16 *x, bf16 *y, int64_t n, int64_t seed, float p, int threads) {
  const uint32_t low = (uint32_t)seed, high = (uint32_t)((uint64_t)seed >> 32);
  const uint32_t threshold = (uint32_t)((double)p * 4294967296.0);
  const float scale = 1.0f / (1.0f - p);
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    uint32_t drawn = lowbias32(lowbias32((uint32_t)i ^ low) + high);
    y[i] = to_bf16(to_float(x[i]) * (drawn < threshold ? 0.0f : scale)); /* NaN and infinity stay seen */
  }
}
