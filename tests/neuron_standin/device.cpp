// A device called "neuron" whose memory is the CPU's. Operators outside a compiled program run, on the CPU: TorchNeuron
// runs them too, on the core, and on the CPU where it has none (its documentation, "What is TorchNeuron?").
// Source of the interfaces: torch's documentation on PrivateUse1, "Facilitating New Backend Integration".
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {
bool used = false;
c10::Device device(c10::DeviceType::PrivateUse1, 0);  // the only one that this process has

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    used = true;
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes ? bytes : 1);
    return {data, data, &free_it, device};
  }
  static void free_it(void* data) { c10::GetCPUAllocator()->raw_deallocate(data); }
  c10::DeleterFnPtr raw_deleter() const override { return &free_it; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::DeviceIndex deviceCount() const noexcept override { return device.index() + 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
} hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

c10::ScalarType type_of(std::optional<c10::ScalarType> t) { return t.value_or(c10::ScalarType::Float); }
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// Rule: a process has one device, of the index LOCAL_RANK (distributed/backend.py, _set_local_device_start_index).
void check(std::optional<c10::Device> d) {
  TORCH_CHECK(!d || !d->has_index() || *d == device, "there is no ", *d, " in the process that has ", device);
}
at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> t, std::optional<c10::Layout>,
                 std::optional<c10::Device> d, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  check(d);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, type_of(t), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> t,
                         std::optional<c10::Layout>, std::optional<c10::Device> d, std::optional<bool>) {
  check(d);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, type_of(t));
}
at::Tensor on_host(const at::Tensor& x) {  // the same memory, as a CPU tensor
  if (x.is_cpu()) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), at::TensorOptions().dtype(x.dtype()));
}
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  used = true;
  on_host(to).copy_(on_host(from));
  return to;
}
at::Tensor as_strided(const at::Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(x, size, stride, offset);
}
at::Tensor view(const at::Tensor& x, c10::SymIntArrayRef size) { return at::cpu::view_symint(x, size); }
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) { return copy_from(from, to, false); }
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }
bool was_used() { return used; }
void set_index(int64_t index) { device.set_index(static_cast<c10::DeviceIndex>(index)); }
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY(neuron_standin_device, m) {
  m.def("was_used() -> bool", was_used);
  m.def("set_index(int index) -> ()", set_index);
}
