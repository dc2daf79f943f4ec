/* Finished crops of raw pixels on a CPU; see crops.py, which compiles this where it runs. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* A batch is larger than the caches, and a write through them would read the memory first. */
static void write_past_caches(float *to, const float *from, int64_t n) {
#ifdef __AVX__
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

/* The pixels of a line, 3 bytes each, from right to left. */
static void flip(uint8_t *to, const uint8_t *from, int64_t side) {
    int64_t x = 0;
#ifdef __AVX__
    /* Five at once. The sixteenth byte is another pixel's, and written over next; the line's last
       pixel goes first by itself, as there may be no byte behind it. */
    const __m128i turned = _mm_setr_epi8(12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, 15);
    memcpy(to, from + 3 * (side - 1), 3);
    for (x = 1; x + 5 < side; x += 5) {
        __m128i five = _mm_loadu_si128((const __m128i *)(from + 3 * (side - 5 - x)));
        _mm_storeu_si128((__m128i *)(to + 3 * x), _mm_shuffle_epi8(five, turned));
    }
#endif
    for (; x < side; x++) memcpy(to + 3 * x, from + 3 * (side - 1 - x), 3);
}

/* out [b, side, side, 3] = (pixels [N, height, width, 3] in boxes [b, 4], flipped, - mean) * scale;
   means [b, 3], scales [3], boxes as top, left, and two that are side. */
void cut(const uint8_t *pixels, int64_t height, int64_t width, int64_t side, int64_t b,
         const int64_t *rows, const int64_t *boxes, const uint8_t *flips, const float *means,
         const float *scales, float *out) {
    int64_t n = 3 * side;
    uint8_t flipped[n];
    float mean[n], scale[n], finished[n];
    for (int64_t x = 0; x < n; x++) scale[x] = scales[x % 3];
    for (int64_t i = 0; i < b; i++) {
        const int64_t *box = boxes + 4 * i;
        const uint8_t *in = pixels + ((rows[i] * height + box[0]) * width + box[1]) * 3;
        for (int64_t x = 0; x < n; x++) mean[x] = means[3 * i + x % 3];
        for (int64_t y = 0; y < side; y++, in += 3 * width, out += n) {
            const uint8_t *line = in;
            if (flips[i]) {
                flip(flipped, in, side);
                line = flipped;
            }
            for (int64_t x = 0; x < n; x++) finished[x] = ((float)line[x] - mean[x]) * scale[x];
            write_past_caches(out, finished, n);
        }
    }
#ifdef __AVX__
    _mm_sfence();
#endif
}
