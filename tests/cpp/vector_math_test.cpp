// Vector mathematics against the C library in the next precision: float against double, double against long double.
//
//   vector_math_test [stride [name | "" [bits]]]
//
// takes every stride-th bit pattern of float (1: all of them) and the neighbourhoods of critical points, as float,
// double and vectors of every width the instruction set has. One line for each function and precision: its name, the
// largest error in ulp and where, and a digest of all results, to be compared between instruction sets. With `bits`
// errors are not looked for, which takes half the time or less.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/core/side_by_side.h"

using namespace pyode;

namespace {

constexpr int kBatch = 1024;
int failures = 0;
uint64_t stride = 997;
const char* only = nullptr;
bool only_bits = false;

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
template <class T>
using Wider = std::conditional_t<sizeof(T) == 4, double, long double>;

/// |result - exact| in units of the last place of T at the exact value; inf where one is nan or of another sign.
template <class T>
double error_in_ulp(T result, Wider<T> exact) {
  using Limits = std::numeric_limits<T>;
  if (std::isnan(exact) || std::isnan(result)) return std::isnan(exact) && std::isnan(result) ? 0 : INFINITY;
  if (std::signbit(exact) != std::signbit(result)) return INFINITY;
  if (result == static_cast<T>(exact)) return result == exact ? 0 : 0.5;  // at most that, and quickly said
  if (std::isinf(exact)) return std::isinf(result) ? 0 : INFINITY;
  int exponent;
  std::frexp(exact, &exponent);
  const int last =
      std::max(std::min(exponent, Limits::max_exponent) - Limits::digits, Limits::min_exponent - Limits::digits);
  // Beyond the largest number all is one: inf counts as the next power of two.
  const Wider<T> end = std::ldexp(Wider<T>(1), Limits::max_exponent);
  const Wider<T> distance = std::min(std::abs(Wider<T>(result)), end) - std::min(std::abs(exact), end);
  return static_cast<double>(std::ldexp(std::abs(distance), -last));
}

/// Arguments of one function, in batches: numbers in x and, of a function of two, in y.
template <class T>
struct Batch {
  alignas(64) T x[kBatch], y[kBatch];
  int size = 0;
};

template <class R, class T, class F>
void evaluate(F f, const Batch<T>& in, T* out) {
  for (int i = 0; i < kBatch; i += lanes<R>) {
    R x, y;
    memcpy(&x, in.x + i, sizeof x);
    memcpy(&y, in.y + i, sizeof y);
    const R z = f(x, y);
    memcpy(out + i, &z, sizeof z);
  }
}

template <class T, class F, class Exact>
struct Check {
  F f;
  Exact exact;
  Batch<T> batch;
  double worst = 0;
  T worst_x = 0, worst_y = 0;
  uint64_t digest = 0;
  bool same = true;  // for every width

  void add(T x, T y = 0) {
    batch.x[batch.size] = x;
    batch.y[batch.size] = y;
    if (++batch.size == kBatch) flush();
  }

  void flush() {
    for (int i = batch.size; i < kBatch; ++i) batch.x[i] = batch.y[i] = 1;
    alignas(64) T z[kBatch], other[kBatch];
    const auto results = [&](auto vector, T* out) {
      evaluate<decltype(vector)>(f, batch, out);
      for (int i = 0; i < kBatch; ++i) out[i] = out[i] == out[i] ? out[i] : std::numeric_limits<T>::quiet_NaN();
    };
    results(Vector<T, 16>(), z);
    const auto compare = [&](auto vector) {
      results(vector, other);
      same = same && memcmp(z, other, sizeof z) == 0;
    };
    compare(T());
#if defined(__AVX__)
    compare(Vector<T, 32>());
#endif
#if defined(__AVX512F__)
    compare(Vector<T, 64>());
#endif
    for (int i = 0; i < batch.size; ++i) {
      const double error = only_bits ? 0 : error_in_ulp<T>(z[i], exact(Wider<T>(batch.x[i]), Wider<T>(batch.y[i])));
      if (error > worst) worst = error, worst_x = batch.x[i], worst_y = batch.y[i];
      digest = (digest ^ math::bit_cast<Bits<T>>(z[i])) * 0x9e3779b97f4a7c15 + 1;
    }
    batch.size = 0;
  }

