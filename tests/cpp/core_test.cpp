// The CPU core without Python: what AddressSanitizer and UndefinedBehaviorSanitizer look at, and offsets beyond 2^31,
// which are tested without allocating as much.
#include <cmath>
#include <cstdio>
#include <limits>
#include <thread>
#include <vector>

#include "../../csrc/control.h"
#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cpu/rows.h"
#include "../../csrc/ops.h"

using namespace pyode;

namespace {

int failures = 0, checks = 0;

void check(bool ok, const char* what, int line) {
  ++checks;
  if (!ok) {
    ++failures;
    std::printf("core_test.cpp:%d: %s\n", line, what);
  }
}
#define CHECK(condition) check(condition, #condition, __LINE__)

Layout layout_of(Scalar scalar, int64_t samples, int64_t size, int threads, const int64_t* segments,
                 int64_t n_segments) {
  return {scalar, false, samples, size, threads, false, nullptr, segments, n_segments, size};
}

void stage_sums_cover_every_number_once() {
  for (int64_t samples : {1, 2, 300})
    for (int64_t size : {0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 70001 / static_cast<int>(samples)})
      for (int threads : {1, 2, 3}) {
        const size_t n = static_cast<size_t>(samples * size);
        std::vector<double> y(n, 1.0), k(n, 2.0), out(n, -1.0), dt(static_cast<size_t>(samples));
        for (size_t b = 0; b < dt.size(); ++b) dt[b] = static_cast<double>(b % 3);
        const int64_t segments[] = {0, size};
        StageCombine op = {};
        op.y = y.data();
        op.k[0] = k.data();
        op.w[0] = 0.5;
        op.terms = 1;
        op.dt = dt.data();
        op.out = out.data();
        cpu::stage_combine(layout_of(Scalar::float64, samples, size, threads, segments, 1), op);
        bool right = true;
        for (size_t i = 0; i < n; ++i) right = right && out[i] == 1.0 + dt[i / static_cast<size_t>(size)];
        CHECK(right);
      }
}

void error_norms_are_the_same_for_any_number_of_threads() {
  const int64_t size = 300001, segments[] = {0, 1, 1, 200000, size};
  std::vector<float> y(size), k(size);
  for (int64_t i = 0; i < size; ++i) y[i] = static_cast<float>(std::sin(i)), k[i] = static_cast<float>(std::cos(i));
  const double dt = 0.1;
  std::vector<double> means[2] = {std::vector<double>(4), std::vector<double>(4)};
  for (int threads : {1, 4}) {
    ErrorNorm op = {};
    op.y0 = op.y1 = y.data();
    op.k[0] = k.data();
    op.w[0] = 1;
    op.terms = 1;
    op.dt = &dt;
    op.rtol = op.atol = 1e-3;
    op.parts = 1;
    op.means = means[threads > 1].data();
    cpu::error_norm(layout_of(Scalar::float32, 1, size, threads, segments, 4), op);
  }
  CHECK(means[0] == means[1]);
  CHECK(means[0][1] == 0);  // an empty segment
  CHECK(means[0][3] > 0);
}

// Short rows are summed many at a time, long ones one by one; 128 numbers are the most of a short one.
void an_error_norm_of_many_rows_is_that_of_each_alone() {
  for (int64_t samples : {2, 37, 300})
    for (int64_t size : {1, 2, 3, 4, 6, 8, 9, 15, 16, 17, 64, 96, 127, 128, 129})
      for (int64_t n_segments : {1, 2}) {
        const int64_t whole[] = {0, size}, halves[] = {0, size / 2, size};
        const int64_t* const segments = n_segments == 1 ? whole : halves;
        const size_t n = static_cast<size_t>(samples * size);
        std::vector<float> y(n), k(n);
        std::vector<double> dt(static_cast<size_t>(samples)), means(static_cast<size_t>(n_segments * samples));
        for (size_t i = 0; i < n; ++i)
          y[i] = static_cast<float>(std::sin(i)), k[i] = static_cast<float>(std::cos(3 * i));
        for (size_t b = 0; b < dt.size(); ++b) dt[b] = 0.01 * static_cast<double>(b % 5);
        ErrorNorm op = {};
        op.y0 = op.y1 = y.data();
        op.k[0] = op.k[1] = k.data();
        op.w[0] = 0.7;
        op.w[1] = -0.2;
        op.terms = 2;
        op.dt = dt.data();
        op.rtol = op.atol = 1e-3;
        op.parts = 1;
        op.means = means.data();
        cpu::error_norm(layout_of(Scalar::float32, samples, size, 2, segments, n_segments), op);
        bool right = true;
        for (int64_t b = 0; b < samples; ++b) {
          double alone[2];
          op.y0 = op.y1 = y.data() + b * size;
          op.k[0] = op.k[1] = k.data() + b * size;
          op.dt = dt.data() + b;
          op.means = alone;
          cpu::error_norm(layout_of(Scalar::float32, 1, size, 1, segments, n_segments), op);
          for (int64_t s = 0; s < n_segments; ++s)
            right = right && alone[s] == means[static_cast<size_t>(s * samples + b)];
        }
        CHECK(right);
      }
}

void rows_beyond_two_to_the_31() {
  const int64_t size = 3, begin = (int64_t{1} << 33) + 1, end = begin + 7;
  int64_t at = begin;
  bool right = true;
  for_each_row(begin, end, size, [&](int64_t b, int64_t from, int64_t to) {
    right = right && from == at && b == from / size && to <= (b + 1) * size;
    at = to;
  });
  CHECK(right && at == end);
}

// Row 5 of an output whose rows are 2^30 numbers apart; only that row's memory exists.
void outputs_beyond_two_to_the_31() {
  const int64_t size = 4, stride = int64_t{1} << 30, i = 5, segments[] = {0, size};
  float y[size] = {1, 2, 3, 4}, k[size] = {1, 1, 1, 1}, row[size] = {};
  std::vector<double> times(7);
  for (size_t j = 0; j < times.size(); ++j) times[j] = static_cast<double>(j);
  double words[kWords] = {};
  Sample s = {};
  s.t_prev = 4;
  s.t = 6;
  s.dt_prev = 2;
  s.output_begin = i;
  s.output_end = i + 1;
  const StepState state = {words, 1, 1};
  store_sample(state, 0, s);
  Interpolate op = {};
  op.y = y;
  op.k[0] = k;
  op.c[0][0] = op.end[0] = 1;
  op.terms = op.degree = 1;
  op.state = state;
  op.grid = {times.data(), 7, 1, 0, nullptr, 0, nullptr, 0};
  op.out =
      reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(row) - static_cast<uintptr_t>(i * stride) * sizeof(float));
  op.out_stride = stride;
  cpu::interpolate(layout_of(Scalar::float32, 1, size, 1, segments, 1), op);
  CHECK(row[0] == 2 && row[3] == 5);  // y + 2 * (1/2) * 1
}

