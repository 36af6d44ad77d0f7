// What a call may ask for beyond the plain recurrence (csrc/sequence.h, Features), all of it in
// drawn mixtures: every row of a batch gets what it gets alone, in any number of threads, shares of
// the batch and segments. The values themselves are checked in Python, against other
// implementations; here the sanitizers look on. Arrays are of exactly their size, and NaN until
// written.
#include <algorithm>
#include <deque>
#include <numeric>
#include <random>
#include <thread>

#include "check.h"
#include "cpu/engine.h"

namespace rnn_ext {
namespace {

using Array = std::vector<double>;

struct Case {
  CellKind cell;
  int64_t T, B, I, H;
  int D;
  bool lengths, resets, mask, zoneout, norm, cells, reset_before;
  int64_t detach;

  int64_t G() const { return num_gates(cell); }
  bool lstm() const { return cell == CellKind::kLstm; }
};

Case draw(CellKind cell, std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int64_t> from) {
    return *(from.begin() + random() % from.size());
  };
  const auto flip = [&] { return random() % 2 == 0; };
  Case c{cell,
         pick({1, 3, 11, 40}),
         pick({1, 2, 5, 33}),
         pick({1, 4, 19}),
         pick({1, 7, 16, 21}),
         int(pick({1, 2})),
         flip(),
         flip(),
         flip(),
         flip(),
         flip(),
         flip(),
         false,
         pick({0, 0, 1, 4})};
  c.reset_before = cell == CellKind::kGru && !c.norm && flip();
  return c;
}

// Everything a call reads, (rows of the batch) innermost but one.
struct Data {
  std::vector<int64_t> lengths;  // (B)
  std::vector<char> resets;      // (T, B)
  Array x, dy, zoneout_h, zoneout_c, dcells;
  struct Direction {
    Array w_ih, w_hh, b_ih, b_hh, norm_ih, norm_hh, norm_c, norm_c_bias;  // of the layer
    Array h_0, c_0, reset_h, reset_c, mask, dh_n, dc_n;                   // (B, H)
  } directions[kMaxDirections];

  Data(const Case& c, std::mt19937& random) {
    const auto fill = [&](Array& array, int64_t size, double scale = 1) {
      array.resize(size_t(size));
      for (double& a : array) a = scale * (double(random() % 2001) / 1000 - 1);
    };
    const int64_t rows = c.T * c.B, wide = c.D * c.H, gates = c.G() * c.H;
    const double scale = 1 / std::sqrt(double(c.H));
    fill(x, rows * c.I);
    for (Array* a : {&dy, &zoneout_h, &zoneout_c, &dcells}) fill(*a, rows * wide);
    for (Array* a : {&zoneout_h, &zoneout_c})
      for (double& z : *a) z = z > 0.4 ? 1 : 0;
    for (int64_t b = 0; b < c.B; ++b) lengths.push_back(int64_t(random() % uint64_t(c.T + 1)));
    lengths[0] = c.T;  // the engine takes no call without steps
    for (int64_t i = 0; i < rows; ++i) resets.push_back(random() % 5 == 0);
    for (Direction& w : directions) {
      fill(w.w_ih, gates * c.I, scale);
      fill(w.w_hh, gates * c.H, scale);
      for (Array* a : {&w.b_ih, &w.b_hh, &w.norm_ih, &w.norm_hh}) fill(*a, gates);
      for (Array* a : {&w.norm_c, &w.norm_c_bias}) fill(*a, c.H);
      for (Array* a : {&w.h_0, &w.c_0, &w.reset_h, &w.reset_c, &w.mask, &w.dh_n, &w.dc_n})
        fill(*a, c.B * c.H);
    }
  }
};

struct Result {
  Array y, cells, dx;  // (T, B, ...)
  struct Direction {
    Array h_n, c_n, dh_0, dc_0, dreset_h, dreset_c;  // (B, H)
    Array dw_ih, dw_hh, db_ih, db_hh, dnorm_ih, dnorm_hh, dnorm_c, dnorm_c_bias;
  } directions[kMaxDirections];
};

Runner kThreads = [](int members, void (*body)(int, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 1; i < members; ++i) threads.emplace_back(body, i, context);
  body(0, context);
  for (std::thread& t : threads) t.join();
};

struct Memory {
  void* data = nullptr;
  explicit Memory(size_t bytes) {
    if (posix_memalign(&data, 64, bytes) != 0) std::abort();
    std::memset(data, 0xff, bytes);
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
};

// The call for some rows of the batch. `segments`: positions, a whole number of chunks of 2 each.
class Run {
 public:
  Result result;

