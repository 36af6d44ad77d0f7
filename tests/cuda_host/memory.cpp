#include "memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
#endif

namespace rnn_ext::cuda::host {

// --- Reports -------------------------------------------------------------------------------------

static std::vector<Report> reports;
static std::set<std::tuple<Fault, std::string, std::string>> reported;

const char* name_of(Fault fault) {
  static const char* const names[] = {"race",
                                      "uninitialized",
                                      "out of bounds",
                                      "misaligned",
                                      "copy not waited for",
                                      "streaming load of what is written",
                                      "divergent barrier",
                                      "divergent warp",
                                      "deadlock",
                                      "block that has returned",
                                      "launch"};
  return names[int(fault)];
}

std::vector<Report> take_reports() {
  reported.clear();
  std::vector<Report> taken;
  taken.swap(reports);
  return taken;
}

bool found_anything() { return !reports.empty(); }

void report(Fault fault, const std::string& text, const void* site, const void* other) {
  const std::string line = site ? line_of(site) : "", other_line = other ? line_of(other) : "";
  constexpr size_t kEnough = 50;
  if (reports.size() >= kEnough || !reported.insert({fault, line, other_line}).second) return;
  reports.push_back({fault, std::string(name_of(fault)) + ": " + text +
                                (line.empty() ? "" : " at " + line) +
                                (other_line.empty() ? "" : ", other at " + other_line)});
}

const std::string& line_of(const void* site) {
  static std::map<const void*, std::string> known;
  const auto [it, is_new] = known.try_emplace(site);
  std::string& line = it->second;
  if (!is_new) return line;
  Dl_info info;
  if (!dladdr(site, &info)) return line;
  const auto offset = static_cast<const char*>(site) - static_cast<const char*>(info.dli_fbase) - 1;
  char command[4200];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                size_t(offset));
  if (FILE* pipe = popen(command, "r")) {
    char text[2000];
    while (std::fgets(text, sizeof text, pipe)) {
      std::string frame(text, std::strcspn(text, "\n"));
      frame = frame.substr(0, frame.find(" (discriminator"));
      if (frame.find("portable_host.h") != std::string::npos) continue;
      if (frame.find("executor.cpp") != std::string::npos) continue;
      if (frame.find("/include/c++/") != std::string::npos) continue;
      line += (line.empty() ? "" : " < ") + frame;
    }
    pclose(pipe);
  }
  return line;
}

std::string thread_name(int block, int thread) {
  return "block " + std::to_string(block) + " thread " + std::to_string(thread);
}

// --- Allocations ---------------------------------------------------------------------------------

Memory::Memory() : pages_(kArena / kPage) {
  void* p = mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  arena_ = static_cast<char*>(p);
}

Allocation* Memory::allocate(size_t bytes, size_t granule, const char* name, int block) {
  // A page of nothing behind every allocation, so that what runs over an end meets no neighbor.
  const size_t room = (bytes + kPage - 1) / kPage * kPage + kPage;
  if (used_ + room > kArena) {
    std::fprintf(stderr, "host executor: out of device memory\n");
    std::abort();
  }
  auto a = std::make_unique<Allocation>();
  a->begin = arena_ + used_;
  a->size = bytes;
  a->granule_shift = size_t(__builtin_ctzll(granule));
  a->block = block;
  a->name = name;
  if (kInstrumented) a->cells.resize((bytes >> a->granule_shift) + 1);
  used_ += room;
  for (size_t page = 0; page < room / kPage; ++page)
    pages_[size_t(a->begin - arena_) / kPage + page] = a.get();
  ASAN_UNPOISON_MEMORY_REGION(a->begin, bytes);
  std::memset(a->begin, 0xff, bytes);
  ASAN_POISON_MEMORY_REGION(a->begin + bytes, room - bytes);
  live_.push_back(std::move(a));
  return live_.back().get();
}

void Memory::release(void* memory) {
  for (auto& a : live_) {
    if (a->begin != memory) continue;
    const size_t first = size_t(a->begin - arena_) / kPage;
    for (size_t page = first; page < pages_.size() && pages_[page] == a.get(); ++page)
      pages_[page] = nullptr;
    ASAN_POISON_MEMORY_REGION(a->begin, a->size);
    a.swap(live_.back());
    live_.pop_back();
    break;
  }
  // The end of the arena is given back as far as nothing lives there.
  used_ = 0;
  for (const auto& a : live_)
    used_ =
        std::max(used_, size_t(a->begin - arena_) + (a->size + kPage - 1) / kPage * kPage + kPage);
}

