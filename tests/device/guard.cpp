// The part of a device that torch asks in C++: which one is current, and whether its queues are empty.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
const c10::Device CUDA0(c10::kCUDA, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return CUDA0; }
  c10::Device getDevice() const override { return CUDA0; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, CUDA0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
} guard;
}  // namespace

extern "C" void install() { c10::impl::registerDeviceGuard(c10::kCUDA, &guard); }
