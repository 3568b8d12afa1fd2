// Counts the bytes of all CPU tensors that are alive: an allocator before the one that PyTorch uses. Inductor's code
// and C++ ops take their tensors from it too. What a library allocates by itself (oneDNN's scratch memory) is not seen.

#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdint>

namespace {

std::atomic<int64_t> live{0}, most{0};

// In front of each block: how to free it, and its size. As wide as PyTorch's alignment of tensors.
struct alignas(64) Header {
  void* context;
  c10::DeleterFnPtr deleter;
  int64_t size;
};

void release(void* data) {
  if (data == nullptr) return;
  const Header header = *(static_cast<Header*>(data) - 1);
  live -= header.size;
  header.deleter(header.context);
}

void count(int64_t size) {
  const int64_t now = live += size;
  int64_t before = most;
  while (before < now && !most.compare_exchange_weak(before, now)) {
  }
}

class Counting final : public c10::Allocator {
 public:
  explicit Counting(c10::Allocator* inner) : inner(inner) {}

  // Some ops want the context of a tensor's memory to be its address.
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &release, cpu};
    c10::DataPtr block = inner->allocate(size + sizeof(Header));
    auto* header = static_cast<Header*>(block.get());
    const auto deleter = block.get_deleter();
    *header = {block.release_context(), deleter, static_cast<int64_t>(size)};
    count(header->size);
    return {header + 1, header + 1, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* into, const void* from, size_t size) const override { inner->copy_data(into, from, size); }

 private:
  c10::Allocator* inner;
};

}  // namespace

extern "C" {

// Once a process: tensors that it counts may outlive any use of it.
void live_bytes_install() { c10::SetCPUAllocator(new Counting(c10::GetCPUAllocator()), 1); }

int64_t live_bytes() { return live; }

int64_t live_bytes_peak() { return most; }

void live_bytes_reset_peak() { most = live.load(); }
}
