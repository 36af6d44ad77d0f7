// The test harness of the C++ engine in one header. Each tests/cpp/test_*.cpp is a program of its
// own that includes this header once: it defines main(). An argument selects the tests whose name
// contains it.
//
//   TEST(two_and_two) { CHECK_EQ(2 + 2, 4); }
#pragma once

#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline int failures = 0;
inline std::string context;  // of the case being checked, printed with a failure

// Names the case for as long as it lives: `check::Scope scope("H=", hidden_size);`
struct Scope {
  template <class... Parts>
  explicit Scope(const Parts&... parts) : saved(context) {
    std::string text;
    ((text += to_text(parts)), ...);
    context += (context.empty() ? "" : ", ") + text;
  }
  ~Scope() { context = saved; }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  static std::string to_text(const std::string& part) { return part; }
  static std::string to_text(const char* part) { return part; }
  template <class Number>
  static std::string to_text(Number part) {
    return std::to_string(part);
  }
  std::string saved;
};

inline std::ostream& fail(const char* file, int line) {
  ++failures;
  std::cerr << file << ':' << line << ": ";
  if (!context.empty()) std::cerr << '[' << context << "] ";
  return std::cerr;
}

template <class A, class B>
void equal(const char* file, int line, const char* text, const A& a, const B& b) {
  if (!(a == b)) fail(file, line) << text << ": " << a << " != " << b << '\n';
}

// NaN is near nothing, so a NaN in a result never passes.
inline void near(const char* file, int line, const char* text, double a, double b,
                 double tolerance) {
  if (!(std::abs(a - b) <= tolerance))
    fail(file, line) << text << ": |" << a << " - " << b << "| > " << tolerance << '\n';
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) check::fail(__FILE__, __LINE__) << "not true: " #condition "\n"; \
  } while (false)
#define CHECK_EQ(a, b) check::equal(__FILE__, __LINE__, #a " == " #b, a, b)
#define CHECK_NEAR(a, b, tolerance) check::near(__FILE__, __LINE__, #a " near " #b, a, b, tolerance)

int main(int argc, char** argv) {
  std::cerr.precision(std::numeric_limits<double>::max_digits10);
  int failed = 0, run = 0;
  for (const check::Test& test : check::tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    const int before = check::failures;
    ++run;
    test.body();
    const bool passed = check::failures == before;
    failed += !passed;
    std::cout << (passed ? "ok     " : "FAILED ") << test.name << std::endl;
  }
  std::cout << run - failed << " passed, " << failed << " failed" << std::endl;
  return failed > 0 || run == 0;
}
