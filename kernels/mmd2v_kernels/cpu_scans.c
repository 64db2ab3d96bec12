/* Loops of exact retrieval on the CPU that no library has: exact scores of pairs, and scans over blocks of fp32
 * scores while they are in the cache. Called through ctypes by cpu_scans.py, which says what each does.
 *
 * Shapes: n rows and m columns of a block of scores, D width, P pairs, k best.
 *
 * Products of two fp32 numbers are exact in double, so a fused multiply-add rounds as a product and a sum do. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "cpu_forms.h"

#define BLOCK 64 /* scores that are looked at one by one if any of them may matter */

/* The sum of products in the one order: the upper half folded onto the lower one until one is left. Two folds at a
 * time where the width allows it: what is between them stays in registers. */
WIDE static double exact_dot(const float *restrict left, const float *restrict right, int64_t width,
                             double *restrict sums)
{
    int64_t quarter = width / 4;
    if (width % 4 == 0) {
        for (int64_t j = 0; j < quarter; j++) {
            double a = (double)left[j] * right[j], b = (double)left[j + quarter] * right[j + quarter];
            double c = (double)left[j + 2 * quarter] * right[j + 2 * quarter];
            double d = (double)left[j + 3 * quarter] * right[j + 3 * quarter];
            sums[j] = (a + c) + (b + d);
        }
        width = quarter;
    } else {
        for (int64_t j = 0; j < width; j++)
            sums[j] = (double)left[j] * right[j];
    }
    while (width > 1) {
        quarter = width / 4;
        if (width % 4 == 0) {
            for (int64_t j = 0; j < quarter; j++)
                sums[j] = (sums[j] + sums[j + 2 * quarter]) + (sums[j + quarter] + sums[j + 3 * quarter]);
            width = quarter;
            continue;
        }
        int64_t half = (width + 1) / 2, rest = width - half;
        for (int64_t j = 0; j < rest; j++)
            sums[j] += sums[j + half];
        width = half;
    }
    return sums[0];
}

static void prefetch(const float *row, int64_t width)
{
#if defined(__GNUC__)
    for (int64_t j = 0; j < width; j += 16)
        __builtin_prefetch(row + j);
#else
    (void)row, (void)width;
#endif
}

int exact_pairs(const float *queries, const float *bank, int64_t width, const int64_t *row, const int64_t *column,
                int64_t pairs, double *scores)
{
    double *sums = malloc(width * sizeof *sums);
    if (sums == NULL)
        return -1;
    for (int64_t p = 0; p < pairs; p++) {
        if (p + 1 < pairs) /* rows of the bank lie anywhere */
            prefetch(bank + column[p + 1] * width, width);
        scores[p] = exact_dot(queries + row[p] * width, bank + column[p] * width, width, sums);
    }
    free(sums);
    return 0;
}

/* Whether any score of a block is between its row's bounds or its column's, and how many are above them. */
static inline int look(const float *restrict scores, int64_t size, float row_low, float row_high,
                       const float *restrict column_low, const float *restrict column_high, int32_t *restrict above_row,
                       int32_t *restrict above_column)
{
    int32_t close = 0, above = 0;
    for (int64_t j = 0; j < size; j++) {
        float score = scores[j];
        int32_t over = score > row_high, over_column = score > column_high[j];
        above += over;
        above_column[j] += over_column;
        close |= ((score >= row_low) & !over) | ((score >= column_low[j]) & !over_column);
    }
    *above_row += above;
    return close;
}

WIDE int64_t find_above(const float *scores, int64_t rows, int64_t columns, const float *row_low, const float *row_high,
                        const float *column_low, const float *column_high, int32_t *above_row, int32_t *above_column,
                        int32_t *close, int64_t *close_counts, int64_t most)
{
    /* close[0] and [1]: row and column of what is close to its row's bounds; [2] and [3]: to its column's. */
    int64_t of_row = 0, of_column = 0;
    for (int64_t i = 0; i < rows; i++) {
        const float *own = scores + i * columns;
        for (int64_t first = 0; first < columns; first += BLOCK) {
            int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
            if (!look(own + first, last - first, row_low[i], row_high[i], column_low + first, column_high + first,
                      above_row + i, above_column + first))
                continue;
            if (of_row + BLOCK > most || of_column + BLOCK > most)
                return -1;
            for (int64_t j = first; j < last; j++) {
                if (own[j] >= row_low[i] && !(own[j] > row_high[i])) {
                    close[of_row] = (int32_t)i;
                    close[most + of_row++] = (int32_t)j;
                }
                if (own[j] >= column_low[j] && !(own[j] > column_high[j])) {
                    close[2 * most + of_column] = (int32_t)i;
                    close[3 * most + of_column++] = (int32_t)j;
                }
            }
        }
    }
    close_counts[0] = of_row;
    close_counts[1] = of_column;
    return 0;
}

#define LANES 32 /* with 16, gcc unrolls loops over them into single scores */
#define SEGMENT 256 /* scores whose maxima are taken at once, lane by lane: every LANES-th score is of one lane */

