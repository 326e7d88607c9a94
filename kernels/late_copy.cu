/* The fence: what has not left the device when the stream comes here gets a late copy before the stream goes on.
 *
 * Three kernels in this order in one stream, which is all the order that they need: `fence_latch` decides once how many chunks
 * have left, `late_copy` copies the others into their slots, `fence_publish` tells the host. */
#include "copy.h"

/* One for each save that may be in flight; zeroed before its save's number, which is never 0, is first used. */
struct Fence {
    u64 save;    /* the save that was latched */
    u64 latched; /* F: chunks before this one had left */
    u64 from;    /* the first chunk that this run of the kernels copies */
};

struct Latch {
    u64 fence;     /* struct Fence */
    u64 watermark; /* u64: chunks of all saves that have left so far; never falls */
    u64 base;      /* what the watermark was before this save */
    u64 save;
    u32 chunks;
    u32 unused;
};

/* One thread. A second run for the same save changes nothing, and leaves nothing to copy. */
KERNEL(fence_latch, Latch)
{
    struct Fence *fence = AT(struct Fence, a.fence, 1);
    if (thread_number() != 0) {
        return;
    }
    if (fence->save == a.save) {
        fence->from = a.chunks;
        return;
    }
    const u64 watermark = *(const volatile u64 *)AT(const u64, a.watermark, 1);
    const u64 left = watermark > a.base ? watermark - a.base : 0;
    fence->save = a.save;
    fence->latched = left < a.chunks ? left : a.chunks;
    fence->from = fence->latched;
}

struct LateCopy {
    u64 fence;  /* struct Fence */
    u64 pieces; /* struct Piece[], by chunk; `to` is an offset in the chunk */
    u64 views;  /* struct View[]; 0 when no piece is strided */
    u64 starts; /* u32[chunks + 1]: where each chunk's pieces begin */
    u64 slots;  /* u64[chunks - first]: addresses of the slots of the last chunks */
    u32 chunks;
    u32 first;  /* chunks before this one have no slot: the stream waited until they had left */
};

INLINE void copy_late(const struct LateCopy *a, u32 four)
{
    const u64 latched = AT(const struct Fence, a->fence, 1)->from;
    const u64 from = latched > a->first ? latched : a->first;
    if (from >= a->chunks) {
        return;
    }
    const u32 *starts = AT(const u32, a->starts, a->chunks + 1);
    const u64 *slots = AT(const u64, a->slots, a->chunks - a->first);
    for (u64 p = (u64)starts[from] + blockIdx.x; p < starts[a->chunks]; p += gridDim.x) {
        const struct Piece *piece = piece_at(a->pieces, p);
        copy_piece(slots[piece->chunk - a->first], piece, a->views, four);
    }
}

/* Any grid, any block. */
KERNEL(late_copy, LateCopy)
{
    copy_late(&a, 0);
}

/* The same with more loads in flight. `checks/gpu/kernels.py` measures both, and the faster one is to stay. */
KERNEL(late_copy_four, LateCopy)
{
    copy_late(&a, 1);
}

struct Publish {
    u64 fence; /* struct Fence */
    u64 to;    /* u64 in pinned memory: receives F */
};

/* One thread. */
KERNEL(fence_publish, Publish)
{
    const struct Fence *fence = AT(const struct Fence, a.fence, 1);
    volatile u64 *to = AT(u64, a.to, 1);
    if (thread_number() == 0) {
        FENCE();
        *to = fence->latched;
        FENCE();
    }
}
