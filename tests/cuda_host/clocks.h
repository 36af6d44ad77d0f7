// Vector clocks. A thread's own time advances when it publishes something; what it knows of the
// others is shared between all that left the same barrier.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace rnn_ext::cuda::host {

using Clock = std::vector<uint32_t>;               // by thread of the launch
using SharedClock = std::shared_ptr<const Clock>;  // null: all zeros

inline void join(Clock& into, const SharedClock& other) {
  if (!other) return;
  if (into.size() < other->size()) into.resize(other->size());
  for (size_t i = 0; i < other->size(); ++i) into[i] = std::max(into[i], (*other)[i]);
}

struct ThreadClock {
  uint32_t self = 0;   // this thread's index
  uint32_t time = 1;   // stamps its accesses
  SharedClock others;  // accesses up to these times happened before
  SharedClock fenced;  // what a relaxed store publishes: all before the last fence
  SharedClock loaded;  // what relaxed loads have seen: acquired by the next fence

  bool knows(uint32_t thread, uint32_t at) const {
    return thread == self || (others && thread < others->size() && at <= (*others)[thread]);
  }
  // Everything that happened before now, own accesses included.
  SharedClock snapshot(size_t threads) {
    auto all = std::make_shared<Clock>(threads);
    join(*all, others);
    (*all)[self] = time++;
    return all;
  }
  void acquire(const SharedClock& published) {
    if (!published || published == others) return;
    auto all = others ? std::make_shared<Clock>(*others) : std::make_shared<Clock>();
    join(*all, published);
    others = all;
  }
  // One clock for all of `members`, who have met.
  template <class Range>
  static void meet(const Range& members, size_t threads) {
    auto all = std::make_shared<Clock>(threads);
    SharedClock last;
    for (ThreadClock* member : members) {
      if (member->others != last) join(*all, member->others);
      last = member->others;
    }
    for (ThreadClock* member : members) (*all)[member->self] = member->time++;
    for (ThreadClock* member : members) member->others = all;
  }
};

}  // namespace rnn_ext::cuda::host