  void report(const char* name, double bound) {
    flush();
    const bool ok = worst <= bound && same;
    failures += !ok;
    std::printf("%-8s %-7s %.3f ulp at %a", name, sizeof(T) == 4 ? "float32" : "float64", worst, double(worst_x));
    if (worst_y != 0) std::printf(", %a", double(worst_y));
    std::printf(" digest %016llx%s%s\n", static_cast<unsigned long long>(digest), same ? "" : " differs between widths",
                ok ? "" : " FAILED");
    std::fflush(stdout);
  }
};

/// Where something ends, begins or is undefined; both signs and the neighbours of each are tried.
const double kCritical[] = {0,
                            1e-300,
                            2.2250738585072014e-308,
                            1.17549435e-38,
                            1.4e-45,
                            1.1754944e-38,
                            0.173,
                            0.25,
                            0.3465735,
                            1.0 / 3,
                            0.5,
                            0.549306,
                            0.55,
                            2.0 / 3,
                            0.921875,
                            1,
                            4.0 / 3,
                            1.5,
                            2,
                            3,
                            3.92,
                            4,
                            5.92,
                            6,
                            9.01,
                            10,
                            15.94,
                            16.635,
                            17.33,
                            19.06,
                            20,
                            36.7,
                            37.43,
                            40,
                            87.33,
                            88.0297,
                            88.7228,
                            89,
                            103.28,
                            103.97,
                            104,
                            708.396,
                            709.0895,
                            709.7827,
                            710,
                            744.44,
                            745.13,
                            746,
                            8388608,
                            16777216,
                            131072,
                            33554432,
                            4503599627370496,
                            9007199254740992,
                            1.7e38,
                            3.4028234663852886e38,
                            6.02e23,
                            8.9e307,
                            1.7976931348623157e308,
                            INFINITY,
                            NAN};

template <class T, class Each>
void critical_points(Each each) {
  constexpr int around = 100;
  const auto neighbours = [&](T x) {
    if (std::isinf(x) || std::isnan(x)) each(x), each(-x);
    if (!std::isfinite(x)) return;
    T above = x, below = x;
    for (int i = 0; i < around; ++i) {
      each(above), each(-above), each(below), each(-below);
      above = std::nextafter(above, std::numeric_limits<T>::infinity());
      below = std::nextafter(below, -std::numeric_limits<T>::infinity());
    }
  };
  for (double x : kCritical) neighbours(static_cast<T>(x));
  for (int e = 0; e < 40; ++e)  // multiples of pi / 2, the worst that reduction meets
    for (double k : {1.0, 1.5, 1.75}) neighbours(static_cast<T>(std::ldexp(k, e) * 1.5707963267948966));
}

template <class Each>
void arguments(float, Each each) {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += stride) each(float_of(static_cast<uint32_t>(bits)));
  critical_points<float>(each);
}

template <class Each>
void arguments(double, Each each) {
  std::mt19937_64 random(1);
  const int each_binade = std::max(4, static_cast<int>(16000 / stride));
  for (uint64_t binade = 0; binade < 4096; ++binade)
    for (int i = 0; i < each_binade; ++i) each(math::bit_cast<double>(binade << 52 | random() >> 12));
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (double scale : {1.0, 4.0, 30.0, 1000.0})
    for (int i = 0; i < 2000 * each_binade; ++i) each(scale * uniform(random));
  critical_points<double>(each);
}

template <class T, class F, class Exact>
void check_precision(const char* name, F f, Exact exact, double bound) {
  const auto of_two = [f](auto x, auto) { return f(x); };
  const auto exact_of_two = [exact](auto x, auto) { return exact(x); };
  static Check<T, decltype(of_two), decltype(exact_of_two)> check{of_two, exact_of_two, {}};
  arguments(T(), [&](T x) { check.add(x); });
  check.report(name, bound);
}

constexpr bool kLongDoubleIsWider = std::numeric_limits<long double>::digits > std::numeric_limits<double>::digits;

template <class F, class Exact>
void check(const char* name, F f, Exact exact, double bound = 2) {
  if (only && std::strcmp(name, only) != 0) return;
  check_precision<float>(name, f, exact, bound);
  if (kLongDoubleIsWider) check_precision<double>(name, f, exact, bound);
}