void* Memory::allocate_virtual(size_t bytes, const char* name) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::fprintf(stderr, "host executor: no address space for %zu bytes\n", bytes);
    std::abort();
  }
  auto a = std::make_unique<Allocation>();
  a->begin = static_cast<char*>(p);
  a->size = bytes;
  a->name = name;
  virtual_.push_back(std::move(a));
  return p;
}

void Memory::release_virtual(void* memory) {
  std::erase_if(virtual_, [&](const std::unique_ptr<Allocation>& a) {
    return a->begin == memory && munmap(a->begin, a->size) == 0;
  });
}

Allocation* Memory::find_virtual(const void* p) const {
  for (const auto& a : virtual_)
    if (size_t(static_cast<const char*>(p) - a->begin) < a->size) return a.get();
  return nullptr;
}

void Memory::mark_written(const void* memory, size_t bytes) {
  Allocation* a = find(memory);
  if (!a || a->cells.empty() || bytes == 0) return;
  const size_t offset = size_t(static_cast<const char*>(memory) - a->begin);
  for (size_t i = offset >> a->granule_shift; i <= (offset + bytes - 1) >> a->granule_shift; ++i) {
    a->cells[i] = Cell();
    a->cells[i].written = true;
  }
}

void Memory::begin_launch(int block_size) {
  ++generation_;
  block_size_ = block_size;
}

std::string Memory::describe(const void* p) const {
  const Allocation* a = find(p);
  char text[64];
  if (!a) {
    std::snprintf(text, sizeof text, "%p, which is no device memory", p);
    return text;
  }
  std::snprintf(text, sizeof text, "byte %td of %zu", static_cast<const char*>(p) - a->begin,
                a->size);
  return std::string(text) + " of " + (a->block < 0 ? "" : "shared ") + a->name;
}

// --- Checks --------------------------------------------------------------------------------------

static bool writes(Kind kind) {
  return kind == Kind::kWrite || kind == Kind::kAtomicWrite || kind == Kind::kAsyncWrite;
}
static bool is_atomic(Kind kind) { return kind == Kind::kAtomicRead || kind == Kind::kAtomicWrite; }

bool Memory::check(const Accessor& by, const void* p, size_t bytes, Kind kind, const void* site) {
  const char* verb = writes(kind) ? "writes " : "reads ";
  Allocation* a = find(p);
  const size_t offset = a ? size_t(static_cast<const char*>(p) - a->begin) : 0;
  const bool reached =
      a && (a->block < 0 || (a->block >= by.first_block && a->block <= by.last_block));
  if (!reached || offset + bytes > a->size) {
    report(Fault::kOutOfBounds,
           thread_name(by.block, by.thread) + " " + verb + std::to_string(bytes) + " bytes at " +
               describe(p) + (a && !reached ? " of another block" : ""),
           site);
    return false;
  }
  if (a->cells.empty()) return true;  // not instrumented, or virtual
  const size_t last = (offset + bytes - 1) >> a->granule_shift;
  for (size_t i = offset >> a->granule_shift; i <= last; ++i) {
    Cell& cell = a->cells[i];
    if (cell.generation != generation_) {
      cell.generation = generation_;
      cell.atomic = cell.pending = cell.streaming = false;
      cell.write = cell.read = Access();
      cell.reads.reset();
    }
    const void* at = a->begin + (i << a->granule_shift);
    if (writes(kind))
      write(by, *a, cell, at, kind, site);
    else
      read(by, *a, cell, at, kind, site);
  }
  return true;
}

void Memory::race(const Accessor& by, const void* p, const char* verb, const void* site,
                  const Access& other, const char* other_verb) {
  report(Fault::kRace,
         thread_name(by.block, by.thread) + " " + verb + " " + describe(p) + ", which " +
             thread_name(int(other.thread) / block_size_, int(other.thread) % block_size_) + " " +
             other_verb + " with nothing to order the two",
         site, other.site);
}