void the_16_bit_types_round_trip() {
  bool right = true;
  for (uint32_t bits = 0; bits < (1u << 16); ++bits) {
    const Float16 h = {static_cast<uint16_t>(bits)};
    const BFloat16 b = {static_cast<uint16_t>(bits)};
    if (!std::isnan(load(h))) right = right && store<Float16>(load(h)).bits == bits;
    if (!std::isnan(load(b))) right = right && store<BFloat16>(load(b)).bits == bits;
  }
  CHECK(right);
  CHECK(std::isnan(load(store<Float16>(NAN))) && std::isnan(load(store<BFloat16>(NAN))));
}

void neighbours_are_those_of_nextafter() {
  for (double x : {0.0, 1.0, -1.0, 1e-310, -1e-310, 1e300, 4.9e-324}) {
    CHECK(round_and_nudge<double>(x, 1) == std::nextafter(x, INFINITY));
    CHECK(round_and_nudge<double>(x, -1) == std::nextafter(x, -INFINITY));
    CHECK(round_and_nudge<double>(x, 0) == x);
    const float r = static_cast<float>(x);
    if (std::isfinite(r)) CHECK(round_and_nudge<float>(x, 1) == std::nextafter(r, INFINITY));
  }
}

void every_task_is_done_once_by_any_number_of_threads() {
  std::vector<std::thread> callers;
  std::vector<int> right(4);
  for (size_t c = 0; c < right.size(); ++c)
    callers.emplace_back([&right, c] {
      right[c] = 1;
      for (int64_t round = 0; round < 200; ++round) {
        std::vector<int> done(static_cast<size_t>(round));
        cpu::parallel_for(round, 1 + static_cast<int>(round % 3), [&](int64_t i) { ++done[static_cast<size_t>(i)]; });
        for (int n : done) right[c] = right[c] && n == 1;
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (int r : right) CHECK(r);
}

void a_solve_of_the_exponential_ends_where_it_should() {
  const double times[] = {0, 1};
  const Grid grid = {times, 2, 1, 0, nullptr, 0, nullptr, 0};
  Policy policy = {0.9, 10, 0.2, 0, std::numeric_limits<double>::infinity(), 2, {1, 0, 0}, {0, 0}, 0, 0, 1000, 1, 0, 0};
  Sample s = start_sample(grid, 0);
  s.dt = 0.01;
  plan_step(s, policy, grid, 0);
  double y = 1;
  while (s.status == kRunning) {
    const double y1 = y * (1 + s.dt + s.dt * s.dt / 2);
    const double error = scaled_error(y * s.dt * s.dt / 2, y, y1, 1e-4, 1e-4);
    judge_step(s, policy, grid, 0, std::fabs(error));
    if (s.accepted) y = y1;
    plan_step(s, policy, grid, 0);
  }
  CHECK(s.status == kSuccess && s.t == 1 && s.dt == 0);
  CHECK(std::fabs(y - std::exp(1.0)) < 1e-3);
}

}  // namespace

int main() {
  std::printf("SIMD level: %s\n", cpu::simd_level());
  stage_sums_cover_every_number_once();
  error_norms_are_the_same_for_any_number_of_threads();
  an_error_norm_of_many_rows_is_that_of_each_alone();
  rows_beyond_two_to_the_31();
  outputs_beyond_two_to_the_31();
  the_16_bit_types_round_trip();
  neighbours_are_those_of_nextafter();
  every_task_is_done_once_by_any_number_of_threads();
  a_solve_of_the_exponential_ends_where_it_should();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
