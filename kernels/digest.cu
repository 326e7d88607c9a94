/* CRC-64/NVME of every piece, the same as `src/digest.rs` computes. Digests of neighbours combine on the host.
 *
 * A register is a polynomial over GF(2), bit-reflected: x^0 is the highest bit. Without its inversions a CRC is linear, so the
 * words of a piece can be weighed apart and added. Lane l of 256 takes words l, l + 256, ... (neighbours read neighbouring words):
 * acc = acc * x^(64 * 256) + word, one multiplication by a constant, which is eight table look-ups. In the end each lane
 * multiplies by x^(64 * (256 - l)) and all lanes add up. Leading zeros change nothing, so rows are filled up in front. */
#include "kernel.h"

#define LANES 256
#define POLYNOMIAL 0x9a6c9329ac4bc9b5ull

/* What `digest_tables` fills, in words: a byte's product for each place of the byte, weights of lanes, x^(8 * 2^k). */
#define PRODUCTS (8 * 256)
#define WEIGHTS LANES
#define POWERS 40

INLINE u64 multiply(u64 a, u64 b)
{
    u64 product = 0;
    ROLLED for (int bit = 63; bit >= 0; bit--) {
        product ^= b & (0 - (a >> bit & 1));
        b = b >> 1 ^ (POLYNOMIAL & (0 - (b & 1)));
    }
    return product;
}

/* x^(8 * bytes), by squaring. */
INLINE u64 power(u64 bytes)
{
    u64 result = 1ull << 63, square = 1ull << 55;
    ROLLED for (; bytes != 0; bytes >>= 1) {
        result = bytes & 1 ? multiply(square, result) : result;
        square = multiply(square, square);
    }
    return result;
}

struct DigestTables {
    u64 tables; /* u64[PRODUCTS + WEIGHTS + POWERS] */
};

/* Any grid, any block. Once, before the first digest. */
KERNEL(digest_tables, DigestTables)
{
    u64 *tables = AT(u64, a.tables, PRODUCTS + WEIGHTS + POWERS);
    for (u64 i = thread_number(); i < PRODUCTS + WEIGHTS + POWERS; i += thread_count()) {
        if (i < PRODUCTS) {
            tables[i] = multiply((i & 255) << (8 * (i >> 8)), power(8 * LANES));
        } else if (i < PRODUCTS + WEIGHTS) {
            tables[i] = power(8 * (LANES - (i - PRODUCTS)));
        } else {
            tables[i] = power(1ull << (i - PRODUCTS - WEIGHTS));
        }
    }
}

/* crc * x^(8 * bytes) */
INLINE u64 shifted(const u64 *tables, u64 crc, u64 bytes)
{
    const u64 *powers = tables + PRODUCTS + WEIGHTS;
    ROLLED for (u32 k = 0; bytes != 0; bytes >>= 1, k++) {
        crc = bytes & 1 ? multiply(powers[k], crc) : crc;
    }
    return crc;
}

/* The CRC of fewer than eight bytes, the first one lowest in `word`. */
INLINE u64 crc_of_few(u64 word, u64 bytes)
{
    ROLLED for (u64 bit = 0; bit < 8 * bytes; bit++) {
        word = word >> 1 ^ (POLYNOMIAL & (0 - (word & 1)));
    }
    return word;
}

/* Up to eight bytes of a piece, from the `at`-th on. */
INLINE u64 bytes_of(const struct Piece *piece, const struct View *view, u64 at, u32 bytes)
{
    u64 word = 0;
    ROLLED for (u32 b = 0; b < bytes; b++) {
        u64 from = piece->from + at + b;
        if (view) {
            const u64 byte = piece->skip + at + b, inside = byte % view->item;
            from = item_at(view, piece->from, byte - inside) + inside;
        }
        word |= (u64)*AT(const u8, from, 1) << (8 * b);
    }
    return word;
}

/* What one lane adds to the digest of a piece. */
INLINE u64 share(const u64 *tables, const struct Piece *piece, const struct View *view, u32 lane)
{
    const u64 bytes = piece->bytes;
    u64 head = view ? 0 : (0 - piece->from) & 7;
    head = head < bytes ? head : bytes;
    const u64 words = (bytes - head) / 8, tail = (bytes - head) % 8;
    const u64 rows = (words + LANES - 1) / LANES, absent = rows * LANES - words;
    const u64 *flat = view ? 0 : AT(const u64, piece->from + head, words);
    u64 acc = 0, i = lane - absent;
    for (u64 row = 0; row < rows; row++, i += LANES) {
        u64 word = 0, product = 0;
        /* Before the first word `i` is below zero, which is above every number of words. */
        if (i < words) {
            word = view ? bytes_of(piece, view, 8 * i, 8) : flat[i];
        }
        for (u32 place = 0; place < 8; place++) {
            product ^= tables[256 * place + (acc >> (8 * place) & 255)];
        }
        acc = product ^ word;
    }
    acc = shifted(tables, multiply(tables[PRODUCTS + lane], acc), tail);
    if (lane == 0) {
        /* The bytes that fill no word, and the inversions at both ends. */
        const u64 before = crc_of_few(bytes_of(piece, view, 0, (u32)head), head);
        const u64 after = crc_of_few(bytes_of(piece, view, bytes - tail, (u32)tail), tail);
        acc ^= after ^ shifted(tables, before, bytes - head) ^ shifted(tables, ~0ull, bytes) ^ ~0ull;
    }
    return acc;
}

struct Digest {
    u64 pieces; /* struct Piece[], of which `count` from `first` on are digested; `to` and `chunk` do not matter */
    u64 views;  /* struct View[]; 0 when no piece is strided */
    u64 tables; /* what `digest_tables` filled */
    u64 out;    /* u64[count], zeroed before */
    u32 first;
    u32 count;
};

/* Any grid, any block; blocks of 256 waste nothing. */
KERNEL(digest, Digest)
{
    const u64 *tables = AT(const u64, a.tables, PRODUCTS + WEIGHTS + POWERS);
    u64 *out = AT(u64, a.out, a.count);
    for (u64 p = blockIdx.x; p < a.count; p += gridDim.x) {
        const struct Piece *piece = piece_at(a.pieces, a.first + p);
        const struct View *view = piece->view ? view_at(a.views, piece->view) : 0;
        for (u32 lane = threadIdx.x; lane < LANES; lane += blockDim.x) {
            XOR(&out[p], share(tables, piece, view, lane));
        }
    }
}
