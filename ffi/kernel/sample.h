// From logits to the next token, the same on every device.
//
// Sampling is an argmax of score + Gumbel noise, which needs no order: every block reports the best of its own rows, and
// all blocks agree on the best of all. Filters that need the whole distribution (top-k, top-p, min-p) and reports of
// alternatives take one more step: the logits travel to all devices and block 0 of each makes the same choice.
#pragma once

#include "kernel/head.h"
#include "kernel/random.h"
#include "kernel/select.h"

namespace mono::MONO_VARIANT {

constexpr float kHighestScore = 3.0e38f;  // finite

// What a block reports of its vocabulary rows, as the payload of a run; SUMMARY_VALUES in jax_mono/handoffs.py.
enum SummaryValue {
  kScoreBits,    // of its best candidate
  kToken,        // the candidate's id, -1 for none
  kLogitBits,    // its unmodified logit
  kMaximumBits,  // max of the block's logits; NaN if one is not finite
  kSumBits,      // sum of exp(logit - max) in kMassScale
  kSignal,       // from block 0 of device 0: 1 + Finish if the host wants the call to end
  kSummaryValues
};
constexpr i32 kSummaryWords = words_for(kSummaryValues, kFloatsPerWord), kChoiceWords = words_for(2, kFloatsPerWord);

struct Choice {
  i32 token = -1;  // -1: the logits are not finite
  float logprob = 0.0f;
  u32 signal = 0;
};

template <class T>
MONO_DEVICE bool needs_all_logits(const BlockState<T>& s) {
  const Request& r = s.call.request;
  if (r.top_n > 0) return true;
  if (r.mode != kGenerate || r.temperature == 0.0f) return false;
  return (r.top_k > 0 && r.top_k < s.header.vocab_size) || r.top_p < 1.0f || r.min_p > 0.0f;
}

// Remembers tokens for the repetition penalty; padding is negative. The next barrier of the block makes them visible.
template <class T>
MONO_DEVICE void mark_seen(BlockState<T>& s, const i32* tokens, i32 count) {
  if (s.call.request.repetition_penalty == 1.0f) return;
  arch::for_each(count, [&](i32 i) {
    if (tokens[i] >= 0) arch::set_bits(s.scratch.seen + (tokens[i] >> 5), 1u << (tokens[i] & 31));
  });
}

// The logit after repetition penalty (Keskar et al., CTRL, 2019) and temperature. Kept finite: options that go beyond
// float32 make scores equal, not useless.
template <class T>
MONO_DEVICE float adjusted(const BlockState<T>& s, i32 token, float logit) {
  const Request& r = s.call.request;
  if (r.repetition_penalty != 1.0f && ((s.scratch.seen[token >> 5] >> (token & 31)) & 1u))
    logit = logit > 0.0f ? logit / r.repetition_penalty : logit * r.repetition_penalty;
  if (r.temperature > 0.0f) logit = logit / r.temperature;
  if (logit > kHighestScore) return kHighestScore;
  return logit < -kHighestScore ? -kHighestScore : logit;
}

// Best of a set of candidates. Ties, which scores at the limit of float32 may be, go to the higher logit, then to the lower
// token.
struct Best {
  float score = -kInfinity;
  i32 token = -1;
  float logit = 0.0f;

  MONO_DEVICE void offer(const Best& other) {
    if (other.token < 0) return;
    const bool ahead = other.logit > logit || (other.logit == logit && other.token < token);
    if (token < 0 || other.score > score || (other.score == score && ahead)) *this = other;
  }
};
struct BetterOf {
  MONO_DEVICE Best operator()(Best a, const Best& b) const {
    a.offer(b);
    return a;
  }
};

// Noise per token id, drawn four at a time.
struct Noise {
  const Request& request;
  i32 position, group = -1;
  Random4 random{};

  MONO_DEVICE float operator()(i32 token) {
    if (request.temperature == 0.0f) return 0.0f;
    if (group != token >> 2) {
      group = token >> 2;
      random = philox(request.seed[0], request.seed[1], u32(group), u32(position), 0, 0);
    }
    u32 bits = 0;
    for (i32 k = 0; k < 4; ++k)  // no variable index: the words stay in registers
      if (k == (token & 3)) bits = random.word[k];
    return gumbel(bits);
  }
};

// What is known of some logits: the best candidate, the maximum, whether all are finite; and of the host's wish.
struct Findings {
  Best best;
  float maximum = -kInfinity;
  i32 finite = 1;
  u32 signal = 0;

