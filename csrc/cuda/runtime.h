// The CUDA runtime, checked: an error becomes an exception of one sentence.
#pragma once

namespace bdk::cuda {

// Throws std::runtime_error where `error`, a cudaError_t, is not success.
void check(int error);

// Throws std::runtime_error where nothing can run: no driver, one older than the CUDA of this build, no
// device.
void require_device();

// Makes `device` the current one for as long as it lives.
class OnDevice {
  public:
    explicit OnDevice(int device);
    ~OnDevice();
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_, device_;
};

[[noreturn]] void refuse(const char* what, long long value, long long limit);

}  // namespace bdk::cuda
