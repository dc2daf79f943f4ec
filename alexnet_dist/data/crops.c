/* Finished crops of raw pixels on a CPU; see crops.py, which compiles this where it runs. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Lines that are finished before the first of them is written to memory: what was stored a moment
   ago can be read only once the writes before it are through. */
#define LINES 4

/* A line of a crop, flipped or not: (pixels - mean) * scale. */
static void finish_by_one(float *to, const uint8_t *from, int64_t side, int flip,
                          const float *mean, const float *scale) {
    for (int64_t x = 0; x < side; x++) {
        const uint8_t *pixel = from + 3 * (flip ? side - 1 - x : x);
        for (int64_t c = 0; c < 3; c++) to[3 * x + c] = ((float)pixel[c] - mean[c]) * scale[c];
    }
}

#ifdef __AVX2__
/* The numbers that `chosen` takes from 16 bytes, to `to`. */
static inline void finish_eight_numbers(float *to, const uint8_t *from, __m128i chosen,
                                        const float *mean, const float *scale) {
    __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from), chosen);
    __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    numbers = _mm256_mul_ps(_mm256_sub_ps(numbers, _mm256_loadu_ps(mean)), _mm256_loadu_ps(scale));
    _mm256_storeu_ps(to, numbers);
}

/* As finish_by_one, eight pixels at once: three vectors, of bytes 0, 4 and 8 onwards, or from the
   right. The last eight of a line overlap those before. Lines are read from left to right even
   where they are flipped, since that is how processors fetch memory ahead. */
static void finish_by_eight(float *to, const uint8_t *from, int64_t side, int flip,
                            const float *mean, const float *scale) {
    const __m128i straight[] = {_mm_set1_epi64x(0x0706050403020100),
                                _mm_set1_epi64x(0x0b0a090807060504),
                                _mm_set1_epi64x(0x0f0e0d0c0b0a0908)};
    const __m128i flipped[] = {_mm_set1_epi64x(0x08070c0b0a0f0e0d),
                               _mm_set1_epi64x(0x020706050a09080d),
                               _mm_set1_epi64x(0x0201000504030807)};
    const __m128i *chosen = flip ? flipped : straight;
    int64_t eights = (side + 7) / 8;
    for (int64_t i = 0; i < eights; i++) {
        int64_t x = 8 * (flip ? eights - 1 - i : i);
        if (x + 8 > side) x = side - 8;
        const uint8_t *in = from + 3 * (flip ? side - 8 - x : x);
        float *out = to + 3 * x;
        finish_eight_numbers(out, in + (flip ? 8 : 0), chosen[0], mean, scale);
        finish_eight_numbers(out + 8, in + 4, chosen[1], mean + 8, scale + 8);
        finish_eight_numbers(out + 16, in + (flip ? 0 : 8), chosen[2], mean + 16, scale + 16);
    }
}
#endif

/* A batch is larger than the caches, and a write through them would read the memory first. */
static void write_past_caches(float *to, const float *from, int64_t n) {
#ifdef __AVX2__
    int64_t x = 0;
    int32_t bits;
    for (; x < n && (uintptr_t)(to + x) % 32; x++) {
        memcpy(&bits, from + x, 4);
        _mm_stream_si32((int *)(to + x), bits);
    }
    for (; x + 8 <= n; x += 8) _mm256_stream_ps(to + x, _mm256_loadu_ps(from + x));
    for (; x < n; x++) {
        memcpy(&bits, from + x, 4);
        _mm_stream_si32((int *)(to + x), bits);
    }
#else
    memcpy(to, from, n * sizeof(float));
#endif
}

/* out [b, side, side, 3] = (pixels [N, height, width, 3] in boxes [b, 4], flipped, - mean) * scale;
   means [b, 3], scales [3], boxes as top, left, and two that are side. */
void cut(const uint8_t *pixels, int64_t height, int64_t width, int64_t side, int64_t b,
         const int64_t *rows, const int64_t *boxes, const uint8_t *flips, const float *means,
         const float *scales, float *out) {
    void (*finish)(float *, const uint8_t *, int64_t, int, const float *, const float *) =
        finish_by_one;
#ifdef __AVX2__
    if (side >= 8) finish = finish_by_eight;
#endif
    int64_t n = 3 * side, apart = (n + 15) / 16 * 16;
    float mean[24], scale[24], room[LINES * apart + 16];
    float *lines = (float *)(((uintptr_t)room + 63) / 64 * 64);
    for (int64_t x = 0; x < 24; x++) scale[x] = scales[x % 3];
    for (int64_t i = 0; i < b; i++) {
        const int64_t *box = boxes + 4 * i;
        const uint8_t *in = pixels + ((rows[i] * height + box[0]) * width + box[1]) * 3;
        for (int64_t x = 0; x < 24; x++) mean[x] = means[3 * i + x % 3];
        for (int64_t y = 0; y < side; y += LINES) {
            int64_t count = side - y < LINES ? side - y : LINES;
            for (int64_t line = 0; line < count; line++, in += 3 * width)
                finish(lines + line * apart, in, side, flips[i], mean, scale);
            for (int64_t line = 0; line < count; line++, out += n)
                write_past_caches(out, lines + line * apart, n);
        }
    }
#ifdef __AVX2__
    _mm_sfence();
#endif
}
