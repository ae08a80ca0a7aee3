// There are no graphs on the host: what repeats the body, plugin.py has to bring; here is the condition that it looks
// at.
#include "graph_loop.h"

namespace pyode::cuda {

GraphLoop::~GraphLoop() { delete reinterpret_cast<unsigned*>(condition_); }

const char* GraphLoop::create() {
  condition_ = reinterpret_cast<uintptr_t>(new unsigned(1));
  return nullptr;
}

const char* GraphLoop::assemble(void*, void*) { return "there are no graphs on the host"; }
const char* GraphLoop::launch(void*) const { return "there are no graphs on the host"; }

}  // namespace pyode::cuda
