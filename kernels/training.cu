/* What a training step does, for the demo and the benchmarks; no save needs it. Compiled without contraction, so that results
 * are the same bits on every device. */
#include "kernel.h"

struct Adamw {
    u64 parameter; /* float[count], as are the next three */
    u64 first;
    u64 second;
    u64 gradient;
    u64 count;
    float rate;    /* already divided by the bias of the first moment */
    float unbias;  /* one over the bias of the second moment */
    float beta_first;
    float beta_second;
    float epsilon;
    float decay;   /* already multiplied by the rate */
};

/* One step of AdamW in place. Any grid, any block. */
KERNEL(adamw, Adamw)
{
    float *parameter = AT(float, a.parameter, a.count);
    float *first = AT(float, a.first, a.count);
    float *second = AT(float, a.second, a.count);
    const float *gradient = AT(const float, a.gradient, a.count);
    for (u64 i = thread_number(); i < a.count; i += thread_count()) {
        const float g = gradient[i], p = parameter[i];
        const float m = a.beta_first * first[i] + (1.0f - a.beta_first) * g;
        const float v = a.beta_second * second[i] + (1.0f - a.beta_second) * (g * g);
        first[i] = m;
        second[i] = v;
        parameter[i] = p - (a.rate * m / (sqrtf(v * a.unbias) + a.epsilon) + a.decay * p);
    }
}

struct Fill {
    u64 to; /* float[count] */
    u64 count;
    u64 seed;
    float scale;
    u32 unused;
};

/* Numbers between -scale and scale, the same for the same seed: weights and gradients. Any grid, any block. */
KERNEL(fill, Fill)
{
    float *to = AT(float, a.to, a.count);
    for (u64 i = thread_number(); i < a.count; i += thread_count()) {
        u64 bits = a.seed + i * 0x9e3779b97f4a7c15ull;
        bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ull;
        bits = (bits ^ bits >> 27) * 0x94d049bb133111ebull;
        to[i] = a.scale * ((float)(int)((bits ^ bits >> 31) >> 40) / 8388608.0f - 1.0f);
    }
}

struct Busy {
    u64 out; /* float: written only by a thread whose result is zero, which none is */
    u64 rounds;
};

/* Keeps as many threads as there are busy with multiplications and additions. Any grid, any block. */
KERNEL(busy, Busy)
{
    float x = 1.0f + (float)(thread_number() & 255) / 256.0f, y = x + 0.5f;
    for (u64 i = 0; i < a.rounds; i++) {
        x = fmaf(x, 0.9999f, 0.0001f);
        y = fmaf(y, 0.9998f, 0.0002f);
    }
    if (x + y == 0.0f) {
        *AT(float, a.out, 1) = x;
    }
}
