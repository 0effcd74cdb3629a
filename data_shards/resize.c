/* Crops to squares of one size, through a triangle filter that is widened when shrinking: what Pillow, PyTorch (bilinear with
 * antialias) and DALI compute. Rows first, as sums of whole rows; then columns, of four rows at a time so that four sums are under
 * way at once. Sums are float32 and are rounded once, at the end. `resize.py` calls this; it needs no Python. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* On x86 with glibc: compiled for AVX-512, for AVX2 and for the least; the loader picks. Elsewhere the compiler's own choice. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

#define CHANNELS 3
#define ROWS 4 /* that `across` takes at a time */

typedef float four __attribute__((vector_size(16)));
typedef float four_anywhere __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_ints __attribute__((vector_size(16)));
typedef uint8_t four_bytes __attribute__((vector_size(4)));

struct crop {
    const uint8_t *pixels;  /* RGB */
    int64_t stride;         /* bytes from row to row */
    int32_t width, height;  /* at least 1 */
    int32_t mirror;         /* 1 swaps left and right */
};

/* What each of `size` places sums: `used` pixels from `first`, with `weights`, rows of `most`, 0 behind those used. */
struct filter {
    int most, longest; /* of the rows; of `used` */
    int32_t *first, *used;
    float *weights;
};

static int most_used(int count, int size) { return 2 * (count / size + 1) + 2; }

static void make_filter(struct filter *filter, int count, int size)
{
    memset(filter->weights, 0, (size_t)size * filter->most * sizeof(float));
    filter->longest = 0;
    double scale = (double)count / size, support = scale > 1 ? scale : 1, slope = 1 / support;
    for (int i = 0; i < size; i++) {
        double centre = scale * (i + 0.5), total = 0;
        int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
        float *weights = filter->weights + (size_t)i * filter->most;
        low = low < 0 ? 0 : low;
        high = high > count ? count : high;
        for (int j = low; j < high; j++) {
            double weight = 1 - fabs((j - centre + 0.5) * slope);
            weights[j - low] = (float)(weight > 0 ? weight : 0);
            total += weights[j - low];
        }
        float share = (float)(1 / total);
        for (int j = 0; j < high - low; j++)
            weights[j] *= share;
        filter->first[i] = low;
        filter->used[i] = high - low;
        if (high - low > filter->longest) filter->longest = high - low;
    }
}

/* The weighted sum of `used` rows of `count` bytes. */
FOR_EACH_CPU static void down(const uint8_t *pixels, int64_t stride, int count, int used, const float *weights, float *restrict row)
{
    const uint8_t *a = pixels, *b = a + stride, *c = b + stride, *d = c + stride;
    const float *w = weights;
    if (used == 1)
        for (int i = 0; i < count; i++) row[i] = w[0] * a[i];
    else if (used == 2)
        for (int i = 0; i < count; i++) row[i] = w[0] * a[i] + w[1] * b[i];
    else if (used == 3)
        for (int i = 0; i < count; i++) row[i] = w[0] * a[i] + w[1] * b[i] + w[2] * c[i];
    else
        for (int i = 0; i < count; i++) row[i] = w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i];
    for (int k = 4; k < used; k++)
        for (int i = 0; i < count; i++) row[i] += w[k] * pixels[k * stride + i];
}

static inline void put(uint8_t *at, four sums)
{
    four_bytes bytes = __builtin_convertvector(__builtin_convertvector(sums, four_ints), four_bytes);
    memcpy(at, &bytes, sizeof bytes);
}

/* ROWS rows of sums to ROWS rows of `size` pixels, each from `used` pixels. Three channels are read, summed and written as four:
 * what is one too many is overwritten by the next pixel, and each row of `rows` and `out` has room for more. */
static inline __attribute__((always_inline)) void
across_used(int used, const float *rows, int64_t stride, const struct filter *filter, int size, int mirror, uint8_t *out, int64_t line)
{
    const four half = {0.5f, 0.5f, 0.5f, 0.5f};
    const float *all = filter->weights;
    const int32_t *first = filter->first;
    int64_t most = filter->most;
    for (int place = 0; place < size; place++) {
        int i = mirror ? size - 1 - place : place;
        const float *weights = all + i * most, *from = rows + CHANNELS * first[i];
        four a = half, b = half, c = half, d = half;
        for (int j = 0; j < used; j++, from += CHANNELS) {
            a += weights[j] * *(const four_anywhere *)from;
            b += weights[j] * *(const four_anywhere *)(from + stride);
            c += weights[j] * *(const four_anywhere *)(from + 2 * stride);
            d += weights[j] * *(const four_anywhere *)(from + 3 * stride);
        }
        uint8_t *at = out + CHANNELS * place;
        put(at, a);
        put(at + line, b);
        put(at + 2 * line, c);
        put(at + 3 * line, d);
    }
}

/* With a number of pixels that the compiler knows a fifth faster. Behind the last one are weights of 0 and sums of other rows. */
FOR_EACH_CPU static void
across(const float *rows, int64_t stride, const struct filter *filter, int size, int mirror, uint8_t *out, int64_t line)
{
    if (filter->longest <= 2)
        across_used(2, rows, stride, filter, size, mirror, out, line);
    else if (filter->longest <= 4)
        across_used(4, rows, stride, filter, size, mirror, out, line);
    else
        across_used(filter->longest, rows, stride, filter, size, mirror, out, line);
}

static int larger(int a, int b) { return a > b ? a : b; }

/* `count` crops to size x size pixels each, one behind the other in `out`. 0, or -1 where there is no memory. */
int facescale_resize(const struct crop *crops, int count, int size, uint8_t *out)
{
    int width = 1, height = 1;
    for (int k = 0; k < count; k++) {
        width = larger(width, crops[k].width);
        height = larger(height, crops[k].height);
    }
    struct filter x = {.most = most_used(width, size)}, y = {.most = most_used(height, size)};
    size_t places = (size_t)size, stride = CHANNELS * ((size_t)width + x.most) + 1, line = CHANNELS * places + 1;
    size_t floats = places * (x.most + y.most) + ROWS * stride;
    float *memory = calloc(1, floats * sizeof(float) + 4 * places * sizeof(int32_t) + ROWS * line);
    if (memory == NULL) return -1;
    x.weights = memory;
    y.weights = x.weights + places * x.most;
    float *rows = y.weights + places * y.most;
    x.first = (int32_t *)(rows + ROWS * stride);
    x.used = x.first + size;
    y.first = x.used + size;
    y.used = y.first + size;
    uint8_t *done = (uint8_t *)(y.used + size);
    for (int k = 0; k < count; k++) {
        struct crop crop = crops[k];
        make_filter(&x, crop.width, size);
        make_filter(&y, crop.height, size);
        for (int top = 0; top < size; top += ROWS) {
            int here = size - top < ROWS ? size - top : ROWS;
            for (int r = 0; r < here; r++) {
                int at = top + r;
                down(crop.pixels + y.first[at] * crop.stride, crop.stride, CHANNELS * crop.width, y.used[at],
                     y.weights + (size_t)at * y.most, rows + r * stride);
            }
            across(rows, stride, &x, size, crop.mirror, done, line);
            for (int r = 0; r < here; r++, out += CHANNELS * places) memcpy(out, done + r * line, CHANNELS * places);
        }
    }
    free(memory);
    return 0;
}
