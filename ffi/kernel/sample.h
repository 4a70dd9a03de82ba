// From logits to the next token, the same on every device.
//
// Sampling is an argmax of score + Gumbel noise, which needs no order: every block reports the best of its own rows, and
// all blocks agree on the best of all. Filters that need the whole distribution (top-k, top-p, min-p) and reports of
// alternatives take one more step: the logits travel to all devices and block 0 of each makes the same choice.
#pragma once

#include "head.h"
#include "random.h"
#include "select.h"

namespace mono::MONO_VARIANT {

// Six words per block; SUMMARY_WORDS in jax_mono/handoffs.py.
struct Summary {
  float score;         // of the block's best candidate
  i32 token;           // its id, -1 for none
  float logit;         // its unmodified logit
  float maximum, sum;  // of the block's logits: max and sum of exp(logit - max); NaN if one is not finite
  u32 signal;          // from block 0 of device 0: 1 + Finish if the host wants the call to end
};
constexpr i32 kSummaryWords = 6, kChoiceWords = 2;

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

template <class T>
MONO_DEVICE void mark_seen(BlockState<T>& s, i32 token) {
  s.scratch.seen[token >> 5] |= 1u << (token & 31);
}

// The logit after repetition penalty (Keskar et al., CTRL, 2019) and temperature.
template <class T>
MONO_DEVICE float adjusted(const BlockState<T>& s, i32 token, float logit) {
  const Request& r = s.call.request;
  if (r.repetition_penalty != 1.0f && ((s.scratch.seen[token >> 5] >> (token & 31)) & 1u))
    logit = logit > 0.0f ? logit / r.repetition_penalty : logit * r.repetition_penalty;
  return r.temperature > 0.0f ? logit / r.temperature : logit;
}

// Best of a stream of candidates; ties go to the lower token.
struct Best {
  float score = -kInfinity;
  i32 token = -1;
  float logit = 0.0f;

  MONO_DEVICE void offer(float new_score, i32 new_token, float new_logit) {
    if (new_score > score || (new_score == score && token >= 0 && new_token < token)) {
      score = new_score;
      token = new_token;
      logit = new_logit;
    }
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
    return gumbel(random.word[token & 3]);
  }
};

// `target`: scoring, the token whose log-probability is wanted (-1 for none).
template <class T>
MONO_DEVICE void publish_summary(BlockState<T>& s, i32 position, i32 target, u32 signal) {
  const Request& request = s.call.request;
  Best best;
  Noise noise{request, position};
  float maximum = -kInfinity;
  bool finite = true;
  for_own_logits(s, [&](i32 token, float logit) {
    finite = finite && logit - logit == 0.0f;
    maximum = logit > maximum ? logit : maximum;
    if (request.mode == kScore) {
      if (token == target) best.offer(0.0f, token, logit);
    } else {
      best.offer(adjusted(s, token, logit) + noise(token), token, logit);
    }
  });
  u64 sum = 0;
  for_own_logits(s, [&](i32, float logit) { sum += mass(logit - maximum); });
  if (!finite) maximum = __builtin_nanf("");
  u32 payload[kSummaryWords] = {arch::float_bits(best.score), u32(best.token),
                                arch::float_bits(best.logit), arch::float_bits(maximum),
                                arch::float_bits(float(sum)), signal};
  const i64 length = i64(s.header.num_devices) * s.header.num_blocks * kSummaryWords;
  const i64 own = (i64(s.device_index) * s.header.num_blocks + s.block_index) * kSummaryWords;
  const u32 tag = s.link.out_tag(kSummary, 0);
  for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
    arch::Word* to = s.turn_words(peer, s.call.plan.devices[peer].channels.summary, length) + own;
    for (i32 i = 0; i < kSummaryWords; ++i) arch::store_word(to + i, make_word(tag, payload[i]));
  }
  if (!needs_all_logits(s)) return;
  const u32 logits_tag = s.link.out_tag(kLogits, 0);
  for (i32 peer = 0; peer < s.header.num_devices; ++peer) {
    arch::Word* to = s.turn_words(peer, s.call.plan.devices[peer].channels.logits, s.header.vocab_size);
    for_own_logits(s, [&](i32 token, float logit) { publish(to + token, logits_tag, logit); });
  }
}

