// One layer the slow way: loops over scalars in double, step by step, and backward through time by
// the chain rule. Nothing is shared with the engine but the struct of sizes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "sequence.h"

namespace rnn_ext::testing {

using Array = std::vector<double>;  // dense, row-major; empty means absent

struct Layer {
  struct Direction {
    Array w_ih, w_hh, b_ih, b_hh, w_hr;  // (G*H, I), (G*H, R), (G*H), (G*H), (P, H)
    Array h_0, c_0, dh_n, dc_n;          // (B, R), (B, H), (B, R), (B, H)
  };
  SequenceShape shape;
  bool linear = false;
  // What becomes of both operands of a product with w_hh before they are multiplied; null: nothing.
  double (*recurrent_operand)(double) = nullptr;
  Array x, dy;  // (N, I), (N, D*R)
  Direction directions[kMaxDirections];
};

struct Outputs {
  Array y;                                         // (N, D*R)
  Array h_n[kMaxDirections], c_n[kMaxDirections];  // (B, R), (B, H)
};

struct Gradients {
  struct Direction {
    Array w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0;  // as in Layer
  };
  Array dx;  // (N, I)
  Direction directions[kMaxDirections];
};

class Reference {
 public:
  Outputs outputs;
  // The smallest |pre-activation|: with relu, how near a rounding is to another derivative.
  double nearest_kink = std::numeric_limits<double>::infinity();

  explicit Reference(const Layer& layer) : layer_(layer), s_(layer.shape) {
    outputs.y.assign(size_t(s_.rows() * s_.directions * R_), 0);
    for (int d = 0; d < s_.directions; ++d) forward(d);
  }

  Gradients backward() const {
    Gradients all;
    all.dx.assign(layer_.x.size(), 0);
    for (int d = 0; d < s_.directions; ++d) backward(d, all.dx, all.directions[d]);
    return all;
  }

 private:
  // One unit of one row at one step. LSTM: gate = i, f, g, o; GRU: r, z, n; RNN: its h.
  struct Unit {
    double gate[4] = {};
    double h_n = 0;     // GRU: W_hn h_{t-1} + b_hn
    double c_prev = 0;  // LSTM
    double c = 0;
    double h = 0;  // before the projection
  };

  const Layer& layer_;
  const SequenceShape s_;
  const int64_t I_ = s_.input_size, H_ = s_.hidden_size, R_ = s_.state_size(), P_ = s_.proj_size;
  const int64_t gate_rows_ = num_gates(s_.cell) * H_;
  std::vector<Unit> units_[kMaxDirections];  // (N, H)
  Array h_prev_[kMaxDirections];             // (N, R)

  double sigmoid(double a) const { return layer_.linear ? 0.5 + 0.25 * a : 1 / (1 + std::exp(-a)); }
  double tanh(double a) const { return layer_.linear ? a : std::tanh(a); }
  double sigmoid_grad(double s) const { return layer_.linear ? 0.25 : s * (1 - s); }
  double tanh_grad(double t) const { return layer_.linear ? 1 : 1 - t * t; }

  double operand(double value) const {
    return layer_.recurrent_operand ? layer_.recurrent_operand(value) : value;
  }

  int64_t step_at(int d, int64_t position) const {
    return d == 0 ? position : s_.steps - 1 - position;
  }

  static double value(const Array& a, int64_t i) { return a.empty() ? 0 : a[size_t(i)]; }
  static Array or_zeros(const Array& a, int64_t size) {
    return a.empty() ? Array(size_t(size), 0.0) : a;
  }
  // Row `row` of a (rows, width) matrix times v.
  static double dot(const Array& matrix, int64_t row, int64_t width, const double* v) {
    double sum = 0;
    for (int64_t k = 0; k < width; ++k) sum += matrix[size_t(row * width + k)] * v[k];
    return sum;
  }

