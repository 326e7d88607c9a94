/* The built-in names of a kernel, for a C compiler: each launch is a loop over its blocks and threads. */
#ifndef FAKECUDA_SHIM_H
#define FAKECUDA_SHIM_H

#define INLINE static inline

struct index {
    u32 x, y, z;
};

static __thread struct index threadIdx, blockIdx, blockDim, gridDim;

/* Finds the bytes at an address of the device, or of pinned memory, if all of them are there. Otherwise the launch fails, and
 * this is memory that no code looks at. */
void *fakecuda_at(u64 address, u64 bytes);
#define AT(type, address, count) ((type *)fakecuda_at((u64)(address), (u64)(count) * sizeof(type)))

#define ROLLED
#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define XOR(to, value) __atomic_fetch_xor(to, value, __ATOMIC_RELAXED)

typedef struct {
    u64 x, y;
} __attribute__((aligned(16))) ulonglong2;

float sqrtf(float);
float fmaf(float, float, float);

/* Every thread of every block; backwards when asked, because no order is promised. */
#define KERNEL(name, type)                                                                                                     \
    static void name(const struct type a);                                                                                     \
    const u64 fakecuda_bytes_##name = sizeof(struct type);                                                                     \
    void fakecuda_run_##name(const void *argument, const u32 *grid, const u32 *block, u32 backwards)                           \
    {                                                                                                                          \
        const u64 blocks = (u64)grid[0] * grid[1] * grid[2], threads = (u64)block[0] * block[1] * block[2];                    \
        gridDim = (struct index){grid[0], grid[1], grid[2]};                                                                   \
        blockDim = (struct index){block[0], block[1], block[2]};                                                               \
        for (u64 i = 0; i < blocks; i++) {                                                                                     \
            const u64 b = backwards ? blocks - 1 - i : i;                                                                      \
            blockIdx = (struct index){(u32)(b % grid[0]), (u32)(b / grid[0] % grid[1]), (u32)(b / grid[0] / grid[1])};         \
            for (u64 j = 0; j < threads; j++) {                                                                                \
                const u64 t = backwards ? threads - 1 - j : j;                                                                 \
                threadIdx = (struct index){(u32)(t % block[0]), (u32)(t / block[0] % block[1]), (u32)(t / block[0] / block[1])}; \
                name(*(const struct type *)argument);                                                                          \
            }                                                                                                                  \
        }                                                                                                                      \
    }                                                                                                                          \
    static void name(const struct type a)
#endif