  Run(const Case& c, const Data& data, std::vector<int64_t> rows, int threads, int64_t segments,
      int64_t shares = 0)
      : c_(c), data_(data), rows_(std::move(rows)), B_(int64_t(rows_.size())), shares_(shares) {
    describe();
    forward(threads, segments);
    backward(threads, segments);
  }

 private:
  const Case& c_;
  const Data& data_;
  std::vector<int64_t> rows_;
  int64_t B_, shares_;
  SequenceShape shape_;
  std::vector<int64_t> order_, batch_sizes_, offsets_;
  std::deque<Array> kept_;
  std::deque<std::vector<char>> flags_;
  ForwardCall<double> call_;
  Array reserve_[kMaxDirections];

  // The rows of a (steps, B, width) array.
  const double* take(const Array& from, int64_t steps, int64_t width) {
    Array to;
    for (int64_t t = 0; t < steps; ++t)
      for (const int64_t b : rows_)
        to.insert(to.end(), from.begin() + (t * c_.B + b) * width,
                  from.begin() + (t * c_.B + b + 1) * width);
    kept_.push_back(std::move(to));
    return kept_.back().data();
  }
  double* make(Array& array, int64_t size) {
    array.assign(size_t(size), std::numeric_limits<double>::quiet_NaN());
    return array.data();
  }
  template <class T>
  StepRows<T> rows(T* data, int64_t width) const {
    return {data, B_ * width, width};
  }

  void describe() {
    shape_ = {c_.cell, c_.T, B_, c_.I, c_.H, 0, c_.D};
    if (c_.lengths) {
      const auto length = [&](int64_t i) { return data_.lengths[size_t(rows_[size_t(i)])]; };
      order_.resize(rows_.size());
      std::iota(order_.begin(), order_.end(), 0);
      std::stable_sort(order_.begin(), order_.end(),
                       [&](int64_t a, int64_t b) { return length(a) > length(b); });
      shape_.steps = length(order_[0]);
      offsets_ = {0};
      for (int64_t t = 0; t < shape_.steps; ++t) {
        batch_sizes_.push_back(
            std::count_if(order_.begin(), order_.end(), [&](int64_t i) { return length(i) > t; }));
        offsets_.push_back(offsets_.back() + batch_sizes_.back());
      }
      shape_.batch_sizes = batch_sizes_.data();
      shape_.offsets = offsets_.data();
      shape_.order = order_.data();
    }
  }

  template <class Call>
  void fill(Call& call) {
    call.shape = shape_;
    call.x = rows(take(data_.x, c_.T, c_.I), c_.I);
    const int64_t wide = c_.D * c_.H;
    Features<double>& f = call.features;
    if (c_.resets) {
      std::vector<char> flags;
      for (int64_t t = 0; t < c_.T; ++t)
        for (const int64_t b : rows_) flags.push_back(data_.resets[size_t(t * c_.B + b)]);
      flags_.push_back(std::move(flags));
      f.resets = {reinterpret_cast<const bool*>(flags_.back().data()), B_, 1};
    }
    if (c_.zoneout) {
      f.zoneout_h = rows(take(data_.zoneout_h, c_.T, wide), wide);
      if (c_.lstm()) f.zoneout_c = rows(take(data_.zoneout_c, c_.T, wide), wide);
    }
    f.detach_steps = c_.detach;
    f.reset_before = c_.reset_before;
    f.norm_eps = 0.01;
    for (int d = 0; d < c_.D; ++d) {
      const Data::Direction& w = data_.directions[d];
      call.weights[d] = {w.w_ih.data(), w.w_hh.data(), w.b_ih.data(), w.b_hh.data(),
                         nullptr,       c_.I,          c_.H,          0};
      call.h_0[d] = take(w.h_0, 1, c_.H);
      if (c_.mask) f.hidden_mask[d] = take(w.mask, 1, c_.H);
      if (c_.norm) f.norm_ih[d] = w.norm_ih.data();
      if (c_.norm) f.norm_hh[d] = w.norm_hh.data();
      if (c_.norm && c_.lstm()) {
        f.norm_c[d] = w.norm_c.data();
        f.norm_c_bias[d] = w.norm_c_bias.data();
      }
      if (c_.resets) {
        f.reset_h[d] = take(w.reset_h, 1, c_.H);
        f.reset_c[d] = take(w.reset_c, 1, c_.H);
      }
    }
  }

