// FLOP/s of the package's own product, (64,300) by (300,600) from cache, for `hardware.gemm_peak` and `hardware.Products`:
// at least so many seconds and so many operations of it.

#include <chrono>
#include <vector>

#include "product.h"

extern "C" double product_flops(double seconds, double flops) {
  using Clock = std::chrono::steady_clock;
  using Product = Whole<float>;
  constexpr int64_t m = 64, k = 300, n = 600;
  const std::vector<float> a(m * k, 1.f), w(numbers<Product>(k, n), 1.f);
  std::vector<float> c(m * n);
  Product::Buffer unused;
  const auto left = Product::rows_of(m, k, a.data(), k, unused);
  double best = 0, passed = 0, done = 0;
  while (passed < seconds || done < flops) {
    const int64_t more = int64_t((flops - done) / (2. * m * k * n)) + 1, repeats = passed < seconds || more > 20 ? 20 : more;
    const auto start = Clock::now();
    for (int64_t r = 0; r < repeats; r++) Product::multiply(m, n, left, w.data(), Product::columns * k, false, c.data(), n);
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, repeats * 2. * m * k * n / took), passed += took, done += repeats * 2. * m * k * n;
  }
  return best;
}
