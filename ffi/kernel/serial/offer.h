// Helping: a block that waits multiplies tiles of a product that another block is at.
//
// Every block has its share of every product, but cores are not equally fast: their clocks, their caches and the machine's other
// work differ, and change. So a block offers the product that it is at, and a block that would only wait takes tiles of it. It
// does not matter who multiplies a tile: the sums are the same.
//
// Contract. An offer says which tiles of which product nobody has taken, in one word. The owner takes tiles from the front,
// others take some from the end, all by compare-and-swap, so every tile is taken once. Who takes a tile writes its sums where
// the owner would have, and others count it as returned. The owner goes on when all tiles that others took have returned.
//
// Proof that nothing is used too early or too late. The owner releases the product with the word, and whoever swaps it has
// acquired it, so a taken tile's product is complete. Until the tile has returned the owner stays at the product, so weights,
// activations and sums stay where they are. Returning releases the sums, and the owner acquires them when it counts. Who has
// looked at a word but not swapped it has touched nothing: a swap succeeds only if the word is the same, and the product's number
// in it returns after 2^24 products only.
//
// The owner's wait for returns has no limit of its own: it is for multiplications that have begun, which wait for nothing.
#pragma once

#include "kernel/call.h"

namespace mono::MONO_VARIANT {

// Tiles [first, end) of the number-th product of a block, as one word.
struct OpenTiles {
  static constexpr int kBits = 20;
  static constexpr i32 kMost = (1 << kBits) - 1;
  u32 number;
  i32 first, end;

  MONO_DEVICE OpenTiles(u32 n, i32 f, i32 e) : number(n), first(f), end(e) {}
  MONO_DEVICE explicit OpenTiles(u64 word)
      : number(u32(word >> 2 * kBits)), first(i32(word >> kBits) & kMost), end(i32(word) & kMost) {}
  MONO_DEVICE u64 word() const { return u64(number) << 2 * kBits | u64(first) << kBits | u64(end); }
};

MONO_DEVICE bool swap_tiles(Offer& offer, OpenTiles& seen, const OpenTiles& left) {
  u64 word = seen.word();
  const bool swapped = __atomic_compare_exchange_n(&offer.open, &word, left.word(), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  if (!swapped) seen = OpenTiles(word);
  return swapped;
}

// The owner's next tile, or -1.
MONO_DEVICE i32 take_first(Offer& offer) {
  OpenTiles seen(arch::load_acquire(&offer.open));
  while (seen.first < seen.end)
    if (swap_tiles(offer, seen, {seen.number, seen.first + 1, seen.end})) return seen.first;
  return -1;
}

// Multiplies `count` tiles, waits for others that have taken some, and leaves nothing to take. Meanwhile the pump works.
template <class Product>
MONO_DEVICE void multiply_with_help(Offer& offer, const Product& product, i32 count, arch::Pump& pump) {
  offer.product = &product;
  offer.multiply = [](const void* of, i32 tile) { static_cast<const Product*>(of)->multiply(tile); };
  offer.returned = 0;
  const OpenTiles last(arch::load_acquire(&offer.open));
  arch::store_release(&offer.open, OpenTiles(last.number + 1, 0, count).word());
  i32 own = 0;
  for (i32 tile; (tile = take_first(offer)) >= 0; ++own) product.multiply(tile);
  for (i32 looks = 1; arch::load_acquire(&offer.returned) != count - own; ++looks) {
    if (!pump.step()) arch::pause();
    if (looks % 1024 == 0) arch::yield();  // who has taken a tile may need this very core
  }
}

// Multiplies some tiles of the block that has most left; returns whether there were any. They are few towards the end, so that
// the owner is not kept.
MONO_DEVICE bool arch::help(Offer* offers, i32 count) {
  constexpr i32 kMostAtOnce = 8;
  Offer* offer = nullptr;
  for (i32 i = 0, most = 0; i < count; ++i) {
    const OpenTiles tiles(arch::load_acquire(&offers[i].open));
    if (tiles.end - tiles.first > most) most = tiles.end - tiles.first, offer = offers + i;
  }
  if (!offer) return false;
  OpenTiles seen(arch::load_acquire(&offer->open));
  while (seen.first < seen.end) {
    const i32 share = (seen.end - seen.first + 3) / 4, taken = share < kMostAtOnce ? share : kMostAtOnce;
    if (!swap_tiles(*offer, seen, {seen.number, seen.first, seen.end - taken})) continue;
    for (i32 tile = seen.end - taken; tile < seen.end; ++tile) offer->multiply(offer->product, tile);
    __atomic_fetch_add(&offer->returned, taken, __ATOMIC_RELEASE);
    return true;
  }
  return false;
}

}  // namespace mono::MONO_VARIANT
