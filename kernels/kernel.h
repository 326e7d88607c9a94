/* What kernels are written with: no standard headers, and nothing that a C compiler cannot be given by a shim. README.md beside
 * this file says which subset that is. Every kernel takes one structure by value, of 8-byte fields before 4-byte ones. */
#ifndef ASHORE_KERNEL_H
#define ASHORE_KERNEL_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef __CUDACC__
/* Blocks of up to 1024 threads: without the bound a kernel may take more registers than a block of that size has. */
#define KERNEL(name, type) extern "C" __global__ void __launch_bounds__(1024) name(const struct type a)
#define INLINE static __device__ __forceinline__
/* `count` elements at an address that came as a number. The simulated device checks it, and finds the bytes elsewhere. */
#define AT(type, address, count) ((type *)(address))
/* What this thread wrote before is seen by the whole system before what it writes after. */
#define FENCE() __threadfence_system()
#define XOR(to, value) atomicXor(to, value)
/* In front of a loop whose body is so long already that repeating it only costs. */
#define ROLLED _Pragma("unroll 1")
#else
#include "shim.h"
#endif

/* Threads of the grid in one dimension, and this one's number. */
INLINE u64 thread_count(void) { return (u64)gridDim.x * blockDim.x; }
INLINE u64 thread_number(void) { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

/* Where the bytes of a strided tensor are: row-major over `shape`, `item` bytes at each index, strides in bytes. */
#define DIMS 8
struct View {
    u64 shape[DIMS];
    i64 stride[DIMS];
    u32 dims;
    u32 item;
};

/* Part of a tensor and where it goes. `view` is 0 for bytes that lie together at `from`; otherwise views[view - 1] tells how
 * they lie around `from`, `skip` bytes of the packed tensor come before this part, and `skip` and `bytes` are multiples of the
 * view's item. `to` is an offset. One block works on a piece, so pieces are best of at most 64 KiB, and of like size. */
struct Piece {
    u64 from;
    u64 to;
    u64 skip;
    u32 bytes;
    u32 view;
    u32 chunk;
    u32 unused;
};

INLINE const struct Piece *piece_at(u64 pieces, u64 i)
{
    return AT(const struct Piece, pieces + i * sizeof(struct Piece), 1);
}

INLINE const struct View *view_at(u64 views, u32 view)
{
    return AT(const struct View, views + (u64)(view - 1) * sizeof(struct View), 1);
}

/* The address of the item that begins at this byte of the packed tensor. */
INLINE u64 item_at(const struct View *view, u64 from, u64 byte)
{
    u64 index = byte / view->item;
    u64 at = from;
    ROLLED for (u32 d = view->dims; d-- > 0;) {
        at += (u64)((i64)(index % view->shape[d]) * view->stride[d]);
        index /= view->shape[d];
    }
    return at;
}
#endif