  MONO_DEVICE void merge(const Findings& other) {
    best.offer(other.best);
    maximum = other.maximum > maximum ? other.maximum : maximum;
    finite &= other.finite;
    signal = other.signal > signal ? other.signal : signal;
  }
};
struct Merged {
  MONO_DEVICE Findings operator()(Findings a, const Findings& b) const {
    a.merge(b);
    return a;
  }
};

// `sampling`: whether the head stage has run; `target`: scoring, the token whose log-probability is wanted (-1 for none);
// `signal` counts from whichever thread has it.
template <class T>
MONO_DEVICE void publish_summary(BlockState<T>& s, i32 position, bool sampling, i32 target, u32 signal) {
  const Request& request = s.call.request;
  Findings found;
  found.signal = signal;
  Noise noise{request, position};
  if (sampling) for_own_logits(s, [&](i32 token, float logit) {
    if (logit - logit != 0.0f) found.finite = 0;
    found.maximum = logit > found.maximum ? logit : found.maximum;
    if (request.mode == kScore) {
      if (token == target) found.best.offer({0.0f, token, logit});
    } else {
      found.best.offer({adjusted(s, token, logit) + noise(token), token, logit});
    }
  });
  found = arch::all_reduce(found, Merged{});
  u64 sum = 0;
  if (sampling) for_own_logits(s, [&](i32, float logit) { sum += mass(logit - found.maximum); });
  sum = arch::all_reduce(sum, [](u64 a, u64 b) { return a + b; });
  if (!found.finite) found.maximum = arch::bits_float(0x7fc00000u);
  const u32 values[kSummaryValues] = {arch::float_bits(found.best.score),   u32(found.best.token),
                                      arch::float_bits(found.best.logit),   arch::float_bits(found.maximum),
                                      arch::float_bits(float(sum)), found.signal};
  const i64 length = i64(s.header.num_devices) * s.header.num_blocks * kSummaryWords;
  const i64 own = (i64(s.device_index) * s.header.num_blocks + s.block_index) * kSummaryWords;
  const u32 tag = s.link.out_tag(kSummary, 0);
  // A thread has one word of one copy; all threads write to the same device at a time.
  arch::for_each(s.header.num_dies * kSummaryWords, [&](i32 i) {
    const i32 copy = i / kSummaryWords, w = i - copy * kSummaryWords;
    u32 payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      payload[k] = 0;
      for (i32 v = 0; v < kSummaryValues; ++v)  // no variable index: the values stay in registers
        if (v == w * kFloatsPerWord + k) payload[k] = values[v];
    }
    const arch::Word word = arch::pack(tag, payload);
    MONO_ROLLED
    for (i32 peer = 0; peer < s.header.num_devices; ++peer)
      arch::store_word(s.turn_words(peer, s.scratch.channels[peer].summary, length) + own + copy * s.header.copy_words + w, word);
  });
  if (!sampling || !needs_all_logits(s)) return;
  const u32 logits_tag = s.link.out_tag(kLogits, 0);
  const i32 run = s.header.logits_run, rows = s.share.shares[kHead].count * arch::kTileRows;
  const i64 all = i64(s.header.num_devices) * s.header.num_blocks * run;
  MONO_ROLLED
  for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
    arch::Word* to = s.turn_words(peer, s.scratch.channels[peer].logits, all);
    const i64 logits_at = (i64(s.device_index) * s.header.num_blocks + s.block_index) * run;
    publish_run(s.header, Blocks::kOfAll, to + logits_at, run, logits_tag, rows, [&](i32 i) { return s.scratch.rows[i]; });
  }
}

// A sum of exponentials relative to one maximum, as one relative to another that is not smaller.
MONO_DEVICE float below(float sum, float maximum, float highest) {
  return sum > 0.0f ? sum * exp_below(maximum - highest) : 0.0f;
}

// Reads all summaries: the best candidate, and log-sum-exp of all logits.
template <class T>
MONO_DEVICE Choice read_summaries(BlockState<T>& s, float& log_sum) {
  const i32 blocks = s.header.num_devices * s.header.num_blocks;
  const arch::Word* from =
      s.own_copy(s.turn_words(s.device_index, s.device.channels.summary, i64(blocks) * kSummaryWords));
  Findings all;
  float sum = 0.0f;  // relative to the maximum of those that this thread has read
  arch::for_each(blocks, [&](i32 b) {
    arch::Word words[kSummaryWords];
    u32 values[kSummaryWords * kFloatsPerWord];
    for (i32 w = 0; w < kSummaryWords; ++w) words[w] = arch::load_word(from + b * kSummaryWords + w, writers(kSummary));
    for (i32 w = 0; w < kSummaryWords; ++w) {
      u32 payload[kFloatsPerWord];
      arch::unpack(s.link.confirm(words[w], from + b * kSummaryWords + w, kSummary, 0), payload);
      for (i32 k = 0; k < kFloatsPerWord; ++k) values[w * kFloatsPerWord + k] = payload[k];
    }
    const float maximum = arch::bits_float(values[kMaximumBits]), before = all.maximum;
    all.merge({{arch::bits_float(values[kScoreBits]), i32(values[kToken]), arch::bits_float(values[kLogitBits])},
               maximum, maximum == maximum, values[kSignal]});
    sum = below(sum, before, all.maximum) + below(arch::bits_float(values[kSumBits]), maximum, all.maximum);
  });
  const float own_maximum = all.maximum;
  all = arch::all_reduce(all, Merged{});
  sum = arch::all_reduce(below(sum, own_maximum, all.maximum), [](float a, float b) { return a + b; });
  log_sum = all.maximum + log(sum * (1.0f / kMassScale));
  Choice choice;
  choice.token = all.finite ? all.best.token : -1;
  choice.logprob = all.best.logit - log_sum;
  choice.signal = all.finite ? all.signal : 1 + kNotFinite;
  return choice;
}