/* The largest score of each lane of each whole segment of a row. */
static inline void lane_maxima(const float *restrict scores, int64_t segments, float *restrict maxima)
{
    for (int64_t s = 0; s < segments; s++, scores += SEGMENT, maxima += LANES) {
        for (int l = 0; l < LANES; l++)
            maxima[l] = scores[l];
        for (int j = LANES; j < SEGMENT; j += LANES)
            for (int l = 0; l < LANES; l++)
                maxima[l] = scores[j + l] > maxima[l] ? scores[j + l] : maxima[l];
    }
}

static inline int any_reaches(const float *restrict maxima, float floor)
{
    int32_t found = 0;
    for (int l = 0; l < LANES; l++)
        found |= maxima[l] >= floor;
    return found;
}

/* Put a score into the k best of its row, descending. */
static void insert(float *best, int64_t k, float score)
{
    int64_t place = k - 1;
    for (; place > 0 && best[place - 1] < score; place--)
        best[place] = best[place - 1];
    best[place] = score;
}

/* What surely is no more than the k-th best exact score, less the error of a score: rounded down. */
static float floor_of(float kth, double error)
{
    if (kth == -INFINITY)
        return -FLT_MAX; /* every score reaches it, but not that of a row left out */
    return nextafterf((float)((double)kth - 2 * error), -INFINITY);
}

WIDE int64_t find_best(const float *scores, int64_t rows, int64_t columns, int64_t k, const double *error, float *best,
                       int32_t *found_row, int32_t *found_column, float *found_score, int64_t most)
{
    int64_t found = 0, segments = columns / SEGMENT, groups = segments * LANES, rest = columns - segments * SEGMENT;
    float *maxima = malloc((groups + k) * sizeof *maxima), *highest = maxima + groups;
    if (maxima == NULL)
        return -2;
    for (int64_t i = 0; i < rows; i++) {
        const float *own = scores + i * columns;
        float *best_i = best + i * k, kth = best_i[k - 1];
        lane_maxima(own, segments, maxima);
        float floor = floor_of(kth, error[i]);
        int64_t over = 0;
        for (int64_t j = 0; j < groups; j++)
            over += maxima[j] >= floor;
        if (kth == -INFINITY || over > 4 * k) {
            /* A first bound on the k-th best: k lanes of segments, or scores beyond them, hold one that high each. */
            for (int64_t j = 0; j < k; j++)
                highest[j] = -INFINITY;
            for (int64_t j = 0; j < groups; j++)
                if (maxima[j] > highest[k - 1])
                    insert(highest, k, maxima[j]);
            for (int64_t j = columns - rest; j < columns; j++)
                if (own[j] > highest[k - 1])
                    insert(highest, k, own[j]);
            kth = highest[k - 1] > kth ? highest[k - 1] : kth;
            floor = floor_of(kth, error[i]);
        }
        if (found + columns > most) { /* surely room for a row, or it is counted first */
            int64_t reach = 0;
            for (int64_t j = 0; j < columns; j++)
                reach += own[j] >= floor;
            if (found + reach > most) {
                free(maxima);
                return -1;
            }
        }
#define TAKE(j)                                                                                                        \
    if (own[j] >= floor) {                                                                                             \
        found_row[found] = (int32_t)i;                                                                                 \
        found_column[found] = (int32_t)(j);                                                                            \
        found_score[found++] = own[j];                                                                                 \
        if (own[j] > best_i[k - 1]) {                                                                                  \
            insert(best_i, k, own[j]);                                                                                 \
            if (best_i[k - 1] > kth) {                                                                                 \
                kth = best_i[k - 1];                                                                                   \
                floor = floor_of(kth, error[i]);                                                                       \
            }                                                                                                          \
        }                                                                                                              \
    }
        for (int64_t s = 0; s < segments; s++) {
            if (!any_reaches(maxima + s * LANES, floor))
                continue;
            for (int l = 0; l < LANES; l++)
                if (maxima[s * LANES + l] >= floor)
                    for (int64_t j = s * SEGMENT + l; j < (s + 1) * SEGMENT; j += LANES)
                        TAKE(j)
        }
        for (int64_t j = columns - rest; j < columns; j++)
            TAKE(j)
#undef TAKE
    }
    free(maxima);
    return found;
}

int order_best(const float *queries, const float *bank, int64_t width, const int64_t *starts, const int64_t *column,
               int64_t rows, int64_t k, double *best_score, int64_t *best_column)
{
    double *sums = malloc(width * sizeof *sums);
    if (sums == NULL)
        return -1;
    for (int64_t i = 0; i < rows; i++) {
        double *score = best_score + i * k;
        int64_t *index = best_column + i * k, held = 0;
        for (int64_t c = starts[i]; c < starts[i + 1]; c++) {
            if (c + 1 < starts[rows]) /* rows of the bank lie anywhere */
                prefetch(bank + column[c + 1] * width, width);
            double exact = exact_dot(queries + i * width, bank + column[c] * width, width, sums);
            int64_t place = held;
            while (place > 0 &&
                   (score[place - 1] < exact || (score[place - 1] == exact && index[place - 1] > column[c])))
                place--;
            if (place == k)
                continue;
            held = held < k ? held + 1 : k;
            for (int64_t moved = held - 1; moved > place; moved--) {
                score[moved] = score[moved - 1];
                index[moved] = index[moved - 1];
            }
            score[place] = exact;
            index[place] = column[c];
        }
    }
    free(sums);
    return 0;
}
