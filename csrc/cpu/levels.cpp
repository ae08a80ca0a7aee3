#include "levels.h"

#include <cstdlib>
#include <cstring>

namespace pyode::cpu {
namespace {

struct Level {
  const char* name;
  decltype(&generic::stage_combine) stage_combine;
  decltype(&generic::stage_vjp) stage_vjp;
  decltype(&generic::error_norm) error_norm;
  decltype(&generic::interpolate) interpolate;
  decltype(&generic::select_rows) select_rows;
  decltype(&generic::control) control;
};

#define PYODE_LOOPS_OF(level)                                                                                        \
  {#level,        level::stage_combine, level::stage_vjp, level::error_norm, level::interpolate, level::select_rows, \
   level::control}

// PYODE_SIMD=generic|avx2 asks for less than the machine can do, so that the levels can be compared.
Level choose() {
#if defined(PYODE_X86_LEVELS)
  __builtin_cpu_init();
  const char* asked = std::getenv("PYODE_SIMD");
  const auto wanted = [asked](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
  if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return PYODE_LOOPS_OF(avx512);
  if ((wanted("avx2") || wanted("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return PYODE_LOOPS_OF(avx2);
#endif
  return PYODE_LOOPS_OF(generic);
}

const Level level = choose();

}  // namespace

void stage_combine(const Layout& layout, const StageCombine& op) { level.stage_combine(layout, op); }
void stage_vjp(const Layout& layout, const StageVjp& op) { level.stage_vjp(layout, op); }
void error_norm(const Layout& layout, const ErrorNorm& op) { level.error_norm(layout, op); }
void interpolate(const Layout& layout, const Interpolate& op) { level.interpolate(layout, op); }
void select_rows(const Layout& layout, const SelectRows& op) { level.select_rows(layout, op); }
void control(const Layout& layout, const Control& op) { level.control(layout, op); }
const char* simd_level() { return level.name; }

}  // namespace pyode::cpu
