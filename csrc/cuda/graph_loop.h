// A loop on the device: a graph's WHILE node, whose body is repeated as long as a kernel in it says so.
#pragma once

#include <cstdint>

namespace pyode::cuda {

/// An opening and a body, each a captured graph, become one: the opening, and the body while the condition holds. It
/// holds at first; a kernel of either sets it. What returns text returns null, or the text of an error.
class GraphLoop {
 public:
  GraphLoop() = default;
  GraphLoop(const GraphLoop&) = delete;
  ~GraphLoop();

  const char* create();
  /// A cudaGraphConditionalHandle: what a kernel sets (Control::condition).
  unsigned long long condition() const { return condition_; }
  /// Copies both, so they need not live on; the memory that they use has to.
  const char* assemble(void* opening, void* body);
  const char* launch(void* stream) const;

 private:
  void* graph_ = nullptr;
  void* executable_ = nullptr;
  unsigned long long condition_ = 0;
};

}  // namespace pyode::cuda
