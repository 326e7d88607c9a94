/* A copy within the device by the threads of one block. */
#ifndef ASHORE_COPY_H
#define ASHORE_COPY_H
#include "kernel.h"

/* Ranges that lie together, at any alignment. Nothing outside of them is read. With `four` a thread has four loads of 16 bytes in
 * flight, where both ranges are aligned alike. */
INLINE void copy_flat(u64 to_at, u64 from_at, u64 bytes, u32 four)
{
    u8 *to = AT(u8, to_at, bytes);
    const u8 *from = AT(const u8, from_at, bytes);
    const u32 lane = threadIdx.x, lanes = blockDim.x;
    /* Whole words of the destination, but for the first and the last, which may need bytes from outside when shifted. */
    const u32 shift = (u32)(from_at - to_at) & 7;
    const u64 width = ((from_at - to_at) & 15) == 0 ? 16 : 8;
    u64 head = (0 - to_at) & (width - 1);
    head = shift == 0 ? head : head + 8;
    u64 words = bytes >= head ? (bytes - head) / width : 0;
    words -= shift != 0 && words > 0;
    if (words == 0) {
        head = 0;
    }
    if (width == 16) {
        ulonglong2 *words_to = (ulonglong2 *)(to + head);
        const ulonglong2 *words_from = (const ulonglong2 *)(from + head);
        u64 i = lane;
        if (four) {
            for (; i + 3 * lanes < words; i += 4 * lanes) {
                const ulonglong2 a = words_from[i], b = words_from[i + lanes];
                const ulonglong2 c = words_from[i + 2 * lanes], d = words_from[i + 3 * lanes];
                words_to[i] = a;
                words_to[i + lanes] = b;
                words_to[i + 2 * lanes] = c;
                words_to[i + 3 * lanes] = d;
            }
        }
        for (; i < words; i += lanes) {
            words_to[i] = words_from[i];
        }
    } else if (shift == 0) {
        for (u64 i = lane; i < words; i += lanes) {
            ((u64 *)(to + head))[i] = ((const u64 *)(from + head))[i];
        }
    } else {
        const u64 *pairs = AT(const u64, from_at + head - shift, words > 0 ? words + 1 : 0);
        for (u64 i = lane; i < words; i += lanes) {
            ((u64 *)(to + head))[i] = pairs[i] >> (8 * shift) | pairs[i + 1] << (64 - 8 * shift);
        }
    }
    for (u64 i = lane; i < head; i += lanes) {
        to[i] = from[i];
    }
    for (u64 i = head + words * width + lane; i < bytes; i += lanes) {
        to[i] = from[i];
    }
}

/* Items that lie apart. */
INLINE void copy_strided(u64 to_at, const struct Piece *piece, const struct View *view)
{
    const u32 item = view->item;
    for (u64 i = threadIdx.x; i < piece->bytes / item; i += blockDim.x) {
        const u64 from_at = item_at(view, piece->from, piece->skip + i * item);
        u8 *to = AT(u8, to_at + i * item, item);
        const u8 *from = AT(const u8, from_at, item);
        const u64 both = (to_at + i * item) | from_at;
        if (item == 2 && (both & 1) == 0) {
            *(unsigned short *)to = *(const unsigned short *)from;
        } else if (item == 4 && (both & 3) == 0) {
            *(u32 *)to = *(const u32 *)from;
        } else if (item == 8 && (both & 7) == 0) {
            *(u64 *)to = *(const u64 *)from;
        } else {
            for (u32 b = 0; b < item; b++) {
                to[b] = from[b];
            }
        }
    }
}

INLINE void copy_piece(u64 base, const struct Piece *piece, u64 views, u32 four)
{
    if (piece->view == 0) {
        copy_flat(base + piece->to, piece->from, piece->bytes, four);
    } else {
        copy_strided(base + piece->to, piece, view_at(views, piece->view));
    }
}
#endif