  template <class Call>
  Plan plan(const Call& call, bool backward, int threads) const {
    Plan plan = plan_call<double>(call.shape, backward, 1, false, call.features.two_parts());
    plan.threads = threads;
    plan.shares = shares_;
    plan.chunk_steps = 2;
    plan.packed_weights = plan.packed_recurrent = true;
    // Several blocks of few rows, dealt out where these end one by one; of every other length all
    // steps project their own input.
    plan.row_block = 4;
    plan.deal_rows = call.shape.batch_sizes && B_ > plan.row_block;
    if (!backward) plan.project_in_step_rows = c_.T % 2 ? 0 : INT64_MAX;
    if (!backward) plan.own_weights = shares_ > 1 && !call.features.two_parts();
    return plan;
  }
  static void run_forward(const ForwardCall<double>& call, const Plan& plan) {
    const Memory workspace(workspace_bytes(call, plan));
    run(call, plan, workspace.data, kThreads);
  }

  std::vector<std::pair<Array, Array>> starts_[kMaxDirections];  // of the segments: h, c

  void forward(int threads, int64_t segments) {
    const int64_t wide = c_.D * c_.H;
    fill(call_);
    call_.y = rows(make(result.y, c_.T * B_ * wide), wide);
    if (c_.cells && c_.lstm()) call_.cells = rows(make(result.cells, c_.T * B_ * wide), wide);
    const int64_t kept = call_.features.kept(c_.cell);
    for (int d = 0; d < c_.D; ++d) {
      auto& to = result.directions[d];
      if (c_.lstm()) call_.c_0[d] = take(data_.directions[d].c_0, 1, c_.H);
      call_.h_n[d] = make(to.h_n, B_ * c_.H);
      if (c_.lstm()) call_.c_n[d] = make(to.c_n, B_ * c_.H);
      if (kept > 0 && segments == 0)
        call_.reserve[d] = make(reserve_[d], shape_.rows() * kept * padded(c_.H));
    }
    if (segments == 0) return run_forward(call_, plan(call_, false, threads));
    ForwardCall<double> part = call_;
    for (int64_t first = 0; first < shape_.steps; first += segments) {
      part.features.first_position = first;
      part.features.last_position = first + segments;
      for (int d = 0; d < c_.D; ++d) {
        auto& to = result.directions[d];
        starts_[d].emplace_back(
            first ? to.h_n : Array(part.h_0[d], part.h_0[d] + B_ * c_.H),
            c_.lstm() ? first ? to.c_n : Array(part.c_0[d], part.c_0[d] + B_ * c_.H) : Array());
        part.h_0[d] = starts_[d].back().first.data();
        if (c_.lstm()) part.c_0[d] = starts_[d].back().second.data();
        part.h_n[d] = make(to.h_n, B_ * c_.H);
        if (c_.lstm()) part.c_n[d] = make(to.c_n, B_ * c_.H);
      }
      run_forward(part, plan(part, false, threads));
      for (auto& starts : starts_)  // growing moves the pairs, not what they hold
        for (auto& start : starts) CHECK(!start.first.empty());
    }
  }

