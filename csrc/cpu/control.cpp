#include "../control.h"

#include <cstring>

#include "rows.h"

namespace pyode::cpu {

void control(const Layout&, const Control& op) {
  with_scalar(op.time_scalar, [&](auto kind) {
    int64_t flags = 0;
    for (int64_t b = 0; b < op.state.samples; ++b) flags |= control_sample<decltype(kind)>(op, b);
    op.flags[op.turn] = flags;
    op.flags[1 - op.turn] = 0;
  });
}

void select_rows(const Layout& layout, const SelectRows& op) {
  with_scalar(layout.scalar, [&](auto kind) {
    const size_t bytes = sizeof kind * static_cast<size_t>(layout.size);
    for (int64_t b = 0; b < layout.samples; ++b) {
      const void* from = op.accepted[b] ? op.moved : op.stayed;
      std::memcpy(static_cast<char*>(op.out) + b * bytes, static_cast<const char*>(from) + b * bytes, bytes);
    }
  });
}

}  // namespace pyode::cpu
