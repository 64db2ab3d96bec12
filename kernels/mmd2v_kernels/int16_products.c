/* Products of rows rounded to 16-bit integers, whose sums are exact: the only errors are those of the rounding, which
 * `quantise` measures. A processor of AVX2 multiplies and adds 16 pairs of them in the time of 8 to 11 pairs of fp32.
 * Called through ctypes by cpu_scans.py, which says what each does.
 *
 * Shapes: n rows of width D, which lie in panels of some rows: of each panel first the values of columns 0 and 1 of all
 * its rows, then those of columns 2 and 3, and so on; beyond n and D they are 0. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_forms.h"

#define LARGEST 32767
#define NORM 46000.0 /* of a row's integers: two norms, and so all sums on the way, fit 32 bits up to width 2^18 */
#define QUERIES 4    /* rows of a panel of queries; with more, sums leave the registers */
#define BANK 16      /* and of the bank */

/* Round a row to multiples of its scale; returns the square of the norm of what is lost. */
WIDE static double round_row(const float *restrict row, int64_t width, float scale, float *restrict rounded)
{
    const float magic = 12582912.0f; /* 1.5 · 2^23: adding it rounds to an integer */
    float inverse = 1.0f / scale;
    double lost = 0;
    for (int64_t j = 0; j < width; j++) {
        float value = (row[j] * inverse + magic) - magic;
        value = value > LARGEST ? LARGEST : value < -LARGEST ? -LARGEST : value;
        rounded[j] = value;
    }
    double sums[8] = {0};
    int64_t j = 0;
    for (; j + 8 <= width; j += 8)
        for (int l = 0; l < 8; l++) {
            double rest = (double)row[j + l] - (double)scale * rounded[j + l];
            sums[l] += rest * rest;
        }
    for (; j < width; j++) {
        double rest = (double)row[j] - (double)scale * rounded[j];
        lost += rest * rest;
    }
    for (int l = 0; l < 8; l++)
        lost += sums[l];
    return lost;
}

WIDE static double square_of_norm(const float *restrict row, int64_t width)
{
    double sums[8] = {0}, total = 0;
    int64_t j = 0;
    for (; j + 8 <= width; j += 8)
        for (int l = 0; l < 8; l++)
            sums[l] += (double)row[j + l] * row[j + l];
    for (; j < width; j++)
        total += (double)row[j] * row[j];
    for (int l = 0; l < 8; l++)
        total += sums[l];
    return total;
}

int64_t panel_of(int is_bank)
{
    return is_bank ? BANK : QUERIES;
}

int quantise(const float *matrix, int64_t rows, int64_t width, int64_t panel, int16_t *values, float *scale,
             double *norm, double *lost)
{
    int64_t pairs = (width + 1) / 2;
    float *rounded = malloc((width + 1) * sizeof *rounded);
    if (rounded == NULL)
        return -1;
    for (int64_t i = 0; i < rows; i++) {
        const float *row = matrix + i * width;
        norm[i] = sqrt(square_of_norm(row, width));
        scale[i] = (float)(norm[i] / NORM);
        if (!(norm[i] > 1e-12 && norm[i] < 1e12)) {
            scale[i] = 0;
            lost[i] = norm[i] <= 1e-12 ? norm[i] : INFINITY; /* all of a short row; of others nobody knows */
            memset(rounded, 0, (width + 1) * sizeof *rounded);
        } else {
            lost[i] = sqrt(round_row(row, width, scale[i], rounded));
            rounded[width] = 0;
        }
        if (values == NULL)
            continue;
        int16_t *own = values + i / panel * panel * pairs * 2 + i % panel * 2;
        for (int64_t p = 0; p < pairs; p++) {
            own[p * panel * 2] = (int16_t)rounded[2 * p];
            own[p * panel * 2 + 1] = (int16_t)rounded[2 * p + 1];
        }
    }
    if (values != NULL) /* what the last panel lacks */
        for (int64_t i = rows; i % panel != 0; i++)
            for (int64_t p = 0; p < pairs; p++)
                memset(values + i / panel * panel * pairs * 2 + (p * panel + i % panel) * 2, 0, 4);
    free(rounded);
    return 0;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ROW(r)                                                                                                         \
    pair = _mm256_set1_epi32(queries[QUERIES * p + r]);                                                                \
    left##r = _mm256_add_epi32(left##r, _mm256_madd_epi16(pair, left));                                                \
    right##r = _mm256_add_epi32(right##r, _mm256_madd_epi16(pair, right));
#define SUMS(r) __m256i left##r = _mm256_setzero_si256(), right##r = _mm256_setzero_si256();
#define STORE(r)                                                                                                       \
    factor = _mm256_set1_ps(query_scale[r]);                                                                           \
    _mm256_storeu_ps(scores + r * stride, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(left##r), factor), scale0));  \
    _mm256_storeu_ps(scores + r * stride + 8,                                                                          \
                     _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(right##r), factor), scale1));

__attribute__((target("avx2"))) static void tile(const int32_t *queries, const float *query_scale, const int16_t *bank,
                                                 const float *bank_scale, int64_t pairs, float *scores, int64_t stride)
{
    SUMS(0) SUMS(1) SUMS(2) SUMS(3)
#pragma GCC unroll 4
    for (int64_t p = 0; p < pairs; p++) {
        const __m256i *at = (const __m256i *)(bank + 2 * BANK * p);
        __m256i left = _mm256_loadu_si256(at), right = _mm256_loadu_si256(at + 1), pair;
        ROW(0) ROW(1) ROW(2) ROW(3)
    }
    __m256 scale0 = _mm256_loadu_ps(bank_scale), scale1 = _mm256_loadu_ps(bank_scale + 8), factor;
    STORE(0) STORE(1) STORE(2) STORE(3)
}

void multiply(const int16_t *queries, const float *query_scale, int64_t rows, const int16_t *bank,
              const float *bank_scale, int64_t columns, int64_t pairs, float *scores)
{
    float beside[QUERIES * BANK];
    for (int64_t c = 0; c < columns; c += BANK)
        for (int64_t r = 0; r < rows; r += QUERIES) {
            const int32_t *own = (const int32_t *)(queries + r * pairs * 2);
            int64_t height = rows - r < QUERIES ? rows - r : QUERIES, width = columns - c < BANK ? columns - c : BANK;
            if (height == QUERIES && width == BANK) {
                tile(own, query_scale + r, bank + c * pairs * 2, bank_scale + c, pairs, scores + r * columns + c,
                     columns);
                continue;
            }
            tile(own, query_scale + r, bank + c * pairs * 2, bank_scale + c, pairs, beside, BANK);
            for (int64_t i = 0; i < height; i++)
                memcpy(scores + (r + i) * columns + c, beside + i * BANK, width * sizeof *scores);
        }
}

/* Not with AVX-512, where products of fp32 are twice as wide and these would not be: by arithmetic, not measured. */
int multiplies_int16_faster(void)
{
    return __builtin_cpu_supports("avx2") && !__builtin_cpu_supports("avx512f");
}
#else
void multiply(const int16_t *queries, const float *query_scale, int64_t rows, const int16_t *bank,
              const float *bank_scale, int64_t columns, int64_t pairs, float *scores)
{
    (void)queries, (void)query_scale, (void)rows, (void)bank, (void)bank_scale, (void)columns, (void)pairs;
    (void)scores;
}

int multiplies_int16_faster(void)
{
    return 0;
}
#endif
