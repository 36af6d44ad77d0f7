// Compiled once per instruction set: see product_cases.h. All values are small whole numbers, so
// every product is exact in any order and compared with ==. Every array is an allocation of exactly
// its size; what must not be read is NaN.
#include "product_cases.h"

#include <cstdlib>
#include <cstring>

#include "cpu/product.h"

namespace rnn_ext::RNN_EXT_ISA {
namespace {

int64_t cases = 0;

void expect(bool right, int line, int64_t a, int64_t b = -1, int64_t c = -1, int64_t d = -1) {
  ++cases;
  if (!right) product_failed(line, a, b, c, d);
}

template <class T>
class Array {
 public:
  explicit Array(int64_t size)
      : size_(size), data_(static_cast<T*>(std::malloc(size_t(size) * sizeof(T)))) {
    if (!data_) std::abort();
    std::memset(data_, 0xff, size_t(size) * sizeof(T));  // NaN in every type
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T& operator[](int64_t i) const { return data_[i]; }
  T* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  T* data_;
};

// A fixed whole number from -4 to 4 for every place.
double number(int64_t i, int64_t j) {
  return double((i * 7919 + j * 104729 + 12345) % 1009 % 9 - 4);
}

template <class T>
bool untouched(T value) {
  T nan;
  std::memset(&nan, 0xff, sizeof(T));
  return std::memcmp(&value, &nan, sizeof(T)) == 0;
}

// Value k % kPerElement of an element.
template <class P>
void put(typename P::Element& element, int64_t k, double value) {
  if constexpr (P::kPerElement == 1) {
    element = typename P::Element(value);
  } else {
    const float wide = float(value);  // its upper half is the bfloat16: the numbers are small
    std::memcpy(reinterpret_cast<char*>(&element) + 2 * (k % 2),
                reinterpret_cast<const char*>(&wide) + 2, 2);
  }
}
template <class P>
double get(const typename P::Element& element, int64_t k) {
  if constexpr (P::kPerElement == 1) {
    return double(element);
  } else {
    float wide = 0;
    std::memcpy(reinterpret_cast<char*>(&wide) + 2,
                reinterpret_cast<const char*>(&element) + 2 * (k % 2), 2);
    return double(wide);
  }
}

// --- multiply_panel -----------------------------------------------------------------------------

enum class Init { kNone, kBias, kMatrix, kAdded };

template <class P>
void check_panel(int vectors, int64_t rows, int64_t depth, bool transposed, Init init) {
  using T = typename P::Value;
  using Element = typename P::Element;
  constexpr int64_t kPer = P::kPerElement;
  const int64_t width = vectors * kLanes<T>, out_stride = width + 3, init_stride = width + 1;
  const int64_t length = elements<P>(depth);
  // Plain: rows one after the other, with a gap. Transposed: k after k, with a gap.
  const int64_t row_stride = transposed ? 1 : length + 2, k_stride = transposed ? rows + 5 : 1;
  const auto place = [&](int64_t r, int64_t k) { return r * row_stride + k / kPer * k_stride; };
  Array<Element> a(depth > 0 ? place(rows - 1, depth - 1) + 1 : 1), panel(length * width);
  Array<T> bias((rows - 1) * init_stride + width), out((rows - 1) * out_stride + width);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < length * kPer; ++k)
      put<P>(a[place(r, k)], k, k < depth ? number(r, k) : 0);
    for (int64_t j = 0; j < width; ++j) bias[r * init_stride + j] = T(number(j, r));
  }
  for (int64_t k = 0; k < length * kPer; ++k)
    for (int64_t j = 0; j < width; ++j)
      put<P>(panel[k / kPer * width + j], k, k < depth ? number(k + 3, j) : 0);

  const bool added = init == Init::kAdded;
  for (int64_t r = 0; r < rows && added; ++r)
    for (int64_t j = 0; j < width; ++j) out[r * out_stride + j] = T(number(j, r));
  // What is fetched ahead changes nothing, known or not.
  multiply_panel<P>(vectors, rows, length, {a.data(), row_stride, k_stride}, panel.data(),
                    init == Init::kNone || added ? nullptr : bias.data(),
                    init == Init::kMatrix ? init_stride : 0, out.data(), out_stride,
                    rows % 2 ? panel.data() : nullptr, added);

  bool right = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = init == Init::kNone ? 0 : number(j, init == Init::kBias ? 0 : r);
      for (int64_t k = 0; k < depth; ++k) sum += number(r, k) * number(k + 3, j);
      right &= out[r * out_stride + j] == T(sum);
    }
    if (r + 1 < rows)
      for (int64_t j = width; j < out_stride; ++j) right &= untouched(out[r * out_stride + j]);
  }
  expect(right, __LINE__, vectors, rows, depth, int64_t(init) + 10 * transposed);
}

