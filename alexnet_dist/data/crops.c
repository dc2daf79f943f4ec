/* Finished crops of raw pixels on a CPU; see crops.py, which compiles this where it runs. */

#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* A batch is larger than the caches. A write through them would read the memory first. */
static void write_past_caches(float *to, const float *from, int64_t n) {
#ifdef __SSE2__
    int64_t x = 0;
    int32_t bits;
    for (; x < n && (uintptr_t)(to + x) % 16; x++) {
        memcpy(&bits, from + x, 4);
        _mm_stream_si32((int *)(to + x), bits);
    }
    for (; x + 4 <= n; x += 4) _mm_stream_ps(to + x, _mm_loadu_ps(from + x));
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
    int64_t n = 3 * side;
    uint8_t flipped[n];
    float mean[n], scale[n], finished[n];
    for (int64_t x = 0; x < n; x++) scale[x] = scales[x % 3];
    for (int64_t i = 0; i < b; i++) {
        const int64_t *box = boxes + 4 * i;
        const uint8_t *in = pixels + ((rows[i] * height + box[0]) * width + box[1]) * 3;
        for (int64_t x = 0; x < n; x++) mean[x] = means[3 * i + x % 3];
        for (int64_t y = 0; y < side; y++, in += 3 * width, out += n) {
            const uint8_t *row = in;
            if (flips[i]) {
                for (int64_t x = 0; x < side; x++)
                    memcpy(flipped + 3 * x, in + 3 * (side - 1 - x), 3);
                row = flipped;
            }
            for (int64_t x = 0; x < n; x++) finished[x] = ((float)row[x] - mean[x]) * scale[x];
            write_past_caches(out, finished, n);
        }
    }
#ifdef __SSE2__
    _mm_sfence();
#endif
}
