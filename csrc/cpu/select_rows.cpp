#include "levels.h"
#include "rows.h"

namespace pyode::cpu::PYODE_LEVEL {

void select_rows(const Layout& layout, const SelectRows& op) {
  with_scalar(layout.scalar, [&](auto kind) {
    using T = decltype(kind);
    const T* const moved = static_cast<const T*>(op.moved);
    const T* const stayed = static_cast<const T*>(op.stayed);
    T* const out = static_cast<T*>(op.out);
    if (rows_are_small(layout)) {
      for_small_rows<arithmetic_t<T>>(layout, op.accepted,
                                      [&](int64_t, int64_t begin, int64_t end, const auto* accepted) {
                                        PYODE_INDEPENDENT
                                        for (int64_t i = begin; i < end; ++i)
                                          out[i] = accepted[i - begin] != 0 ? moved[i] : stayed[i];
                                      });
      return;
    }
    for_each_chunk(layout, [&](int64_t b, int64_t begin, int64_t end) {
      std::memcpy(out + begin, (op.accepted[b] ? moved : stayed) + begin, sizeof(T) * static_cast<size_t>(end - begin));
    });
  });
}

}  // namespace pyode::cpu::PYODE_LEVEL