template <class P>
void check_panels() {
  for (int vectors = 1; vectors <= kPanelVectors; ++vectors) {
    for (int64_t rows = 1; rows <= 34; ++rows)
      for (int64_t depth : {0, 1, 2, 3, 4, 5, 7, 8, 31, 65})
        for (Init init : {Init::kNone, Init::kBias, Init::kMatrix, Init::kAdded})
          for (bool transposed : {false, true})
            check_panel<P>(vectors, rows, depth, transposed, init);
    // Beside the boundaries of a block of K.
    for (int64_t rows : {1, 6, 9, 17})
      for (int64_t depth : {kBlockDepth - 1, kBlockDepth, kBlockDepth + 1, 2 * kBlockDepth + 1})
        for (Init init : {Init::kNone, Init::kBias, Init::kMatrix, Init::kAdded})
          check_panel<P>(vectors, rows, depth, rows == 9, init);
  }
}

// --- multiply_unpacked --------------------------------------------------------------------------

template <class T>
void check_unpacked(int64_t columns, int64_t rows, int64_t depth) {
  constexpr int64_t kWidth = kLanes<T>, kReadable = 16;  // rows of A end in zeros
  const int64_t row_stride = (depth + kReadable - 1) / kReadable * kReadable;
  const int64_t ld = depth + 3, out_stride = kWidth + 2;
  Array<T> a(rows * row_stride), weights((columns - 1) * ld + depth), init(kWidth);
  Array<T> out((rows - 1) * out_stride + kWidth);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < row_stride; ++k)
      a[r * row_stride + k] = k < depth ? T(number(r, k)) : T(0);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = 0; k < depth; ++k) weights[j * ld + k] = T(number(k + 3, j));
  for (int64_t j = 0; j < kWidth; ++j) init[j] = T(number(j, 0));

  multiply_unpacked<T>(columns, rows, depth, a.data(), row_stride, weights.data(), ld, init.data(),
                       out.data(), out_stride);

  bool right = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kWidth; ++j) {
      double sum = number(j, 0);  // lanes without a column keep the initial value
      if (j < columns)
        for (int64_t k = 0; k < depth; ++k) sum += number(r, k) * number(k + 3, j);
      right &= out[r * out_stride + j] == T(sum);
    }
    if (r + 1 < rows)
      for (int64_t j = kWidth; j < out_stride; ++j) right &= untouched(out[r * out_stride + j]);
  }
  expect(right, __LINE__, columns, rows, depth);
}

// --- Packing ------------------------------------------------------------------------------------

// Packs one vector of a panel of several.
template <class P>
void check_pack_transposed(int64_t columns, int64_t depth, int64_t vectors) {
  using T = typename P::Value;
  constexpr int64_t kPer = P::kPerElement;
  const int64_t ld = depth + 1, width = vectors * kLanes<T>, at = (vectors - 1) * kLanes<T>;
  Array<T> weights((columns - 1) * ld + depth);
  Array<typename P::Element> panel(elements<P>(depth) * width);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = 0; k < depth; ++k) weights[j * ld + k] = T(number(j, k));
  pack_transposed<P>(weights.data(), ld, columns, depth, panel.data() + at, width);
  bool right = true;
  for (int64_t k = 0; k < elements<P>(depth) * kPer; ++k)
    for (int64_t j = 0; j < width; ++j) {
      const auto& element = panel[k / kPer * width + j];
      const double value = j - at < columns && k < depth ? number(j - at, k) : 0;
      right &= j < at ? untouched(element) : get<P>(element, k) == value;
    }
  expect(right, __LINE__, columns, depth, vectors);
}

template <class P>
void check_pack_row(int64_t columns, int vectors) {
  using T = typename P::Value;
  constexpr int64_t kPer = P::kPerElement, kDepth = 3;
  const int64_t width = vectors * kLanes<T>;
  Array<T> values(columns);
  Array<typename P::Element> panel(elements<P>(kDepth) * width);
  for (int64_t k = 0; k < kDepth; ++k) {  // the second row is absent: zeros
    for (int64_t j = 0; j < columns; ++j) values[j] = T(number(j, k));
    pack_row<P>(k == 1 ? nullptr : values.data(), columns, vectors, k, panel.data());
  }
  bool right = true;
  for (int64_t k = 0; k < elements<P>(kDepth) * kPer; ++k)
    for (int64_t j = 0; j < width; ++j) {
      const double value = j < columns && k < kDepth && k != 1 ? number(j, k) : 0;
      right &= get<P>(panel[k / kPer * width + j], k) == value;
    }
  expect(right, __LINE__, columns, vectors);
}