// The most likely alternatives, best first; equal logits in order of their ids.
template <class T>
MONO_DEVICE void report_alternatives(BlockState<T>& s, i32 step, float log_sum) {
  const i32 n = s.call.request.top_n;
  Best last;
  MONO_ROLLED
  for (i32 k = 0; k < n; ++k) {
    Best best;
    arch::for_each(s.header.vocab_size, [&](i32 token) {
      const float logit = s.scratch.logits[token];
      const bool reported = k > 0 && (logit > last.score || (logit == last.score && token <= last.token));
      if (!reported) best.offer({logit, token, logit});
    });
    last = arch::all_reduce(best, BetterOf{});
    if (arch::thread() == 0) {
      s.call.outputs.top_ids[i64(step) * n + k] = last.token;
      s.call.outputs.top_logprobs[i64(step) * n + k] = last.logit - log_sum;
    }
  }
}

// Receives all logits into scratch.logits.
template <class T>
MONO_DEVICE void read_logits(BlockState<T>& s) {
  const i32 run = s.header.logits_run, blocks = s.header.num_blocks;
  const i32 words = s.header.num_devices * blocks * run;
  const arch::Word* from = s.turn_words(s.device_index, s.device.channels.logits, words);
  s.link.read(
      words, kLogits, 0, [&](i32 i) { return from + i; },
      [&](i32 i, const arch::Word& word) {
        const i32 writer = i / run, first = (i - writer * run) * kFloatsPerWord;
        const Device& device = s.call.plan.devices[writer / blocks];
        const Block& block = s.call.plan.block(writer / blocks, writer % blocks);
        float values[kFloatsPerWord];
        arch::unpack(word, values);
        for (i32 k = 0; k < kFloatsPerWord && first + k < block.shares[kHead].count * arch::kTileRows; ++k) {
          const i32 token = token_of(device, block, first + k);
          if (token >= 0) s.scratch.logits[token] = values[k];
        }
      });
  arch::sync();
}

// Block 0, with all logits at hand: filters, chooses, tells the other blocks of its device.
template <class T>
MONO_DEVICE Choice choose_from_all(BlockState<T>& s, i32 step, i32 position) {
  const Request& request = s.call.request;
  const i32 vocab = s.header.vocab_size;
  float log_sum;
  Choice choice = read_summaries(s, log_sum);
  read_logits(s);
  if (request.top_n > 0) report_alternatives(s, step, log_sum);
  if (request.mode == kGenerate && choice.token >= 0) {
    float* scores = s.scratch.scores;
    arch::for_each(vocab, [&](i32 token) { scores[token] = adjusted(s, token, s.scratch.logits[token]); });
    arch::sync();
    float lowest = -kInfinity;
    if (request.temperature > 0.0f)
      lowest = selection_threshold(scores, vocab, Filter{request.top_k, request.top_p, request.min_p}, s.scratch.work.bins);
    Best best;
    Noise noise{request, position};
    arch::for_each(vocab, [&](i32 token) {
      if (scores[token] >= lowest) best.offer({scores[token] + noise(token), token, s.scratch.logits[token]});
    });
    best = arch::all_reduce(best, BetterOf{});
    choice.token = best.token;
    choice.logprob = best.logit - log_sum;
  }
  arch::Word* to = s.turn_words(s.device_index, s.device.channels.choice, kChoiceWords);
  const u32 tag = s.link.out_tag(kChoice, 0);
  arch::for_each(kChoiceWords, [&](i32 w) {
    u32 payload[kFloatsPerWord];
    for (i32 k = 0; k < kFloatsPerWord; ++k) {
      const i32 v = w * kFloatsPerWord + k;
      payload[k] = v == 0 ? u32(choice.token) : v == 1 ? choice.signal : 0;
    }
    publish(s.header, Blocks::kOfDevice, to + w, arch::pack(tag, payload));
  });
  return choice;
}

template <class T>
MONO_DEVICE Choice sample_stage(BlockState<T>& s, bool sampling, i32 step, i32 position) {
  if (!sampling || !needs_all_logits(s)) {
    float log_sum;
    return read_summaries(s, log_sum);
  }
  if (s.block_index == 0) return choose_from_all(s, step, position);
  const arch::Word* from = s.own_copy(s.turn_words(s.device_index, s.device.channels.choice, kChoiceWords));
  u32 values[kChoiceWords * kFloatsPerWord];
  for (i32 w = 0; w < kChoiceWords; ++w) {
    u32 payload[kFloatsPerWord];
    arch::unpack(s.link.wait(from + w, kChoice, 0), payload);
    for (i32 k = 0; k < kFloatsPerWord; ++k) values[w * kFloatsPerWord + k] = payload[k];
  }
  Choice choice;  // the log-probability is reported by block 0 alone
  choice.token = i32(values[0]);
  choice.signal = values[1];
  return choice;
}

}  // namespace mono::MONO_VARIANT