// Reads all summaries: the best candidate, and log-sum-exp of all logits.
template <class T>
MONO_DEVICE Choice read_summaries(BlockState<T>& s, float& log_sum) {
  const i32 blocks = s.header.num_devices * s.header.num_blocks;
  const arch::Word* from = s.turn_words(s.device_index, s.device.channels.summary, i64(blocks) * kSummaryWords);
  Best best;
  Choice choice;
  float maximum = -kInfinity, sum = 0.0f;
  bool finite = true;
  for (i32 b = 0; b < blocks; ++b) {
    u32 payload[kSummaryWords];
    for (i32 i = 0; i < kSummaryWords; ++i)
      payload[i] = s.link.wait(from + i64(b) * kSummaryWords + i, kSummary, 0);
    float block_max = arch::bits_float(payload[3]), block_sum = arch::bits_float(payload[4]);
    if (i32(payload[1]) >= 0) best.offer(arch::bits_float(payload[0]), i32(payload[1]), arch::bits_float(payload[2]));
    if (block_max != block_max) finite = false;
    if (block_max > maximum) {
      sum *= exp(maximum - block_max);
      maximum = block_max;
    }
    if (block_sum > 0.0f) sum += block_sum * exp(block_max - maximum);
    if (payload[5] > choice.signal) choice.signal = payload[5];
  }
  log_sum = maximum + log(sum * (1.0f / kMassScale));
  choice.token = finite ? best.token : -1;
  choice.logprob = best.logit - log_sum;
  if (!finite) choice.signal = 1 + kNotFinite;
  return choice;
}

// The most likely alternatives, best first; equal logits in order of their ids.
template <class T>
MONO_DEVICE void report_alternatives(BlockState<T>& s, i32 step, float log_sum) {
  const i32 n = s.call.request.top_n;
  i32* ids = s.call.outputs.top_ids + i64(step) * n;
  float* logprobs = s.call.outputs.top_logprobs + i64(step) * n;
  for (i32 k = 0; k < n; ++k) {
    Best best;
    for (i32 token = 0; token < s.header.vocab_size; ++token) {
      float logit = s.scratch.logits[token];
      bool reported = k > 0 && (logit > logprobs[k - 1] || (logit == logprobs[k - 1] && token <= ids[k - 1]));
      if (!reported) best.offer(logit, token, logit);
    }
    ids[k] = best.token;
    logprobs[k] = best.logit;
  }
  for (i32 k = 0; k < n; ++k) logprobs[k] -= log_sum;
}

// Block 0, with all logits at hand: filters, chooses, tells the other blocks of its device.
template <class T>
MONO_DEVICE Choice choose_from_all(BlockState<T>& s, i32 step, i32 position) {
  const Request& request = s.call.request;
  const i32 vocab = s.header.vocab_size;
  float log_sum;
  Choice choice = read_summaries(s, log_sum);
  const arch::Word* from = s.turn_words(s.device_index, s.device.channels.logits, vocab);
  s.link.read(from, vocab, kLogits, 0, [&](i64 i, float value) { s.scratch.logits[i] = value; });
  if (s.link.failed) return choice;
  if (request.top_n > 0) report_alternatives(s, step, log_sum);
  if (request.mode == kGenerate && choice.token >= 0) {
    float* scores = s.scratch.scores;
    for (i32 token = 0; token < vocab; ++token) scores[token] = adjusted(s, token, s.scratch.logits[token]);
    float lowest = -kInfinity;
    if (request.temperature > 0.0f)
      lowest = selection_threshold(scores, vocab, Filter{request.top_k, request.top_p, request.min_p});
    Best best;
    Noise noise{request, position};
    for (i32 token = 0; token < vocab; ++token)
      if (scores[token] >= lowest) best.offer(scores[token] + noise(token), token, s.scratch.logits[token]);
    choice.token = best.token;
    choice.logprob = best.logit - log_sum;
  }
  arch::Word* to = s.turn_words(s.device_index, s.device.channels.choice, kChoiceWords);
  const u32 tag = s.link.out_tag(kChoice, 0);
  arch::store_word(to, make_word(tag, u32(choice.token)));
  arch::store_word(to + 1, make_word(tag, choice.signal));
  return choice;
}

template <class T>
MONO_DEVICE Choice sample_stage(BlockState<T>& s, i32 step, i32 position) {
  if (!needs_all_logits(s)) {
    float log_sum;
    return read_summaries(s, log_sum);
  }
  if (s.block_index == 0) return choose_from_all(s, step, position);
  const arch::Word* from = s.turn_words(s.device_index, s.device.channels.choice, kChoiceWords);
  Choice choice;  // the log-probability is reported by block 0 alone
  choice.token = i32(s.link.wait(from, kChoice, 0));
  choice.signal = s.link.wait(from + 1, kChoice, 0);
  return choice;
}

}  // namespace mono::MONO_VARIANT