  void forward(int d) {
    const Layer::Direction& w = layer_.directions[d];
    Array h = or_zeros(w.h_0, s_.batch * R_), c = or_zeros(w.c_0, s_.batch * H_);
    h_prev_[d].resize(size_t(s_.rows() * R_));
    units_[d].resize(size_t(s_.rows() * H_));
    for (int64_t position = 0; position < s_.steps; ++position) {
      const int64_t t = step_at(d, position);
      for (int64_t b = 0; b < s_.active(t); ++b) {
        const int64_t row = s_.first_row(t) + b;
        double* h_prev = &h_prev_[d][size_t(row * R_)];
        std::copy_n(&h[size_t(b * R_)], R_, h_prev);
        Unit* units = &units_[d][size_t(row * H_)];
        Array before(static_cast<size_t>(H_));  // h_t before the projection
        for (int64_t j = 0; j < H_; ++j) {
          units[j] = unit_forward(w, layer_.x.data() + row * I_, h_prev, j, c[size_t(b * H_ + j)]);
          c[size_t(b * H_ + j)] = units[j].c;
          before[size_t(j)] = units[j].h;
        }
        for (int64_t j = 0; j < R_; ++j) {
          const double out = P_ > 0 ? dot(w.w_hr, j, H_, before.data()) : before[size_t(j)];
          h[size_t(b * R_ + j)] = out;
          outputs.y[size_t((row * s_.directions + d) * R_ + j)] = out;
        }
      }
    }
    outputs.h_n[d] = h;
    if (s_.cell == CellKind::kLstm) outputs.c_n[d] = c;
  }

  Unit unit_forward(const Layer::Direction& w, const double* x, const double* h_prev, int64_t j,
                    double c_prev) {
    double from_x[4], from_h[4];
    for (int g = 0; g < num_gates(s_.cell); ++g) {
      const int64_t row = g * H_ + j;
      from_x[g] = value(w.b_ih, row) + dot(w.w_ih, row, I_, x);
      from_h[g] = value(w.b_hh, row);
      for (int64_t k = 0; k < R_; ++k)
        from_h[g] += operand(w.w_hh[size_t(row * R_ + k)]) * operand(h_prev[k]);
    }
    const auto sum = [&](int g) { return from_x[g] + from_h[g]; };
    Unit u;
    u.c_prev = c_prev;
    switch (s_.cell) {
      case CellKind::kRnnTanh:
        u.h = tanh(sum(0));
        break;
      case CellKind::kRnnRelu:
        u.h = std::max(sum(0), 0.0);
        nearest_kink = std::min(nearest_kink, std::abs(sum(0)));
        break;
      case CellKind::kLstm:
        u.gate[0] = sigmoid(sum(0));
        u.gate[1] = sigmoid(sum(1));
        u.gate[2] = tanh(sum(2));
        u.gate[3] = sigmoid(sum(3));
        u.c = u.gate[1] * c_prev + u.gate[0] * u.gate[2];
        u.h = u.gate[3] * tanh(u.c);
        break;
      case CellKind::kGru:
        u.h_n = from_h[2];
        u.gate[0] = sigmoid(sum(0));
        u.gate[1] = sigmoid(sum(1));
        u.gate[2] = tanh(from_x[2] + u.gate[0] * u.h_n);
        u.h = (1 - u.gate[1]) * u.gate[2] + u.gate[1] * h_prev[j];
        break;
    }
    return u;
  }

  void backward(int d, Array& dx, Gradients::Direction& out) const {
    const Layer::Direction& w = layer_.directions[d];
    out.w_ih.assign(w.w_ih.size(), 0);
    out.w_hh.assign(w.w_hh.size(), 0);
    out.b_ih.assign(size_t(gate_rows_), 0);
    out.b_hh.assign(size_t(gate_rows_), 0);
    out.w_hr.assign(w.w_hr.size(), 0);
    out.h_0 = or_zeros(w.dh_n, s_.batch * R_);  // dL/dh and dL/dc on their way back
    out.c_0 = or_zeros(w.dc_n, s_.batch * H_);
    for (int64_t position = s_.steps - 1; position >= 0; --position) {
      const int64_t t = step_at(d, position);
      for (int64_t b = 0; b < s_.active(t); ++b) {
        const int64_t row = s_.first_row(t) + b;
        double* dh = &out.h_0[size_t(b * R_)];
        for (int64_t j = 0; j < R_; ++j)
          dh[j] += value(layer_.dy, (row * s_.directions + d) * R_ + j);
        row_backward(d, row, dh, &out.c_0[size_t(b * H_)], &dx[size_t(row * I_)], out);
      }
    }
    if (s_.cell != CellKind::kLstm) out.c_0.clear();
  }

