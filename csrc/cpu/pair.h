// Two vectors that go through the same arithmetic side by side. An activation is a chain of some
// twenty operations that wait for each other, and a processor looks ahead by a hundred or two: the
// chains of one vector's cell, one behind the other, do not keep it busy.
#pragma once

#include "simd.h"

namespace rnn_ext::RNN_EXT_ISA {

// More than two, or two with 16 registers, would not fit.
template <class T>
struct Pair {
  Vec<T> first, second;
};

// function(vector, ...) for each vector of the arguments.
template <class Function, class V, class... More>
RNN_EXT_INLINE V each(const Function& function, V x, More... more) {
  return function(x, more...);
}
template <class Function, class T, class... More>
RNN_EXT_INLINE Pair<T> each(const Function& function, Pair<T> x, More... more) {
  return {function(x.first, more.first...), function(x.second, more.second...)};
}

#define RNN_EXT_PAIRWISE(op)                                 \
  template <class T>                                         \
  RNN_EXT_INLINE Pair<T> operator op(Pair<T> a, Pair<T> b) { \
    return {a.first op b.first, a.second op b.second};       \
  }                                                          \
  template <class T>                                         \
  RNN_EXT_INLINE Pair<T> operator op(Pair<T> a, T b) {       \
    return {a.first op b, a.second op b};                    \
  }                                                          \
  template <class T>                                         \
  RNN_EXT_INLINE Pair<T> operator op(T a, Pair<T> b) {       \
    return {a op b.first, a op b.second};                    \
  }
RNN_EXT_PAIRWISE(+)
RNN_EXT_PAIRWISE(-)
RNN_EXT_PAIRWISE(*)
RNN_EXT_PAIRWISE(/)
#undef RNN_EXT_PAIRWISE

// visit(0, vector), or visit(i, vector) for both of a pair.
template <class V, class Visit>
RNN_EXT_INLINE void for_each_vector(V& x, Visit&& visit) {
  visit(0, x);
}
template <class T, class Visit>
RNN_EXT_INLINE void for_each_vector(Pair<T>& x, Visit&& visit) {
  visit(0, x.first);
  visit(1, x.second);
}

// A vector of a row, or one each of two rows that are `stride` apart.
template <class V, class T>
RNN_EXT_INLINE V load_rows(const T* first, int64_t stride) {
  V rows;
  for_each_vector(rows, [&](int i, Vec<T>& row) { row = load(first + i * stride); });
  return rows;
}
template <class T, class V>
RNN_EXT_INLINE void store_rows(T* first, int64_t stride, V rows) {
  for_each_vector(rows, [&](int i, Vec<T>& row) { store(first + i * stride, row); });
}

}  // namespace rnn_ext::RNN_EXT_ISA
