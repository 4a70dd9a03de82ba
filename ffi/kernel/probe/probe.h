// Probes of a device, apart from any model: how long a word takes from block to block, how many may poll it, and how far each
// page of memory is from each die. Included by the headers of the architectures beside this one, which supply MONO_PROBE and
// namespace mono::probe::arch.
#pragma once

#include "kernel/probe/flag.h"

namespace mono::probe {

constexpr int kDies = 16;            // at most, of a device
constexpr i32 kPageBytes = 4096;
constexpr u32 kOver = 0xffffffffu;   // tag with which a player tells the others that it gave up

// What the blocks of one device do; everything it points to is zero when they start.
struct Probe {
  i64 limit;          // nanoseconds for all of it
  i32* dies;          // [blocks] out: the die of each block
  float* times;       // out: [1] nanoseconds of a hand-off, or [kDies, pages] of a read; negative if the limit was reached
  // Hand-offs: two blocks answer each other. Each word lies in the memory of the device that waits for it.
  Flag *ping, *pong;
  i32 first, second;  // the blocks; negative for one on another device, or for no hand-offs at all
  i32 rounds;
  i32 pollers;        // further blocks that wait for the first one's last word
  i32 across;         // whether the two are on different devices
  // Reads, if there are pages: one block of each die reads some lines of every page.
  i32 lines;
  i64 pages;
  const u32* memory;
  u32 none;           // zero, which only the host knows: a read's value, masked with it, is where the next one goes on
  i32* claimed;       // [kDies]
};

// Waits for a tag, as blocks of the resident program do: with a pause between two looks.
MONO_PROBE bool await(const Flag* flag, u32 tag, i32 across, i64 end) {
  constexpr int kLooks = 256;
  while (arch::nanoseconds() < end)
    for (int look = 0; look < kLooks; ++look) {
      const u32 found = arch::load_tag(flag, across);
      if (found >= tag) return found != kOver;
      arch::pause();
    }
  return false;
}

MONO_PROBE void hand_off(const Probe& p, i32 block) {
  const i64 end = arch::nanoseconds() + p.limit;
  const i32 warm = p.rounds / 8, last = warm + p.rounds;
  bool good = true;
  if (block == p.first) {
    i64 begun = 0;
    for (i32 round = 1; good && round <= last; ++round) {
      if (round == warm + 1) begun = arch::nanoseconds();
      arch::store_tag(p.ping, u32(round), p.across);
      good = await(p.pong, u32(round), p.across, end);
    }
    if (!good) arch::store_tag(p.ping, kOver, p.across);
    p.times[0] = good ? float(arch::nanoseconds() - begun) / (2.0f * float(p.rounds)) : -1.0f;
  } else if (block == p.second) {
    for (i32 round = 1; good && round <= last; ++round) {
      good = await(p.ping, u32(round), p.across, end);
      arch::store_tag(p.pong, good ? u32(round) : kOver, p.across);
    }
  } else {
    const i32 others = block - (block > p.first) - (block > p.second);  // that come before
    if (others < p.pollers) await(p.ping, u32(last), p.across, end);
  }
}

// Shortest of the reads of each page: the first of them may have to look up its address, and some wait for a refresh.
MONO_PROBE void read_pages(const Probe& p, u32 die) {
  if (arch::fetch_add(&p.claimed[die]) != 0) return;
  float* times = p.times + i64(die) * p.pages;
  const i64 begun = arch::nanoseconds(), end = begun + p.limit;
  const u64 begun_cycles = arch::cycles();
  const i32 step = kPageBytes / 4 / p.lines;
  u32 zero = 0;  // each read waits for the one before
  i64 page = 0;
  for (; page < p.pages && arch::nanoseconds() < end; ++page) {
    u64 least = ~u64(0);
    for (i32 line = 0; line < p.lines; ++line) {
      const u64 before = arch::cycles();
      zero = arch::load(p.memory + page * (kPageBytes / 4) + line * step + zero) & p.none;
      const u64 took = arch::cycles() - before;
      least = took < least ? took : least;
    }
    times[page] = float(least);
  }
  const float nanoseconds = float(arch::nanoseconds() - begun) / float(arch::cycles() - begun_cycles);
  for (i64 i = 0; i < p.pages; ++i) times[i] = page == p.pages ? times[i] * nanoseconds : -1.0f;
}

MONO_PROBE void run(const Probe& p, i32 block) {
  const u32 die = arch::die();
  p.dies[block] = i32(die);
  if (p.pages) {
    read_pages(p, die);
  } else if (p.first >= 0 || p.second >= 0) {
    hand_off(p, block);
  }
}

}  // namespace mono::probe