  void backward(int threads, int64_t segments) {
    const int64_t wide = c_.D * c_.H, gates = c_.G() * c_.H, T = c_.T;
    BackwardCall<double> call;
    fill(call);
    call.y = rows(static_cast<const double*>(result.y.data()), wide);
    call.dy = rows(take(data_.dy, T, wide), wide);
    call.dx = rows(make(result.dx, T * B_ * c_.I), c_.I);
    if (c_.cells && c_.lstm()) call.dcells = rows(take(data_.dcells, T, wide), wide);
    for (int d = 0; d < c_.D; ++d) {
      auto& to = result.directions[d];
      const bool lstm = c_.lstm(), norm = c_.norm;
      call.dh_n[d] = take(data_.directions[d].dh_n, 1, c_.H);
      if (lstm) call.dc_n[d] = take(data_.directions[d].dc_n, 1, c_.H);
      call.reserve[d] = reserve_[d].data();
      call.gradients[d] = {make(to.dw_ih, gates * c_.I),
                           make(to.dw_hh, gates * c_.H),
                           make(to.db_ih, gates),
                           make(to.db_hh, gates),
                           nullptr,
                           make(to.dh_0, B_ * c_.H),
                           lstm ? make(to.dc_0, B_ * c_.H) : nullptr,
                           c_.resets ? make(to.dreset_h, B_ * c_.H) : nullptr,
                           c_.resets && lstm ? make(to.dreset_c, B_ * c_.H) : nullptr,
                           norm ? make(to.dnorm_ih, gates) : nullptr,
                           norm ? make(to.dnorm_hh, gates) : nullptr,
                           norm && lstm ? make(to.dnorm_c, c_.H) : nullptr,
                           norm && lstm ? make(to.dnorm_c_bias, c_.H) : nullptr};
    }
    const Plan backward_plan = plan(call, true, threads);
    const Memory workspace(workspace_bytes(call, backward_plan));
    if (segments == 0) return run(call, backward_plan, workspace.data, kThreads);
    const int64_t steps = shape_.steps, kept = call.features.kept(c_.cell);
    ForwardCall<double> again = call_;
    Array y;
    again.y = {make(y, B_ * wide), 0, wide};
    again.features.again = true;
    again.cells = {};
    for (int64_t first = (steps - 1) / segments * segments; first >= 0; first -= segments) {
      const int64_t last = std::min(first + segments, steps);
      again.features.first_position = first;
      again.features.last_position = last;
      for (int d = 0; d < c_.D; ++d) {
        auto& start = starts_[d][size_t(first / segments)];
        again.h_0[d] = start.first.data();
        if (c_.lstm()) again.c_0[d] = start.second.data();
        again.h_n[d] = again.c_n[d] = nullptr;
        const int64_t begin = d == 0 ? first : steps - last;
        const int64_t count = shape_.first_row(begin + last - first) - shape_.first_row(begin);
        again.reserve[d] = kept > 0 ? make(reserve_[d], count * kept * padded(c_.H)) : nullptr;
        again.reserve_first_row[d] = call.reserve_first_row[d] = shape_.first_row(begin);
        call.reserve[d] = again.reserve[d];
      }
      run_forward(again, plan(again, false, threads));
      run(call, backward_plan, workspace.data, kThreads, steps - last, steps - first);
    }
  }
};

// Calls visit(name, a, b, width, whether a row of the batch is in it).
template <class Visit>
void for_arrays(const Case& c, const Result& a, const Result& b, Visit&& visit) {
  visit("y", a.y, b.y, c.D * c.H, true);
  visit("cells", a.cells, b.cells, c.D * c.H, true);
  visit("dx", a.dx, b.dx, c.I, true);
  for (int d = 0; d < c.D; ++d) {
    const auto &p = a.directions[d], &q = b.directions[d];
    visit("h_n", p.h_n, q.h_n, c.H, true);
    visit("c_n", p.c_n, q.c_n, c.H, true);
    visit("dh_0", p.dh_0, q.dh_0, c.H, true);
    visit("dc_0", p.dc_0, q.dc_0, c.H, true);
    visit("dreset_h", p.dreset_h, q.dreset_h, c.H, true);
    visit("dreset_c", p.dreset_c, q.dreset_c, c.H, true);
    visit("dw_ih", p.dw_ih, q.dw_ih, 0, false);
    visit("dw_hh", p.dw_hh, q.dw_hh, 0, false);
    visit("db_ih", p.db_ih, q.db_ih, 0, false);
    visit("db_hh", p.db_hh, q.db_hh, 0, false);
    visit("dnorm_ih", p.dnorm_ih, q.dnorm_ih, 0, false);
    visit("dnorm_hh", p.dnorm_hh, q.dnorm_hh, 0, false);
    visit("dnorm_c", p.dnorm_c, q.dnorm_c, 0, false);
    visit("dnorm_c_bias", p.dnorm_c_bias, q.dnorm_c_bias, 0, false);
  }
}

std::vector<int64_t> all_rows(const Case& c) {
  std::vector<int64_t> rows(size_t(c.B));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

template <class Check>
void for_cases(int count, Check&& check) {
  for (int cell = 0; cell < kNumCellKinds; ++cell) {
    std::mt19937 random{unsigned(cell + 1)};
    for (int i = 0; i < count; ++i) {
      const Case c = draw(CellKind(cell), random);
      const Data data(c, random);
      check::Scope scope("cell ", cell, " case ", i, " T", c.T, " B", c.B, " I", c.I, " H", c.H,
                         " D", c.D);
      check(c, data);
    }
  }
}

TEST(a_row_gets_what_it_gets_alone) {
  for_cases(25, [](const Case& c, const Data& data) {
    const Result whole = Run(c, data, all_rows(c), 1, 0).result;
    std::vector<Array> sums;
    for (int64_t b = 0; b < c.B; ++b) {
      const int64_t length = c.lengths ? data.lengths[size_t(b)] : c.T;
      if (length == 0) continue;
      const Result alone = Run(c, data, {b}, 1, 0).result;
      size_t next = 0;
      for_arrays(
          c, whole, alone,
          [&](const char* name, const Array& all, const Array& own, int64_t width, bool by_row) {
            if (!by_row) {
              if (sums.size() <= next) sums.emplace_back(own.size());
              Array& sum = sums[next++];
              for (size_t i = 0; i < own.size(); ++i) sum[i] += own[i];
              return;
            }
            const int64_t steps = own.empty() ? 0 : int64_t(own.size()) / width;
            for (int64_t t = 0; t < std::min(steps, length); ++t)
              for (int64_t i = 0; i < width; ++i) {
                check::Scope scope(name, " row ", b, " step ", t);
                // Sums of some hundred terms of order one, in another order.
                CHECK_NEAR(all[size_t((t * c.B + b) * width + i)], own[size_t(t * width + i)],
                           1e-11);
              }
          });
    }
    size_t next = 0;
    for_arrays(c, whole, whole,
               [&](const char* name, const Array& all, const Array&, int64_t, bool by_row) {
                 if (by_row || sums.empty()) return;
                 check::Scope scope(name);
                 const Array& sum = sums[next++];
                 for (size_t i = 0; i < all.size(); ++i) CHECK_NEAR(all[i], sum[i], 1e-10);
               });
  });
}

void check_same_bits(const Case& c, const Result& a, const Result& b) {
  for_arrays(c, a, b, [](const char* name, const Array& x, const Array& y, int64_t, bool) {
    check::Scope scope(name);
    CHECK(x.size() == y.size() &&
          (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0));
  });
}

TEST(threads_shares_and_segments_do_not_change_a_bit) {
  for_cases(25, [](const Case& c, const Data& data) {
    const Result plain = Run(c, data, all_rows(c), 1, 0).result;
    check_same_bits(c, plain, Run(c, data, all_rows(c), 3, 0).result);
    check_same_bits(c, plain, Run(c, data, all_rows(c), 1, 2).result);
    check_same_bits(c, plain, Run(c, data, all_rows(c), 2, 6).result);
    check_same_bits(c, plain, Run(c, data, all_rows(c), 2, 6, 2).result);
  });
}

}  // namespace
}  // namespace rnn_ext
