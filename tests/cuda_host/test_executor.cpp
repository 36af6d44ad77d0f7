// The executor's own tests: right kernels pass under every schedule, planted bugs are reported with
// the line they are on.
#include <sys/wait.h>
#include <unistd.h>

#include <cctype>
#include <fstream>

#include "../cpp/check.h"
#include "executor.h"
#include "small_kernels.h"

using namespace rnn_ext::cuda::host;  // NOLINT

static std::vector<Schedule> schedules() {
  std::vector<Schedule> all{{.order = Order::kForward}, {.order = Order::kReverse}};
  for (uint64_t seed = 0; seed < 10; ++seed)
    all.push_back({.order = Order::kRandom, .seed = seed, .preempt_every = 1 + int(seed) * 5});
  return all;
}

static std::string name_of_schedule(const Schedule& schedule) {
  const char* const orders[] = {"forward", "reverse", "random"};
  return orders[int(schedule.order)] + std::string(" ") + std::to_string(schedule.seed);
}

// "small_kernels.cpp:N" of the line that ends in "// <- mark"; any line without a mark.
static std::string line_marked(const std::string& mark) {
  if (mark.empty()) return "";
  std::ifstream source(RNN_EXT_SMALL_KERNELS);
  const std::string end = "// <- " + mark;
  std::string line;
  for (int number = 1; std::getline(source, line); ++number)
    if (line.ends_with(end)) return "small_kernels.cpp:" + std::to_string(number);
  return "no line marked " + mark;
}

TEST(clean_kernels_pass_under_every_schedule) {
  for (const SmallKernel& kernel : small_kernels()) {
    if (!kernel.passes) continue;
    for (const Schedule& schedule : schedules()) {
      const check::Scope scope(kernel.name, ", ", name_of_schedule(schedule));
      set_schedule(schedule);
      const bool right = kernel.run();
      CHECK(right);
      for (const Report& report : take_reports()) CHECK_EQ(report.text, "");
    }
  }
}

TEST(planted_bugs_are_reported_under_every_schedule) {
  for (const SmallKernel& kernel : small_kernels()) {
    if (kernel.passes || (kernel.needs_instrumentation && !kInstrumented)) continue;
    const std::string line = line_marked(kernel.mark);
    for (const Schedule& schedule : schedules()) {
      const check::Scope scope(kernel.name, ", ", name_of_schedule(schedule));
      set_schedule(schedule);
      kernel.run();
      bool found = false;
      std::string texts;
      for (const Report& report : take_reports()) {
        const size_t at = report.text.find(line);
        // The number must end there: line 12 is not line 123.
        found |= report.fault == kernel.fault && at != std::string::npos &&
                 (line.empty() || !std::isdigit(report.text[at + line.size()]));
        texts += "\n  " + report.text;
      }
      if (!found)
        check::fail(__FILE__, __LINE__)
            << "no " << name_of(kernel.fault) << " at " << line << " among:" << texts << '\n';
    }
  }
}

// Without instrumentation it is AddressSanitizer that has to notice.
TEST(address_sanitizer_ends_what_runs_out_of_bounds) {
#if defined(__SANITIZE_ADDRESS__)
  int checked = 0;
  for (const SmallKernel& kernel : small_kernels()) {
    if (kernel.passes || !kernel.name.ends_with("outside")) continue;
    const check::Scope scope(kernel.name);
    int output[2];
    CHECK(pipe(output) == 0);
    const pid_t child = fork();
    if (child == 0) {
      dup2(output[1], STDERR_FILENO);
      kernel.run();
      _exit(0);
    }
    close(output[1]);
    std::string text;
    char part[4096];
    for (ssize_t n; (n = read(output[0], part, sizeof part)) > 0;) text.append(part, size_t(n));
    close(output[0]);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(status != 0);
    CHECK(text.find("AddressSanitizer") != std::string::npos);
    CHECK(text.find(line_marked(kernel.mark)) != std::string::npos);
    ++checked;
  }
  CHECK_EQ(checked, 3);
#endif
}

TEST(fragments_and_shuffles) {
  for (const Schedule& schedule : schedules()) {
    const check::Scope scope(name_of_schedule(schedule));
    set_schedule(schedule);
    CHECK(products_are_right());
    CHECK(shuffles_are_right());
    for (const Report& report : take_reports()) CHECK_EQ(report.text, "");
  }
}