/// All pairs of a coarse set with what is special in it, then pairs whose power is neither 0 nor inf.
template <class T, class F, class Exact>
void check_pairs(const char* name, F f, Exact exact, double bound) {
  static Check<T, F, Exact> check{f, exact, {}};
  using Limits = std::numeric_limits<T>;
  std::vector<T> coarse = {Limits::min(),
                           Limits::denorm_min(),
                           Limits::max(),
                           Limits::infinity(),
                           Limits::quiet_NaN(),
                           std::nextafter(T(1), T(0)),
                           std::nextafter(T(1), T(2))};
  for (double x : {0.0, 1.0, 2.0, 3.0, 5.0, 0.5, 1.5, 2.5, 1.0 / 3, 1e-3, 1e3, 8388607.5, 8388608.0, 8388609.0,
                   16777215.0, 4503599627370495.5, 9007199254740991.0, 9007199254740994.0, 1e30})
    coarse.push_back(static_cast<T>(x));
  for (T x : coarse)
    for (T y : coarse)
      for (int signs = 0; signs < 4; ++signs) check.add(signs & 1 ? -x : x, signs & 2 ? -y : y);
  std::mt19937_64 random(2);
  std::uniform_real_distribution<double> uniform(-1, 1);
  const double largest = std::log(static_cast<double>(Limits::max()));
  const int64_t pairs = 300000000 / static_cast<int64_t>(stride);
  for (int64_t i = 0; i < pairs; ++i) {
    const bool near_one = i % 4 == 0;
    const double x = std::exp(largest * uniform(random) * (near_one ? 1e-3 * uniform(random) : 1));
    check.add(static_cast<T>(x), static_cast<T>(1.05 * largest * uniform(random) / std::log(x)));
    if (i % 8 == 0) check.add(static_cast<T>(-x), static_cast<T>(std::round(30 * uniform(random))));
  }
  check.report(name, bound);
}

template <class F, class Exact>
void check_two(const char* name, F f, Exact exact, double bound) {
  if (only && std::strcmp(name, only) != 0) return;
  check_pairs<float>(name, f, exact, bound);
  if (kLongDoubleIsWider) check_pairs<double>(name, f, exact, bound);
}

/// The controller's root, x to the power of -1 / order, of positive doubles within single precision's range or beyond
/// it. Within it, whole orders up to 12 are found by Halley's method; all else is a power, which multiplies the
/// rounding of a logarithm and of -1 / order by |log(x) / order|.
void check_inverse_root(const char* name, double order, bool within) {
  if ((only && std::strcmp(name, only) != 0) || !kLongDoubleIsWider) return;
  const auto root = [order](auto x, auto) { return inverse_root(x, order); };
  const auto exact = [order](long double x, long double) { return std::pow(x, -1 / static_cast<long double>(order)); };
  Check<double, decltype(root), decltype(exact)> check{root, exact, {}};
  arguments(double(), [&](double x) {
    if (x > 0 && std::isfinite(x) && within == (x >= 1e-30 && x <= 1e30)) check.add(x);
  });
  const bool halley = within && order <= 12 && order == std::floor(order);
  check.report(name, 2 + (halley ? 0 : 2 * (within ? std::log(1e30) : 745) / order));
}

template <class T>
T logistic(T x) {
  const T power = std::exp(-std::abs(x));
  return (x < 0 ? power : 1) / (1 + power);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) stride = std::max<uint64_t>(1, std::strtoull(argv[1], nullptr, 10));
  if (argc > 2 && *argv[2]) only = argv[2];
  only_bits = argc > 3 && std::strcmp(argv[3], "bits") == 0;
#define CHECK(name, bound) \
  check(#name, [](auto x) { return math::name(x); }, [](auto x) { return std::name(x); }, bound)
  CHECK(exp, 2);
  CHECK(expm1, 2);
  CHECK(log, 2);
  CHECK(log1p, 2);
  CHECK(sin, 2);
  CHECK(cos, 2);
  CHECK(tan, 2);
  CHECK(tanh, 2);
  CHECK(erf, 2);
  check("sigmoid", [](auto x) { return math::sigmoid(x); }, [](auto x) { return logistic(x); });
  CHECK(sqrt, 0.5);
  CHECK(abs, 0);
  CHECK(floor, 0);
  CHECK(ceil, 0);
  CHECK(trunc, 0);
  check("round", [](auto x) { return math::round(x); }, [](auto x) { return std::nearbyint(x); }, 0);
  check_two("pow", [](auto x, auto y) { return math::pow(x, y); }, [](auto x, auto y) { return std::pow(x, y); }, 2);
  check_two(
      "maximum", [](auto x, auto y) { return math::maximum(x, y); },
      [](auto x, auto y) { return x != x || x > y ? x : y; }, 0);
  check_two(
      "minimum", [](auto x, auto y) { return math::minimum(x, y); },
      [](auto x, auto y) { return x != x || x < y ? x : y; }, 0);
  for (double order : {1.0, 2.0, 3.0, 5.0, 7.0, 8.0, 12.0, 13.0, 2.5}) {
    check_inverse_root("root", order, true);
    check_inverse_root("farroot", order, false);
  }
  return failures != 0;
}