// A row of operands, stored a vector at a time.
template <class P>
void check_store_row(int64_t count) {
  using T = typename P::Value;
  Array<T> values(count);
  Array<typename P::Element> row(elements<P>(padded(count)));
  for (int64_t k = 0; k < count; ++k) values[k] = T(number(k, 5));
  bool right = true;
  for (const T* from : {static_cast<const T*>(values.data()), static_cast<const T*>(nullptr)}) {
    store_row<P>(row.data(), from, count);
    for (int64_t k = 0; k < padded(count); ++k)
      right &= get<P>(row[k / P::kPerElement], k) == (from && k < count ? number(k, 5) : 0);
  }
  expect(right, __LINE__, count);
}

template <class T>
void check_squares() {
  constexpr int64_t kSide = kLanes<T>;
  Vec<T> rows[kSide];
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t j = 0; j < kSide; ++j) rows[i][j] = T(i * kSide + j);
  transpose<T>(rows);
  bool right = true;
  for (int64_t i = 0; i < kSide; ++i)
    for (int64_t j = 0; j < kSide; ++j) right &= rows[i][j] == T(j * kSide + i);
  expect(right, __LINE__, kSide);

  const Vec<T> sums =
      sum_each<T, kLanes<T>, kLanes<T>>(rows);  // of the columns of the square as it was
  right = true;
  for (int64_t i = 0; i < kSide; ++i)
    right &= sums[i] == T(kSide * (kSide - 1) / 2 * kSide + kSide * i);
  expect(right, __LINE__, kSide);
}

// Panels follow each other without gap and hold every column once.
template <class T, int kGates>
void check_columns(int64_t count) {
  const Columns<T> plain{count};
  int64_t columns = 0;
  bool right = true;
  for (int64_t panel = 0; panel < plain.panels(); ++panel) {
    right &= plain.first(panel) == columns && plain.offset(panel, 3) == columns * 3;
    right &= plain.vectors(panel) >= 1 && plain.vectors(panel) <= kPanelVectors;
    columns += plain.vectors(panel) * kLanes<T>;
  }
  right &= columns >= count && columns < count + kLanes<T> && plain.size(3) == columns * 3;
  expect(right, __LINE__, count);

  const GateColumns<T, kGates> gates{count};
  int64_t units = 0;
  right = true;
  for (int64_t panel = 0; panel < gates.panels(); ++panel) {
    right &= gates.first_unit(panel) == units && gates.column(panel) == units * kGates;
    right &= gates.vectors(panel) <= kPanelVectors && gates.unit_vectors(panel) >= 1;
    units += gates.unit_vectors(panel) * kLanes<T>;
  }
  right &= units >= count && units < count + kLanes<T> && gates.width() == units * kGates;
  expect(right, __LINE__, count, kGates);
}

template <class P>
void check_precision() {
  using T = typename P::Value;
  check_panels<P>();
  for (int64_t columns = 1; columns <= kLanes<T> + 1; ++columns)
    for (int64_t depth = 0; depth <= 4 * kLanes<T> + 1; ++depth)
      for (int64_t vectors : {1, 3}) check_pack_transposed<P>(columns, depth, vectors);
  for (int vectors = 1; vectors <= kPanelVectors; ++vectors)
    for (int64_t columns = 0; columns <= vectors * kLanes<T>; ++columns)
      check_pack_row<P>(columns, vectors);
  for (int64_t count = 1; count <= 70; ++count) check_store_row<P>(count);
}

template <class T>
void check_type() {
  check_precision<FullPrecision<T>>();
  for (int64_t columns = 1; columns <= kLanes<T>; ++columns)
    for (int64_t rows = 1; rows <= 2 * kDotRows + 1; ++rows)
      for (int64_t depth = 0; depth <= 2 * kLanes<T> + 1; ++depth)
        check_unpacked<T>(columns, rows, depth);
  check_unpacked<T>(kLanes<T>, 2, 1000);
  check_squares<T>();
  for (int64_t count = 1; count <= 9 * kLanes<T>; ++count) {
    check_columns<T, 1>(count);
    check_columns<T, 3>(count);
    check_columns<T, 4>(count);
  }
}

}  // namespace

int64_t check_products() {
  cases = 0;
#if defined(__AVX512BF16__)
  check_precision<BFloat16Products>();
#else
  check_type<float>();
  check_type<double>();
#endif
  return cases;
}

}  // namespace rnn_ext::RNN_EXT_ISA
