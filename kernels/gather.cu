/* Many small and strided tensors into one place, so that a single copy takes them off the device. */
#include "copy.h"

struct Gather {
    u64 pieces; /* struct Piece[], of which `count` from `first` on are copied */
    u64 views;  /* struct View[]; 0 when no piece is strided */
    u64 base;   /* what the pieces' offsets are from */
    u32 first;
    u32 count;
};

/* Any grid, any block. */
KERNEL(gather, Gather)
{
    for (u64 p = blockIdx.x; p < a.count; p += gridDim.x) {
        copy_piece(a.base, piece_at(a.pieces, a.first + p), a.views, 0);
    }
}