void Memory::read(const Accessor& by, Allocation& a, Cell& cell, const void* p, Kind kind,
                  const void* site) {
  const Access now{by.clock.self, by.clock.time, site};
  if (!cell.written)
    report(Fault::kUninitialized,
           thread_name(by.block, by.thread) + " reads what nobody has written, " + describe(p),
           site);
  if (cell.pending)
    report(Fault::kAsyncNotWaited,
           thread_name(by.block, by.thread) + " reads the destination of a copy on its way, " +
               describe(p),
           site, cell.write.site);
  else if (cell.write.time && !(cell.atomic && is_atomic(kind)) &&
           !by.clock.knows(cell.write.thread, cell.write.time))
    race(by, p, "reads", site, cell.write, "writes");
  if (kind == Kind::kStreaming) {
    cell.streaming = true;
    if (cell.write.time)
      report(
          Fault::kStreamingNotConst,
          thread_name(by.block, by.thread) + " reads " + describe(p) + " past the coherent cache",
          site, cell.write.site);
  }
  if (is_atomic(kind) || a.size == 0) return;  // atomic reads never conflict with atomic writes
  if (cell.read.time == 0 || by.clock.knows(cell.read.thread, cell.read.time)) {
    cell.read = now;
    if (!cell.reads) return;
    std::erase_if(*cell.reads, [&](const Access& r) { return by.clock.knows(r.thread, r.time); });
    return;
  }
  if (!cell.reads) cell.reads = std::make_unique<std::vector<Access>>();
  for (Access& r : *cell.reads)
    if (by.clock.knows(r.thread, r.time)) {
      r = now;
      return;
    }
  // Beyond this many one is forgotten: what is read by so many is not written in between.
  constexpr size_t kMany = 256;
  if (cell.reads->size() < kMany)
    cell.reads->push_back(now);
  else
    (*cell.reads)[now.thread % kMany] = now;
}

void Memory::write(const Accessor& by, Allocation&, Cell& cell, const void* p, Kind kind,
                   const void* site) {
  if (cell.pending)
    report(Fault::kAsyncNotWaited,
           thread_name(by.block, by.thread) + " overwrites the destination of a copy on its way, " +
               describe(p),
           site, cell.write.site);
  else if (cell.write.time && !(cell.atomic && is_atomic(kind)) &&
           !by.clock.knows(cell.write.thread, cell.write.time))
    race(by, p, "writes", site, cell.write, "writes");
  if (cell.read.time && !by.clock.knows(cell.read.thread, cell.read.time))
    race(by, p, "writes", site, cell.read, "reads");
  if (cell.reads)
    for (const Access& r : *cell.reads)
      if (!by.clock.knows(r.thread, r.time)) race(by, p, "writes", site, r, "reads");
  if (cell.streaming)
    report(Fault::kStreamingNotConst,
           thread_name(by.block, by.thread) + " writes " + describe(p) +
               ", which was read past the coherent cache",
           site);
  cell.written = true;
  cell.atomic = is_atomic(kind);
  cell.pending = kind == Kind::kAsyncWrite;
  cell.write = {by.clock.self, by.clock.time, site};
  cell.read = Access();
  cell.reads.reset();
}

void Memory::check_return(const Allocation& a, const SharedClock& known) {
  const auto check = [&](const void* p, const Access& access, const char* verb) {
    const int block = int(access.thread) / block_size_;
    if (access.time == 0 || block == a.block) return;
    if (known && access.thread < known->size() && access.time <= (*known)[access.thread]) return;
    report(Fault::kReturned,
           thread_name(block, int(access.thread) % block_size_) + " " + verb + " " + describe(p) +
               " of block " + std::to_string(a.block) + ", which does not wait for that",
           access.site);
  };
  for (size_t i = 0; i < a.cells.size(); ++i) {
    const Cell& cell = a.cells[i];
    if (cell.generation != generation_) continue;
    const void* const p = a.begin + (i << a.granule_shift);
    check(p, cell.write, "writes");
    check(p, cell.read, "reads");
    if (cell.reads)
      for (const Access& access : *cell.reads) check(p, access, "reads");
  }
}

void Memory::arrived(const Accessor& by, const void* p, size_t bytes, const void* site) {
  Allocation* a = find(p);
  if (a->cells.empty()) return;
  const size_t offset = size_t(static_cast<const char*>(p) - a->begin);
  for (size_t i = offset >> a->granule_shift; i <= (offset + bytes - 1) >> a->granule_shift; ++i) {
    a->cells[i].pending = false;
    a->cells[i].write = {by.clock.self, by.clock.time, site};
  }
}

}  // namespace rnn_ext::cuda::host
