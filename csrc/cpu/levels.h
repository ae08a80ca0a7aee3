// The loops that exist once for each SIMD level. CMake compiles their sources with PYODE_LEVEL set to each.
#pragma once

#include "../ops.h"

#define PYODE_DECLARE_LOOPS(level)                        \
  namespace pyode::cpu::level {                           \
  void stage_combine(const Layout&, const StageCombine&); \
  void stage_vjp(const Layout&, const StageVjp&);         \
  void error_norm(const Layout&, const ErrorNorm&);       \
  void interpolate(const Layout&, const Interpolate&);    \
  void select_rows(const Layout&, const SelectRows&);     \
  void control(const Layout&, const Control&);            \
  }

PYODE_DECLARE_LOOPS(generic)
PYODE_DECLARE_LOOPS(avx2)
PYODE_DECLARE_LOOPS(avx512)