  // In: dL/dh_t and dL/dc_t of one row; out: those of step t-1.
  void row_backward(int d, int64_t row, double* dh, double* dc, double* dx,
                    Gradients::Direction& out) const {
    const Layer::Direction& w = layer_.directions[d];
    const Unit* units = &units_[d][size_t(row * H_)];
    const double* h_prev = &h_prev_[d][size_t(row * R_)];
    const double* x = layer_.x.data() + row * I_;
    Array direct(size_t(R_), 0.0);  // the part of dL/dh_{t-1} that does not pass through W_hh
    Array da_x(size_t(gate_rows_), 0.0), da_h(size_t(gate_rows_), 0.0);
    for (int64_t j = 0; j < H_; ++j) {
      double du = 0;  // dL/dh_t before the projection
      if (P_ > 0) {
        for (int64_t p = 0; p < P_; ++p) {
          du += w.w_hr[size_t(p * H_ + j)] * dh[p];
          out.w_hr[size_t(p * H_ + j)] += dh[p] * units[j].h;
        }
      } else {
        du = dh[j];
      }
      const auto set = [&](int g, double through_x, double through_h) {
        da_x[size_t(g * H_ + j)] = through_x;
        da_h[size_t(g * H_ + j)] = through_h;
      };
      const Unit& u = units[j];
      switch (s_.cell) {
        case CellKind::kRnnTanh: {
          const double da = du * tanh_grad(u.h);
          set(0, da, da);
          break;
        }
        case CellKind::kRnnRelu: {
          const double da = u.h > 0 ? du : 0;
          set(0, da, da);
          break;
        }
        case CellKind::kLstm: {
          const double i = u.gate[0], f = u.gate[1], g = u.gate[2], o = u.gate[3];
          const double tanh_c = tanh(u.c);
          const double dc_t = dc[j] + du * o * tanh_grad(tanh_c);
          const double da[4] = {dc_t * g * sigmoid_grad(i), dc_t * u.c_prev * sigmoid_grad(f),
                                dc_t * i * tanh_grad(g), du * tanh_c * sigmoid_grad(o)};
          for (int gate = 0; gate < 4; ++gate) set(gate, da[gate], da[gate]);
          dc[j] = dc_t * f;
          break;
        }
        case CellKind::kGru: {
          const double r = u.gate[0], z = u.gate[1], n = u.gate[2];
          const double da_n = du * (1 - z) * tanh_grad(n);
          const double da_r = da_n * u.h_n * sigmoid_grad(r);
          const double da_z = du * (h_prev[j] - n) * sigmoid_grad(z);
          set(0, da_r, da_r);
          set(1, da_z, da_z);
          set(2, da_n, da_n * r);
          direct[size_t(j)] = du * z;
          break;
        }
      }
    }
    std::copy(direct.begin(), direct.end(), dh);
    for (int64_t a = 0; a < gate_rows_; ++a) {
      const double from_x = da_x[size_t(a)], from_h = da_h[size_t(a)];
      out.b_ih[size_t(a)] += from_x;
      out.b_hh[size_t(a)] += from_h;
      for (int64_t k = 0; k < I_; ++k) {
        dx[k] += from_x * w.w_ih[size_t(a * I_ + k)];
        out.w_ih[size_t(a * I_ + k)] += from_x * x[k];
      }
      for (int64_t k = 0; k < R_; ++k) {
        dh[k] += operand(from_h) * operand(w.w_hh[size_t(a * R_ + k)]);
        out.w_hh[size_t(a * R_ + k)] += from_h * h_prev[k];
      }
    }
  }
};

}  // namespace rnn_ext::testing
